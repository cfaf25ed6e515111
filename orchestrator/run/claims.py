"""The right to compute a stage, held by one process at a time: a lock of the kernel, or a lease where no lock reaches.

Place in the flow: `compute` takes a claim before it works, the broker looks at claims to know what others compute.
Invariant: a claim saves work, the store keeps results right without it: publishing is first-writer-wins and stages are
deterministic, so two holders at once waste time and harm nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec
from filelock import FileLock, Timeout

from orchestrator.distill.context import RunContext
from orchestrator.study.spec import place_of

LOCK, LEASE = "lock", "lease.json"
BEATS_PER_TTL = 4
SETTLE_SHARE = 0.05  # of the time to live: how long a write waits for a rival's before it is read back
EXIT_LOST = 86


class Claim(Protocol):
    """One stage's claim as one process sees it."""

    expired: str | None  # what a dead holder left, in the eyes of this observer; who takes over must name it

    def acquire(self) -> bool:
        """Take the claim if nobody holds it; never waits for a holder."""

    def held_by_other(self) -> bool:
        """Whether somebody else computes the stage at this moment, as far as this observer can tell."""

    def lost(self) -> bool:
        """Whether what was acquired is no longer ours: then nothing may be published."""

    def release(self) -> None:
        """Let go of what was acquired."""


def claim_of(context: RunContext, key: str, expired: str | None = None) -> Claim:
    """The claim on a stage, of the kind that the run uses; `expired` is what the observer who saw it expire names."""
    if context.claims == "flock":
        return Flock(Path(context.store) / place_of(key) / LOCK)
    return Lease(f"{context.mirror or context.store}/{place_of(key)}/{LEASE}", context.lease_seconds, expired)


class Flock:
    """A lock of the kernel, which releases it at any death; it reaches as far as one machine."""

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
        """Whether the lock is taken."""
        if not self.path.exists():
            return False
        if not self.acquire():
            return True
        self.release()
        return False

    def lost(self) -> bool:
        """Never: only the holder's death ends it."""
        return False

    def release(self) -> None:
        """Free the lock."""
        self.lock.release()


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


def end_process() -> None:
    """End at once, as `kill -9` would: who lost a lease must not write another byte, and the store survives a kill."""
    print("the lease on the stage was lost to another machine: this process ends", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


class Lease:
    """A small file with its owner, a counter and a time to live, renewed by a thread of the holder.

    An observer judges it expired when it has read the same text for the time to live by the observer's own monotonic
    clock, so clocks that differ or jump do not matter. Works on any file system of fsspec.
    """

    def __init__(
        self, url: str, ttl: float, expired: str | None = None, on_lost: Callable[[], None] = end_process
    ) -> None:
        self.ttl, self.expired, self.on_lost = ttl, expired, on_lost
        self._files, self._path = fsspec.core.url_to_fs(url)
        self._owner = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._counter = 0
        self._seen: tuple[str, float] | None = None  # as an observer: the text, and since when it has been the same
        self._held: str | None = None
        self._renewed = 0.0
        self._gone = False
        self._mutex = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> bool:
        """Create the lease, or write over the expired one; then hold it alive until `release`."""
        text = self._next()
        try:
            exclusive = self._create(text)
        except FileExistsError:
            if self.expired is None or self._read() != self.expired:
                return False
            self._files.pipe_file(self._path, text.encode())
            exclusive = False
        if not exclusive:
            time.sleep(self.ttl * SETTLE_SHARE)
            if self._read() != text:
                return False
        self._held, self._renewed = text, time.monotonic()
        self._thread.start()
        return True

    def held_by_other(self) -> bool:
        """Whether a lease is there that has changed within its time to live since this observer first saw it so."""
        text, now = self._read(), time.monotonic()
        self.expired = None
        if text is None:
            self._seen = None
            return False
        if self._seen is None or self._seen[0] != text:
            self._seen = (text, now)
        if now - self._seen[1] < _ttl_of(text, self.ttl):
            return True
        self.expired = text
        return False

    def lost(self) -> bool:
        """Whether another owner's lease stands there, or ours could not be renewed in time."""
        with self._mutex:
            with contextlib.suppress(Exception):  # who cannot read it has until its time is over
                self._gone = self._gone or self._read() not in (self._held, None)
            return self._gone or time.monotonic() - self._renewed >= self.ttl

    def release(self) -> None:
        """Stop renewing, and remove the lease if it is still ours."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # what cannot be removed now expires
            if self._read() == self._held:
                self._files.rm_file(self._path)

    def _beat(self) -> None:
        while not self._over.wait(self.ttl / BEATS_PER_TTL):
            with self._mutex:
                try:
                    self._renew()
                except Exception:  # whatever the file system raises: others may think us dead once the time is over
                    self._gone = time.monotonic() - self._renewed >= self.ttl
            if self._gone:
                self.on_lost()
                return

    def _renew(self) -> None:
        found = self._read()
        if found is not None and found != self._held:
            self._gone = True
            return
        text = self._next()
        if found is None:
            try:
                self._create(text)
            except FileExistsError:
                self._gone = True
                return
        else:
            self._files.pipe_file(self._path, text.encode())
        self._held, self._renewed = text, time.monotonic()

    def _next(self) -> str:
        self._counter += 1
        return json.dumps({"owner": self._owner, "counter": self._counter, "ttl": self.ttl})

    def _create(self, text: str) -> bool:
        """Write a lease where none is; returns whether the file system itself keeps a rival from doing the same."""
        self._files.makedirs(self._files._parent(self._path), exist_ok=True)
        if "file" in self._protocols():
            with Path(self._path).open("xb") as stream:
                stream.write(text.encode())
            return True
        self._files.pipe_file(self._path, text.encode(), mode="create")
        return False

    def _protocols(self) -> tuple[str, ...]:
        told: Any = self._files.protocol
        return (told,) if isinstance(told, str) else tuple(told)

    def _read(self) -> str | None:
        try:
            return bytes(self._files.cat_file(self._path)).decode()
        except FileNotFoundError:
            return None


def _ttl_of(text: str, otherwise: float) -> float:
    try:
        return float(json.loads(text)["ttl"])
    except (ValueError, KeyError, TypeError):  # its holder died while it wrote
        return otherwise
