"""Freed memory stays with the process, so that the next step does not have to ask for it again.

glibc gives large blocks back to the kernel as soon as they are free and maps new ones zeroed, page
by page. A training step frees and allocates all gradients and activations; zeroing 400 MB afresh
took 0.15 s of CPU time here where writing them took 0.01 s (`benchmarks/moe_layer.py --allocator`
shows what that is in a layer).
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns whether it understood.

    Does nothing with another C library, or where the user has set one of glibc's own variables
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_).
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
