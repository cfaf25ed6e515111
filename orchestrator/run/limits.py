"""What a control group leaves of the machine to this process, in cores and in memory (cgroup version 2 and 1).

A container, a service or a batch job has less than the machine shows. Invariant: the group's own limit and those of all
groups above it hold, and what is not told limits nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMORY = (  # of version 2 and 1: the limit, what is used of it, and how much of that are files
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)
CACHED = ("inactive_file ", "total_inactive_file ")  # pages of files that the kernel drops when memory is wanted


def cores() -> int:
    """Cores that this process may use: those it is bound to, as far as its groups give it their time; at least one."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    bound = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([bound, *(_quota(folder) for folder in _folders("cpu"))])))


def memory_left() -> float:
    """Bytes that this process's groups let it take yet; infinite where nothing limits them."""
    return min([math.inf, *(_left(folder, names) for folder in _folders("memory") for names in MEMORY)])


def _folders(controller: str) -> Iterator[Path]:
    """The directories of this process's groups, from its own to the root, wherever they are mounted."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", f"1:{controller}:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        folder = root / path.strip("/")
        yield from (at for at in (folder, *folder.parents) if at.is_relative_to(root) and at.is_dir())


def _quota(folder: Path) -> float:
    """Cores' worth of time that a group gives."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        given = math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return given if given > 0 else math.inf  # -1 in version 1: no limit


def _left(folder: Path, names: tuple[str, str, str]) -> float:
    most, used, statistics = (folder / name for name in names)
    try:
        return int(most.read_text()) - int(used.read_text()) + _cached(statistics)
    except (OSError, ValueError):  # no such group, or "max": no limit
        return math.inf


def _cached(statistics: Path) -> int:
    """Bytes of files among those of a group; of two lines that of the group with the groups below it."""
    try:
        lines = statistics.read_text().splitlines()
    except OSError:  # not told: none are counted as free
        return 0
    return max((int(line.split()[1]) for line in lines if line.startswith(CACHED)), default=0)
