"""How much memory is free, inside whatever limit the container sets."""

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of memory that can still be used without swapping, inside the container's limit."""
    files = [_GROUP / name for name in ("memory.max", "memory.current", "memory.stat")]
    if all(file.exists() for file in files):
        limit, current, stat = (file.read_text() for file in files)
        if limit.strip() != "max":
            # pages of files count as used there, but the kernel gives up the inactive ones
            lines = (line.split() for line in stat.splitlines())
            files_bytes = next((int(n) for name, n in lines if name == "inactive_file"), 0)
            used = int(current) - files_bytes
            return min(_machine_memory(), max(0, int(limit) - used))
    return _machine_memory()


def _machine_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
