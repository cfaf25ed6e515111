"""The store: stage key -> specification, journal, checkpoints, artefacts, result. The only truth about what is done.

    store/ab/<key>/spec.json          the specification, written first
                   lock               held by whoever computes the stage; lease.json where leases are used
                   attempt.json       who computes it since when, and which attempt this is
                   failure.json       why the last attempt failed
                   work/step-000120/  checkpoints of an unfinished stage
                   journal.jsonl      its history
                   artefacts/         what it made
                   DONE.json          result and checksums, its own included; written last: without it nothing is done
    store/said.log                    what a worker found damaged, for whoever drives a run

Invariant: publishing is atomic and the first writer wins; stages are deterministic, so a second writer had the same.
Nothing depends on the order of clock times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import time
import traceback
import uuid
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext, Stopped, Workplace
from orchestrator.files import fsync_tree, read_json, sealed, sha256_file, unsealed, write_json, write_text
from orchestrator.run.claims import LEASE, LOCK, Claim, Flock, claim_of, exclusively
from orchestrator.run.mirror import DONE, Mirror
from orchestrator.study.spec import place_of, short, spec_from_json

VERSION = "1"  # of the store's layout
ATTEMPT = "attempt.json"
FAILURE = "failure.json"
SAID = "said.log"


class StoreError(ValueError):
    """A directory that cannot be used as a store, or not any more."""


class Disturbed(RuntimeError):
    """An input of a stage was damaged, or its directory deleted, under it: the remedy is to compute that again."""


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
            room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(f"{told}: {'free space, or ' if room else ''}give another --home") from error
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
        attempt, `finished` (time), `files` with their digests.

        Raises `ValueError` where it is torn or altered, `OSError` where it is gone.
        """
        return unsealed(read_json(self.folder(key) / DONE))

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
                (self.folder(key) / DONE).unlink(missing_ok=True)
                said.append(self.say(key, f"{bad} is damaged or gone: the stage is computed again"))
        return said

    def tidy(self, keys: Iterable[str]) -> None:
        """Remove what attempts left that died after they had published and before they had cleared up."""
        for key in keys:
            folder = self.folder(key)
            if self.finished(key) and (folder / "work").exists():
                with exclusively(folder) as ours:
                    if ours and self.finished(key):
                        shutil.rmtree(folder / "work", ignore_errors=True)
                        _clear(folder)

    def say(self, key: str, text: str) -> str:
        """Tell whoever drives a run at this moment something about a stage; returns the line."""
        line = f"stage {short(key)}: {text}"
        with contextlib.suppress(OSError), (self.root / SAID).open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        return line

    def said(self, after: int) -> tuple[list[str], int]:
        """What any process said of damage after the first `after` bytes of the log, and how long it is now."""
        try:
            raw = (self.root / SAID).read_bytes()[after:]
        except OSError:
            return [], after
        whole = raw[: raw.rfind(b"\n") + 1]
        return whole.decode(errors="replace").splitlines(), after + len(whole)

    def all_keys(self) -> list[str]:
        """All stages that have a directory, finished or not."""
        return sorted(path.name for path in self.root.glob("??/*") if path.is_dir())

    def remove(self, key: str) -> bool:
        """Delete a stage, finished or not, with all that its attempts left; False for one that is being computed."""
        if (self.folder(key) / LEASE).exists():
            return False
        with exclusively(self.folder(key)) as ours:
            if ours:
                (self.folder(key) / DONE).unlink(missing_ok=True)  # first: a half-deleted stage is not a finished one
                shutil.rmtree(self.folder(key))
            return ours

    def damaged(self, key: str) -> str | None:
        """The first file of a finished stage that is not what was published; none where all are."""
        try:
            files: dict[str, str] = self.done(key)["files"]
        except (OSError, ValueError, KeyError):
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
            with contextlib.suppress(Exception):  # the driver tells at its end what the mirror lacks
                Mirror(context.mirror).upload(store, spec.key)
    finally:
        claim.release()
    return store.result(spec.key)


