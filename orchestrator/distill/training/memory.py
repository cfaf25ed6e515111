"""Memory that the process keeps instead of giving it back at every free.

glibc maps each large block anew and unmaps it when it is freed, and the system zeroes every page of it again at its
first use: a twentieth of a step of the default study, a fifth of one with long sequences. Kept, the pages are there the
next time. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # mallopt's parameters, as malloc.h numbers them


def keep_freed_memory() -> bool:
    """For this process from now on; returns whether its C library could be told so."""
    return bool(_call("mallopt", MMAP_MAX, 0)) and bool(_call("mallopt", TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Once: what is free at this moment."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> Any:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    return None if function is None else function(*arguments)


def reset_peak(device: str) -> None:
    """Forget the most memory that this process, or its device, took so far, where the system lets one."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    give_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark of this process
    except OSError:
        return


def peak_mb(device: str) -> float:
    """The most memory that this process, or its device, took since then, in MB of 2^20 bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
