"""A lease on a stage: a small file that its holder renews, where no lock of the kernel reaches.

Place in the flow: `claims` gives one to who computes, and looks at those of others. Invariant: an observer never takes
a holder that renews for a dead one, whatever the clocks of their machines say.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import fsspec

from orchestrator.run.holder import dead, here, myself
from orchestrator.run.lock import Flock

State = Literal["free", "held", "left"]  # left: by a holder that died or was cut off
LEASE = "lease.json"
BEATS_PER_TTL = 4
SETTLE_SHARE = 0.05  # of the time to live: how long a write waits for a rival's before it is read back
EXIT_LOST = 86


def end_process() -> None:
    """End at once, as `kill -9` would: who lost a lease must not write another byte, and the store survives a kill."""
    print("the lease on the stage was lost to another machine: this process ends", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


class Lease:
    """A small file with its owner, a counter and a time to live, renewed by a thread of the holder.

    An observer judges it expired when it has read the same text for the time to live by the observer's own monotonic
    clock, so clocks that differ or jump do not matter, or at once when it sees that the holder is dead. Works on any
    file system of fsspec. Its holder takes the lock in the stage's directory, `beside`, too: where locks reach, gc and
    doctor see it without waiting. An observer who gives the owner that it looks for, `of`, sees no other's lease.
    """

    def __init__(
        self, url: str, ttl: float, expired: str | None = None, on_lost: Callable[[], None] = end_process, *,
        beside: Flock | None = None, of: str | None = None,
    ) -> None:  # fmt: skip
        self.url, self.ttl, self.expired, self.on_lost, self.beside, self.of = url, ttl, expired, on_lost, beside, of
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
        if self.beside is not None:
            with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
                self.beside.acquire()
        self._thread.start()
        return True

    def held_by_other(self) -> bool:
        """Whether a lease is there that has changed within its time to live since this observer first saw it so."""
        return self.look() in ("held", None)

    def look(self) -> State | None:
        """What this observer knows by now; None while it has seen no change and the time is not over."""
        text, now = self._read(), time.monotonic()
        told = _told(text)
        before, self._seen, self.expired = self._seen, None, None
        if text is None or self.of not in (None, told.get("owner")):
            return "free"
        self._seen = (text, now) if before is None or before[0] != text else before
        if dead(told["holder"]) or now - self._seen[1] >= told.get("ttl", self.ttl):
            self.expired = text
            return "left"
        renewed = before is not None and before[0] != text
        return "held" if renewed or here(told["holder"]) else None

    def clear(self) -> None:
        """Remove what this observer saw expire, if it is still that."""
        if self.expired is not None and self._read() == self.expired:
            self._files.rm_file(self._path)

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
        if self.beside is not None:
            self.beside.release()

    def told(self) -> dict[str, Any]:
        """Where it is, whose, and how long it lives."""
        return {"kind": "lease", "url": self.url, "ttl": self.ttl, "owner": self._owner}

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
        told = {"owner": self._owner, "counter": self._counter, "ttl": self.ttl, "holder": myself()}
        return json.dumps(told)

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


def _told(text: str | None) -> dict[str, Any]:
    """What a lease says, its holder at least; one whose holder died while it wrote says nothing."""
    try:
        told = json.loads(text or "")
        holder = told.get("holder")
        return {**told, "ttl": float(told["ttl"]), "holder": holder if isinstance(holder, dict) else {}}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"holder": {}}
