"""Temporary directories that say whose they are: as long as the process that made one lives, it holds its lock.

Place in the flow: `sweep` runs Ray in them, `doctor` finds those that a killed driver left. Invariant: a directory
whose lock is free belongs to nobody alive, in whatever container its owner ran.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "layerswap-"
OWNER = "owner.lock"


@contextlib.contextmanager
def temporary_directory(purpose: str) -> Iterator[Path]:
    """Yield a new directory `layerswap-PURPOSE-...` that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
    try:
        with FileLock(folder / OWNER):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_directories() -> list[Path]:
    """This user's directories of that kind whose owner is dead."""
    found = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        lock = folder / OWNER
        with contextlib.suppress(OSError, Timeout):
            if lock.stat().st_uid == os.getuid():
                with FileLock(lock, timeout=0):
                    found.append(folder)
    return found
