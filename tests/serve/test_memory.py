"""A server returns the memory of large images to the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from yivl.serve.memory import return_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

if sys.argv[1] == "yes":
    return_large_blocks()
del (first := [bytearray(31 * 2**20)])[:]  # a freed block raises the threshold of glibc
before, kept = resident(), []
for _ in range(3):
    blocks = []
    for _ in range(10):
        blocks.append(bytearray(b"x") * (12 * 2**20))
        kept.append(bytearray(b"x") * 100_000)  # small blocks between the large ones keep the heap from shrinking
    del blocks
print(resident() - before)
"""


def grown_mebibytes(is_used: str) -> float:
    command = [sys.executable, "-c", PROGRAM, is_used]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_large_blocks_are_returned_to_the_system() -> None:
    assert grown_mebibytes("no") > 50, "glibc returns them by itself: the module is not needed any more"
    assert grown_mebibytes("yes") < 20
