"""The store: stage key -> specification, journal, checkpoints, artefacts, result. The only truth about what is done.

    store/ab/<key>/spec.json          the specification, written first
                   lock               held by whoever computes the stage; the kernel releases it at any death
                   attempt.json       who computes it since when, and for which time; failure.json: why it failed
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.distill.context import RunContext, Workplace
from orchestrator.files import fsync_tree, read_json, sha256_file, write_json, write_text
from orchestrator.study.spec import short, spec_from_json

VERSION = "1"  # of the store's layout
DONE = "DONE.json"
ATTEMPT = "attempt.json"
FAILURE = "failure.json"


class StoreError(ValueError):
    """A directory that cannot be used as a store."""


class Store:
    """A directory of stages. Opening one creates it; `StoreError` where that is impossible."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store {root} cannot be made ({error.strerror}): give another --home") from error
        if not os.access(root, os.W_OK):
            raise StoreError(f"the store {root} cannot be written: give another --home")
        marker = root / "VERSION"
        if not marker.exists():
            write_text(marker, VERSION)
        elif marker.read_text() != VERSION:
            raise StoreError(
                f"the store {root} has layout {marker.read_text()!r}, this program writes {VERSION!r}: use the program "
                "that wrote it, or give another --home"
            )

    def folder(self, key: str) -> Path:
        """Where a stage lives."""
        return self.root / key[:2] / key

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
        """Whether somebody computes the stage at this moment."""
        folder = self.folder(key)
        if not folder.is_dir():
            return False
        lock = FileLock(folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def withdraw_damaged(self, keys: Iterable[str]) -> list[str]:
        """Let finished stages whose files are not what was published count as not finished; a line for each."""
        said = []
        for key in keys:
            if not self.finished(key):
                continue
            bad = self._damaged(key)
            if bad:
                (self.folder(key) / DONE).unlink()
                said.append(f"stage {short(key)}: {bad} is damaged or gone: the stage is computed again")
        return said

    def all_keys(self) -> list[str]:
        """All stages that have a directory, finished or not."""
        return sorted(path.parent.name for path in self.root.glob("??/*/spec.json"))

    def remove(self, key: str) -> int:
        """Delete a stage that nobody computes and return the bytes that it took; 0 for a locked one."""
        size = tree_bytes(self.folder(key))
        with contextlib.suppress(Timeout), FileLock(self.folder(key) / "lock", timeout=0):
            (self.folder(key) / DONE).unlink(missing_ok=True)  # first: a half-deleted stage is not a finished one
            shutil.rmtree(self.folder(key))
            return size
        return 0

    def _damaged(self, key: str) -> str | None:
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


def compute(spec_json: str, context: RunContext, *, wait: bool = True) -> dict[str, Any]:
    """Compute a stage unless it is finished, and return its result. Runs in the process that has the stage's cores.

    Two processes that ask for one stage wait for each other, or the later one raises `filelock.Timeout` at once where
    it must not `wait`; a process that died left a checkpoint to go on from.
    """
    spec = spec_from_json(spec_json)
    store = Store(Path(context.store))
    folder = store.folder(spec.key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=-1 if wait else 0):
        if not store.finished(spec.key):
            _attempt(spec, spec_json, store, folder, context)
    return store.result(spec.key)


def _attempt(spec: Any, spec_json: str, store: Store, folder: Path, context: RunContext) -> None:
    from orchestrator.distill.stage import run_stage  # torch: only where a stage is computed, and before its clock

    write_text(folder / "spec.json", spec_json)
    (folder / FAILURE).unlink(missing_ok=True)
    for torn in folder.glob(".*.tmp"):  # of a process that died while it wrote
        torn.unlink()
    began, busy = time.time(), time.process_time()
    number = (store.attempt(spec.key) or {}).get("number", 0) + 1
    write_json(folder / ATTEMPT, {"pid": os.getpid(), "host": platform.node(), "started": began, "number": number})
    out, work = folder / "out", folder / "work"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    work.mkdir(exist_ok=True)
    inputs = {role: store.artefacts(key) for role, key in spec.parents.items()}
    try:
        result = run_stage(spec, Workplace(inputs, work, folder, out, context))
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        write_json(folder / FAILURE, {"error": f"{type(error).__name__}: {error}", "traceback": text})
        raise
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
