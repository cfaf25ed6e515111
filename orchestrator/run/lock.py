"""A lock of the kernel on a stage's directory, which releases it at any death; it reaches as far as one machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = "lock"


class Flock:
    """The lock as one process sees it."""

    expired: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path, timeout=0)

    def acquire(self) -> bool:
        """Take the lock if it is free."""
        try:
            self.lock.acquire()
        except Timeout:
            return False
        return True

    def held_by_other(self) -> bool:
        """Whether the lock is taken, as far as whoever may read it can tell; writes nothing."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # over NFS an exclusive one needs the right to write
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
        finally:
            os.close(handle)
        return False

    def lost(self) -> bool:
        """Never: only the holder's death ends it."""
        return False

    def release(self) -> None:
        """Free the lock."""
        self.lock.release()

    def told(self) -> dict[str, Any]:
        """Its kind: it lies in the stage's directory."""
        return {"kind": "flock"}


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[bool]:
    """Keep a stage's directory from every other process of this machine; yields False where one computes it."""
    lock = Flock(folder / LOCK)
    ours = lock.acquire()
    try:
        yield ours
    finally:
        if ours:
            lock.release()
