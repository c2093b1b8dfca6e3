"""Freed memory stays with the process, unless the user's environment says how malloc is to behave."""

import os
import subprocess
import sys

PROGRAM = """
import resource, torch
from hpc_lbsgd.parallel.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def step():
    kept = [torch.ones(2**20) for _ in range(8)]  # 8 activations of 4 MB, all freed at the end
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
PAGES = 8 * 2**22 / os.sysconf("SC_PAGESIZE")  # of a step


def faults_per_step(keep: bool, **environment: str) -> float:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        env=os.environ | environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return float(result.stdout)


def test_a_step_finds_the_memory_of_the_last_one():
    assert faults_per_step(keep=False, MALLOC_MMAP_THRESHOLD_="131072") > 0.9 * PAGES  # the test can fail
    assert faults_per_step(keep=True) < 0.01 * PAGES
    assert faults_per_step(keep=True, MALLOC_MMAP_THRESHOLD_="131072") > 0.9 * PAGES  # the user's own settings stay
