"""The right to compute a stage, held by one process at a time: a lock of the kernel, or a lease where no lock reaches.

Place in the flow: `compute` takes a claim before it works, the broker looks at claims to know what others compute, and
`states` tells gc, doctor and a run that ends. Invariant: a claim saves work, the store keeps results right without it:
publishing is first-writer-wins and stages are deterministic, so two holders at once waste time and harm nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from orchestrator.distill.context import RunContext
from orchestrator.files import read_json
from orchestrator.run.lease import LEASE, Lease, State
from orchestrator.run.lock import LOCK, Flock
from orchestrator.study.spec import place_of

ATTEMPT, DONE = "attempt.json", "DONE.json"  # of the store's files
LOOK_SECONDS = 0.1  # between looks at the leases of other machines


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

    def told(self) -> dict[str, Any]:
        """What an attempt writes of its claim, for `states` to find it by."""


def claim_of(context: RunContext, key: str, expired: str | None = None) -> Claim:
    """The claim on a stage, of the kind that the run uses; `expired` is what the observer who saw it expire names."""
    lock = Flock(Path(context.store) / place_of(key) / LOCK)
    if context.claims == "flock":
        return lock
    url = f"{context.mirror or context.store}/{place_of(key)}/{LEASE}"
    return Lease(url, context.lease_seconds, expired, beside=lock)


def states(folders: Iterable[Path]) -> dict[Path, State]:
    """Whether somebody works in these directories of stages, or left a lease behind.

    Leases of other machines are watched until they are renewed or their time is over, all at once; the rest takes no
    time. One that cannot be read counts as held.
    """
    found: dict[Path, State] = {}
    watched: dict[Path, Lease] = {}
    for folder in folders:
        lease = lease_of(folder)
        if Flock(folder / LOCK).held_by_other():
            found[folder] = "held"
        elif lease is None:
            found[folder] = "free"
        else:
            watched[folder] = lease
    while watched:
        for folder, lease in list(watched.items()):
            try:
                state = lease.look()
            except Exception:  # whatever the file system raises
                state = "held"
            if state is not None:
                found[folder] = state
                del watched[folder]
        if watched:
            time.sleep(LOOK_SECONDS)
    return found


def lease_of(folder: Path) -> Lease | None:
    """The lease on an attempt in a stage's directory, beside it or where the attempt says that it is."""
    if (folder / LEASE).exists():
        return Lease(str(folder / LEASE), RunContext.lease_seconds)
    if (folder / DONE).exists():  # whoever holds it yet does not work here any more
        return None
    try:
        told = read_json(folder / ATTEMPT)["claim"]
        return Lease(told["url"], told["ttl"], of=told["owner"]) if told["kind"] == "lease" else None
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # none was made, or none that can be read here
        return None
