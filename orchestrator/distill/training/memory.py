"""Memory that the process keeps instead of giving it back at every free.

glibc maps each large block anew and unmaps it when it is freed, and the system zeroes every page of it again at its
first use: a twentieth of a step of the default study, a fifth of one with long sequences. Kept, the pages are there the
next time. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

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