def _attempt(spec: Any, spec_json: str, store: Store, folder: Path, context: RunContext, claim: Claim) -> None:
    if context.stopping():
        raise Stopped("the run was asked to stop before this stage began")
    _check_inputs(spec, store)
    from orchestrator.distill.stage import run_stage  # torch: only where a stage is computed
    from orchestrator.run.distributed import run_on_ranks

    out, work = folder / f"out-{uuid.uuid4().hex[:8]}", folder / "work"  # `out` is this attempt's alone
    began, busy = time.monotonic(), time.process_time()
    try:
        write_text(folder / "spec.json", spec_json)
        (folder / FAILURE).unlink(missing_ok=True)
        before = store.attempt(spec.key)
        if before is None:  # a directory deleted under its worker may have a checkpoint again, without its history
            shutil.rmtree(work, ignore_errors=True)
        number = (before or {}).get("number", 0) + 1
        told = {"pid": os.getpid(), "host": platform.node(), "started": time.time(), "number": number}
        write_json(folder / ATTEMPT, told)
        _clear(folder)
        out.mkdir()
        work.mkdir(exist_ok=True)
        inputs = {role: store.artefacts(key) for role, key in spec.parents.items()}
        run = run_stage if spec.world_size == 1 else run_on_ranks
        result = run(spec, Workplace(inputs, work, folder, out, context, partial(store.say, spec.key)))
        if claim.lost():
            raise ClaimLost(f"stage {short(spec.key)} was taken over by another process")
        _publish(spec, folder, out, result, began, busy)
    except (Stopped, Disturbed, ClaimLost):
        raise
    except Exception as error:
        if claim.lost():
            raise ClaimLost(f"stage {short(spec.key)} was taken over by another process") from error
        shutil.rmtree(out, ignore_errors=True)  # first: it may be what fills the disk
        _check_inputs(spec, store)
        _tell_failure(spec, store, folder, error)
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what attempts that died were writing."""
    for left in folder.glob("out-*"):
        shutil.rmtree(left, ignore_errors=True)
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def _tell_failure(spec: Any, store: Store, folder: Path, error: Exception) -> None:
    """Write why a stage failed; raises what is to be told instead where the disk is to blame, not the stage."""
    trouble = _storage_trouble(error, store)
    if trouble is None and not (folder / ATTEMPT).is_file():
        raise Disturbed(f"the directory of stage {short(spec.key)} was deleted under it") from error
    told = error if trouble is None else StoreError(trouble)
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        write_json(folder / FAILURE, {"error": f"{type(told).__name__}: {told}", "traceback": text})
    if told is not error:
        raise told from error


def _check_inputs(spec: Any, store: Store) -> None:
    """Raise `Disturbed` unless every parent is finished and has the bytes that it published."""
    said = store.withdraw_damaged(spec.parents.values())
    lacking = [short(key) for key in spec.parents.values() if not store.finished(key)]
    if lacking:
        raise Disturbed(f"stage {short(spec.key)} lacks {', '.join(lacking)}: {'; '.join(said) or 'not finished'}")


def _storage_trouble(error: BaseException, store: Store) -> str | None:
    """What to tell where an error says that the store's file system is full or read-only; None for other errors."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    told = " ".join(map(str, causes))  # compiled libraries tell the number in their message only
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "(os error 28)" in told or " requested and " in told:
        largest = max((tree_bytes(store.folder(key)) for key in store.all_keys()), default=0)
        megabytes = 2 * largest // 2**20 + 1
        return f"no space left on {store.root}: free {megabytes} MB, then run the same command"
    if errno.EROFS in numbers or "(os error 30)" in told:
        return f"the store {store.root} has become read-only: make it writable, then run the same command"
    return None


def _publish(spec: Any, folder: Path, out: Path, result: dict[str, Any], began: float, busy: float) -> None:
    if not (folder / ATTEMPT).is_file():
        raise Disturbed(f"the directory of stage {short(spec.key)} was deleted under it")
    fsync_tree(out)
    artefacts = folder / "artefacts"
    shutil.rmtree(artefacts, ignore_errors=True)
    out.rename(artefacts)
    files = sorted(path for path in artefacts.rglob("*") if path.is_file())
    manifest = {
        "key": spec.key,
        "kind": spec.kind,
        "result": result,
        "seconds": time.monotonic() - began,
        "core_seconds": time.process_time() - busy,
        "finished": time.time(),
        "files": {path.relative_to(artefacts).as_posix(): sha256_file(path) for path in files},
    }
    write_json(folder / DONE, sealed(manifest))
    shutil.rmtree(folder / "work", ignore_errors=True)


def _maybe(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    return value
