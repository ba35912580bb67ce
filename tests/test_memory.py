"""Freed memory is kept for the next step: shown by what the kernel counts, not by time."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from growmoe.training.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return [torch.ones(1 << 22) for _ in range(4)]  # 16 MB each

for _ in range(5):
    step()
before = faults()
for _ in range(5):
    step()
print(kept, faults() - before)
"""


def run(mode: str, **env: str) -> tuple[str, int]:
    """(what keep_freed_memory said, page faults of five steps) of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_steps_do_not_ask_the_kernel_again() -> None:
    said, faults = run("keep")
    if said == "False":
        pytest.skip("another C library")
    _, usual = run("leave", MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    assert faults < usual / 2


def test_the_users_own_setting_is_left_alone() -> None:
    said, _ = run("keep", MALLOC_MMAP_MAX_="65536")
    assert said == "False"
