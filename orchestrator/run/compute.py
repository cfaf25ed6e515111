"""A stage from its specification to its result in the store: claimed, computed from whole inputs, published at once.

Runs in the process that has the stage's cores. Invariant: nothing is published by a process that lost its claim, from
inputs that are not what their stages published, or in part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import os
import platform
import shutil
import time
import traceback
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext, Stopped, Workplace
from orchestrator.files import fsync_tree, sealed, sha256_file, share_tree, write_json, write_text
from orchestrator.run.claims import ATTEMPT, DONE, Claim, claim_of
from orchestrator.run.cluster import uses_device
from orchestrator.run.hardware import machine
from orchestrator.run.log import logged
from orchestrator.run.mirror import Mirror
from orchestrator.run.store import FAILURE, Store, StoreError, clear_torn, tree_bytes
from orchestrator.study.spec import short, spec_from_json


class Disturbed(RuntimeError):
    """An input of a stage was damaged, or its directory deleted, under it: the remedy is to compute that again."""


class StageClaimed(RuntimeError):
    """Another process computes the stage."""


class ClaimLost(RuntimeError):
    """The stage was taken over by another process while this one computed it."""


def compute(spec_json: str, context: RunContext, expired: str | None = None) -> dict[str, Any]:
    """Compute a stage unless it is finished, and return its result.

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
            number = (store.attempt(spec.key) or {}).get("number", 0) + 1
            with logged(folder, f"{spec.kind}, attempt {number}"):
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
    from orchestrator.distill.training.memory import peak_mb, reset_peak
    from orchestrator.run.distributed import run_on_ranks

    _keep_modules()
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
        write_json(folder / ATTEMPT, {**told, "claim": claim.told()})
        clear_torn(folder)
        out.mkdir()
        work.mkdir(exist_ok=True)
        inputs = {role: store.artefacts(key) for role, key in spec.parents.items()}
        run = run_stage if spec.world_size == 1 else run_on_ranks
        device = context.device if uses_device(spec) else "cpu"
        reset_peak(device)
        result = run(spec, Workplace(inputs, work, folder, out, context, partial(store.say, spec.key)))
        if claim.lost():
            raise ClaimLost(f"stage {short(spec.key)} was taken over by another process")
        here = spec.world_size == 1  # ranks compute elsewhere, and this process has none of their devices
        peak, on = peak_mb(device) if here else None, machine(device) if here or device == "cpu" else None
        _publish(spec, folder, out, result, Cost(began, busy, peak, on))
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


@functools.cache
def _keep_modules() -> None:
    """Let the garbage collector pass over what is imported by now, once for this process.

    Every stage ends with a collection. It looked at 600,000 objects of torch and transformers, which took a fifth of a
    second (a quarter of the processor time of `tests/run/small.yaml`, whose stages are small), and now at none of them.
    """
    gc.freeze()


def _tell_failure(spec: Any, store: Store, folder: Path, error: Exception) -> None:
    """Write why a stage failed; raises what is to be told instead where the disk is to blame, not the stage."""
    trouble = _storage_trouble(error, store)
    if trouble is None and not (folder / ATTEMPT).is_file():
        raise Disturbed(f"the directory of stage {short(spec.key)} was deleted under it") from error
    told = error if trouble is None else StoreError(trouble)
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        told_as = f"{type(told).__name__}: {told}"
        write_json(folder / FAILURE, {"error": told_as, "traceback": text, "time": time.time()})
    if told is not error:
        raise told from error


def _check_inputs(spec: Any, store: Store) -> None:
    """Raise `Disturbed` unless every parent is finished and has the bytes that it published."""
    said = store.withdraw_damaged(spec.parents.values(), needed=True)
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


@dataclasses.dataclass(frozen=True)
class Cost:
    """When an attempt began, by the clock and in seconds of its process, the most memory that one process took, and
    what it computed with."""

    began: float
    busy: float
    peak_mb: float | None
    machine: str | None


def _publish(spec: Any, folder: Path, out: Path, result: dict[str, Any], cost: Cost) -> None:
    if not (folder / ATTEMPT).is_file():
        raise Disturbed(f"the directory of stage {short(spec.key)} was deleted under it")
    share_tree(out)
    fsync_tree(out)
    artefacts = folder / "artefacts"
    shutil.rmtree(artefacts, ignore_errors=True)
    out.rename(artefacts)
    files = sorted(path for path in artefacts.rglob("*") if path.is_file())
    manifest = {
        "key": spec.key,
        "kind": spec.kind,
        "result": result,
        "seconds": time.monotonic() - cost.began,
        "core_seconds": time.process_time() - cost.busy,
        "peak_mb": cost.peak_mb,
        "machine": cost.machine,
        "finished": time.time(),
        "files": {path.relative_to(artefacts).as_posix(): sha256_file(path) for path in files},
    }
    write_json(folder / DONE, sealed(manifest))
    shutil.rmtree(folder / "work", ignore_errors=True)
