"""Memory kept from batch to batch; that running out of it is explained is tested with `compare` and `distill`."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="The allocator is not that of glibc.")

PROGRAM = """
import contextlib, resource, sys, torch
from cka_probe.runtime.memory import keeping_freed_memory

def faults_of_ten_batches(megabytes):
    for _ in range(10):
        torch.ones(megabytes << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults_of_ten_batches(100)
with keeping_freed_memory(torch.device("cpu")):
    within = faults_of_ten_batches(100)
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
print(before, within, resident)
"""


@pytest.mark.full
@glibc
def test_freed_memory_is_used_again_within_the_block_and_given_back_after_it() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, within, resident = map(int, output.split())
    assert before == 0 or within < before / 10  # pages that the system handed out anew
    assert resident < 900  # megabytes: ten allocations of 100, one after the other, are not kept
