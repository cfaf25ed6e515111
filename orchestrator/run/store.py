"""The store: stage key -> specification, journal, checkpoints, artefacts, result. The only truth about what is done.

    store/ab/<key>/spec.json          the specification, written first
                   lock               held by whoever computes the stage; the kernel releases it at any death
                   attempt.json       who computes it since when; failure.json: why the last attempt failed
                   work/step-000120/  checkpoints of an unfinished stage
                   journal.jsonl      its history
                   artefacts/         what it made
                   DONE.json          result and checksums; written last: without it nothing is done

Invariant: publishing is atomic and the first writer wins; stages are deterministic, so a second writer had the same.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.stage import run_stage
from orchestrator.files import fsync_tree, read_json, sha256_file, write_json, write_text
from orchestrator.study.spec import spec_from_json

DONE = "DONE.json"
ATTEMPT = "attempt.json"
FAILURE = "failure.json"


class Store:
    """A directory of stages. Opening one creates it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the store {root} cannot be made ({error.strerror}): give another --home") from error
        if not os.access(root, os.W_OK):
            raise ValueError(f"the store {root} cannot be written: give another --home")

    def folder(self, key: str) -> Path:
        """Where a stage lives."""
        return self.root / key[:2] / key

    def finished(self, key: str) -> bool:
        """Whether the stage's result is there."""
        return (self.folder(key) / DONE).is_file()

    def done(self, key: str) -> dict[str, Any]:
        """The manifest of a finished stage: `result`, `seconds`, `finished` (time), `files` with their digests."""
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

    def disk_bytes(self) -> int:
        """Bytes of all files in the store."""
        return sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file() and not p.is_symlink())


def compute(spec_json: str, context: RunContext) -> dict[str, Any]:
    """Compute a stage unless it is finished, and return its result. Runs in the process that has the stage's cores.

    Two processes that ask for one stage wait for each other; one that died left a checkpoint to go on from.
    """
    spec = spec_from_json(spec_json)
    store = Store(Path(context.store))
    folder = store.folder(spec.key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not store.finished(spec.key):
            _attempt(spec, spec_json, store, folder, context)
    return store.result(spec.key)


def _attempt(spec: Any, spec_json: str, store: Store, folder: Path, context: RunContext) -> None:
    write_text(folder / "spec.json", spec_json)
    (folder / FAILURE).unlink(missing_ok=True)
    began = time.time()
    write_json(folder / ATTEMPT, {"pid": os.getpid(), "host": platform.node(), "started": began})
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
    _publish(spec, folder, out, result, began)


def _publish(spec: Any, folder: Path, out: Path, result: dict[str, Any], began: float) -> None:
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
