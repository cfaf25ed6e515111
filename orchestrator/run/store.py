"""The store: stage key -> specification, journal, checkpoints, artefacts, result. The only truth about what is done.

    store/ab/<key>/spec.json          the specification, written first
                   lock               held by whoever computes the stage; lease.json where leases are used
                   attempt.json       who computes it since when, for the how-manieth time
                   failure.json       why the last attempt failed
                   work/step-000120/  checkpoints of an unfinished stage
                   journal.jsonl      its history
                   artefacts/         what it made
                   DONE.json          result and checksums; written last: without it nothing is done

Invariant: publishing is atomic and the first writer wins; stages are deterministic, so a second writer had the same.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
import traceback
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.distill.context import RunContext, Workplace
from orchestrator.files import fsync_tree, read_json, sha256_file, write_json, write_text
from orchestrator.run.claims import LEASE, LOCK, Claim, Flock, claim_of
from orchestrator.run.distributed import run_on_ranks
from orchestrator.run.mirror import Mirror
from orchestrator.study.spec import place_of, short, spec_from_json

VERSION = "1"  # of the store's layout
DONE = "DONE.json"
ATTEMPT = "attempt.json"
FAILURE = "failure.json"


class StoreError(ValueError):
    """A directory that cannot be used as a store."""


class StageClaimed(RuntimeError):
    """Another process computes the stage."""


class ClaimLost(RuntimeError):
    """The stage was taken over by another process while this one computed it."""


class Store:
    """A directory of stages. Opening one to write creates it; `StoreError` where it cannot be used."""

    def __init__(self, root: Path, *, write: bool = True) -> None:
        self.root = root
        marker = root / "VERSION"
        try:
            above = next(path for path in (root, *root.parents) if path.exists())
            if not above.is_dir():
                raise StoreError(f"the store {root} cannot be made: {above} is a file: give a directory as --home")
            if write:
                root.mkdir(parents=True, exist_ok=True)
                if not marker.exists():
                    write_text(marker, VERSION)
            version = marker.read_text(errors="replace") if marker.exists() else VERSION
        except OSError as error:
            told = f"the store {root} cannot be {'made' if write else 'read'} ({error.strerror})"
            raise StoreError(f"{told}: give another --home") from error
        if write and not os.access(root, os.W_OK):
            raise StoreError(f"the store {root} cannot be written: give another --home")
        if version != VERSION:
            raise StoreError(
                f"the store {root} has layout {version!r}, this program writes {VERSION!r}: use the program "
                "that wrote it, or give another --home"
            )

    def folder(self, key: str) -> Path:
        """Where a stage lives."""
        return self.root / place_of(key)

    def finished(self, key: str) -> bool:
        """Whether the stage's result is there."""
        return (self.folder(key) / DONE).is_file()

    def done(self, key: str) -> dict[str, Any]:
        """The manifest of a finished stage: `result`, `seconds` and `core_seconds` (of processor time) of its last
        attempt, `finished` (time), `files` with their digests."""
        manifest: dict[str, Any] = read_json(self.folder(key) / DONE)
        return manifest

    def result(self, key: str) -> dict[str, Any]:
        """What the stage function returned."""
        result: dict[str, Any] = self.done(key)["result"]
        return result

    def artefacts(self, key: str) -> Path:
        """The directory a finished stage published."""
        return self.folder(key) / "artefacts"

    def attempt(self, key: str) -> dict[str, Any] | None:
        """Who computes an unfinished stage since when, or did so last."""
        return _maybe(self.folder(key) / ATTEMPT)

    def failure(self, key: str) -> dict[str, Any] | None:
        """Why the last attempt failed, if it ended by an error."""
        return _maybe(self.folder(key) / FAILURE)

    def locked(self, key: str) -> bool:
        """Whether somebody computes the stage at this moment, or left a lease on it behind."""
        folder = self.folder(key)
        return (folder / LEASE).exists() or Flock(folder / LOCK).held_by_other()

    def withdraw_damaged(self, keys: Iterable[str]) -> list[str]:
        """Let finished stages whose files are not what was published count as not finished; a line for each."""
        said = []
        for key in keys:
            if not self.finished(key):
                continue
            bad = self.damaged(key)
            if bad:
                (self.folder(key) / DONE).unlink()
                said.append(f"stage {short(key)}: {bad} is damaged or gone: the stage is computed again")
        return said

    def all_keys(self) -> list[str]:
        """All stages that have a directory, finished or not."""
        return sorted(path.name for path in self.root.glob("??/*") if path.is_dir())

    def remove(self, key: str) -> bool:
        """Delete a stage, finished or not, with all that its attempts left; False for one that is being computed."""
        if (self.folder(key) / LEASE).exists():
            return False
        with contextlib.suppress(Timeout), FileLock(self.folder(key) / LOCK, timeout=0):
            (self.folder(key) / DONE).unlink(missing_ok=True)  # first: a half-deleted stage is not a finished one
            shutil.rmtree(self.folder(key))
            return True
        return False

    def damaged(self, key: str) -> str | None:
        """The first file of a finished stage that is not what was published; none where all are."""
        try:
            files: dict[str, str] = self.done(key)["files"]
        except (ValueError, KeyError):
            return DONE
        for name, digest in files.items():
            path = self.artefacts(key) / name
            if not path.is_file() or sha256_file(path) != digest:
                return name
        return None

    def disk_bytes(self) -> int:
        """Bytes of all files in the store."""
        return tree_bytes(self.root)


