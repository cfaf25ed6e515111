"""Temporary directories that say whose they are: as long as the process that made one lives, it holds its lock.

Place in the flow: `sweep` runs Ray in them, `doctor` finds those that a killed driver left. Invariant: a directory
whose lock is free belongs to nobody alive, in whatever container its owner ran.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "layerswap-"
OWNER = "owner.lock"
# Where TMPDIR is too long for a socket below it, or has signs that Ray does not understand in a path.
FALLBACKS = ("/tmp", "/var/tmp")
DEEPEST = "/layerswap-ray-abcdefgh/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store"
LONGEST = (103 if sys.platform == "darwin" else 107) - len(DEEPEST)  # bytes; no longer path of a socket is taken
PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")


class TemporaryError(ValueError):
    """No directory in which Ray could run."""


@contextlib.contextmanager
def temporary_directory(purpose: str) -> Iterator[Path]:
    """Yield a new directory `layerswap-PURPOSE-...` that is removed at the end.

    Raises `TemporaryError` where there is no place for it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-", dir=temporary_root()))
    try:
        with FileLock(folder / OWNER):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_root() -> str:
    """The first place for temporary files that Ray can run in: TMPDIR, or one that every machine has."""
    for folder in _roots():
        if len(folder) <= LONGEST and PLAIN.fullmatch(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise TemporaryError(
        f"TMPDIR {tempfile.gettempdir()} cannot hold Ray's sockets (more than {LONGEST} bytes, or other signs than "
        f"letters, digits and . _ + -), and {' and '.join(FALLBACKS)} cannot be written: set TMPDIR to a short one"
    )


def _roots() -> list[str]:
    return list(dict.fromkeys([tempfile.gettempdir(), *FALLBACKS]))


def abandoned_directories() -> list[Path]:
    """This user's directories of that kind whose owner is dead."""
    found = []
    for folder in sorted(path for root in _roots() for path in Path(root).glob(f"{PREFIX}*")):
        lock = folder / OWNER
        with contextlib.suppress(OSError, Timeout):
            if lock.stat().st_uid == os.getuid():
                with FileLock(lock, timeout=0):
                    found.append(folder)
    return found
