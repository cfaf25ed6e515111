"""Freed memory that is kept is not faulted in again, and can be given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from orchestrator.distill.training.memory import give_back_freed_memory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
usual, told, _, kept = faults(), keep_freed_memory(), faults(), faults()
give_back_freed_memory()
print(int(told), usual, kept, faults())
"""


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    told, usual, kept, later = map(int, ran.stdout.split())
    if not told:
        pytest.skip("not glibc")
    assert kept < usual / 10
    assert later > 2 * kept
