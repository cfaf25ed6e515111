"""Freed memory that is kept is not faulted in again, and can be given back."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest

from orchestrator.distill.training import memory
from orchestrator.distill.training.memory import give_back_freed_memory, keep_freed_memory

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
usual, told = faults(), keep_freed_memory()
kept = min(faults() for _ in range(10))  # a small block behind a freed one can hide it from the next a few times
give_back_freed_memory()
print(int(told), usual, kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    told, usual, kept, later = map(int, ran.stdout.split())
    assert told
    assert kept < usual / 10
    assert later > 2 * kept


class Library:
    """A C library with these functions, and what they were called with."""

    def __init__(self, **functions: int) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        for name, answer in functions.items():
            setattr(self, name, self.function(name, answer))

    def function(self, name: str, answer: int) -> Any:
        def called(*words: int) -> int:
            self.asked.append((name, words))
            return answer

        return called


@pytest.mark.parametrize(
    ("system", "functions", "told", "asked"),
    [
        # M_MMAP_MAX is -4 and M_TRIM_THRESHOLD -1 in malloc.h; mallopt returns 1 where it took the value, an int.
        ("linux", {"mallopt": 1, "malloc_trim": 1}, True, ["mallopt -4 0", "mallopt -1 2147483647", "malloc_trim 0"]),
        ("linux", {"mallopt": 0}, False, ["mallopt -4 0"]),
        ("linux", {}, False, []),
        ("darwin", {"mallopt": 1, "malloc_trim": 1}, False, []),
    ],
)
def test_what_the_c_library_is_told(
    monkeypatch: pytest.MonkeyPatch, system: str, functions: dict[str, int], told: bool, asked: list[str]
) -> None:
    library = Library(**functions)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.sys, "platform", system)
    assert keep_freed_memory() is told
    give_back_freed_memory()
    assert [" ".join([name, *map(str, words)]) for name, words in library.asked] == asked