def tree_bytes(root: Path) -> int:
    """Bytes of all files below a directory, those that vanish meanwhile left out."""
    total = 0
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def compute(spec_json: str, context: RunContext, expired: str | None = None) -> dict[str, Any]:
    """Compute a stage unless it is finished, and return its result. Runs in the process that has the stage's cores.

    A process that died left a checkpoint to go on from. `expired` is the lease that it left, as the caller saw it.

    Raises:
        StageClaimed: another process computes the stage; this one does not wait, for it has the cores.
        ClaimLost: another took the stage over meanwhile; nothing is published.
    """
    spec = spec_from_json(spec_json)
    store = Store(Path(context.store))
    folder = store.folder(spec.key)
    folder.mkdir(parents=True, exist_ok=True)
    claim = claim_of(context, spec.key, expired)
    if not claim.acquire():
        raise StageClaimed(f"stage {short(spec.key)} is being computed by another process")
    try:
        if not store.finished(spec.key):
            _attempt(spec, spec_json, store, folder, context, claim)
        if context.mirror is not None:
            with contextlib.suppress(OSError):  # the driver tells at its end what the mirror lacks
                Mirror(context.mirror).upload(store, spec.key)
    finally:
        claim.release()
    return store.result(spec.key)


def _attempt(spec: Any, spec_json: str, store: Store, folder: Path, context: RunContext, claim: Claim) -> None:
    write_text(folder / "spec.json", spec_json)
    (folder / FAILURE).unlink(missing_ok=True)
    began, busy = time.time(), time.process_time()
    number = (store.attempt(spec.key) or {}).get("number", 0) + 1
    write_json(folder / ATTEMPT, {"pid": os.getpid(), "host": platform.node(), "started": began, "number": number})
    for left in folder.glob("out-*"):
        shutil.rmtree(left, ignore_errors=True)
    for torn in folder.glob(".*.tmp"):  # of a process that died while it wrote
        torn.unlink(missing_ok=True)
    out, work = folder / f"out-{uuid.uuid4().hex[:8]}", folder / "work"  # `out` is this attempt's alone
    out.mkdir()
    work.mkdir(exist_ok=True)
    inputs = {role: store.artefacts(key) for role, key in spec.parents.items()}
    from orchestrator.distill.stage import run_stage  # torch: only where a stage is computed

    run = run_stage if spec.world_size == 1 else run_on_ranks
    try:
        result = run(spec, Workplace(inputs, work, folder, out, context))
    except Exception as error:
        if claim.lost():
            raise ClaimLost(f"stage {short(spec.key)} was taken over by another process") from error
        text = "".join(traceback.format_exception(error))
        write_json(folder / FAILURE, {"error": f"{type(error).__name__}: {error}", "traceback": text})
        raise
    if claim.lost():
        raise ClaimLost(f"stage {short(spec.key)} was taken over by another process")
    _publish(spec, folder, out, result, began, busy)


def _publish(spec: Any, folder: Path, out: Path, result: dict[str, Any], began: float, busy: float) -> None:
    fsync_tree(out)
    artefacts = folder / "artefacts"
    shutil.rmtree(artefacts, ignore_errors=True)
    out.rename(artefacts)
    files = sorted(path for path in artefacts.rglob("*") if path.is_file())
    manifest = {
        "key": spec.key,
        "kind": spec.kind,
        "result": result,
        "seconds": time.time() - began,
        "core_seconds": time.process_time() - busy,
        "finished": time.time(),
        "files": {path.relative_to(artefacts).as_posix(): sha256_file(path) for path in files},
    }
    write_json(folder / DONE, manifest)
    shutil.rmtree(folder / "work", ignore_errors=True)


def _maybe(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    return value
