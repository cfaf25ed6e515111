"""Which process holds a stage, and whether it can be seen from here that it is dead.

Invariant: a process is called dead only where its number means the same as it did to the holder: on the same machine
since the same start of it, seen from the same container.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def myself() -> dict[str, Any]:
    """What a holder writes of itself."""
    return {"machine": machine(), "pid": os.getpid(), "birth": _birth(os.getpid())}


def here(holder: Mapping[str, Any]) -> bool:
    """Whether a holder is, or was, a process that could be seen from here."""
    return holder.get("machine") == machine()


def dead(holder: Mapping[str, Any]) -> bool:
    """Whether a holder is surely dead; false where nobody can tell."""
    try:
        pid = int(holder["pid"])
        return here(holder) and (not psutil.pid_exists(pid) or _birth(pid) not in ("", holder["birth"]))
    except (KeyError, TypeError, ValueError):
        return False


def machine() -> str:
    """This machine since its last start, as far as its processes are seen from here."""
    told = [platform.node()]
    with contextlib.suppress(OSError):  # no Linux
        told += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(told)


def _birth(pid: int) -> str:
    """What tells a process from a later one of its number, whatever the clock does; empty where it is not told."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "over" if state in "ZX" else fields[18]  # field 22 of proc(5): when it started, in ticks since the boot
    except OSError:
        return ""
