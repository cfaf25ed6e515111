"""What interrupted runs left in a home and on this machine, and what to do about each piece.

Place in the flow: beside everything; looks at the store, the MLflow database, temporary directories and processes.
Invariant: looking changes nothing; a fix touches nothing that was published and nothing of a process that lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from orchestrator.files import below
from orchestrator.record.home import Home
from orchestrator.record.task_results import task_stages
from orchestrator.run.claims import LOOK_SECONDS, lease_of
from orchestrator.run.lock import exclusively
from orchestrator.run.store import Store
from orchestrator.run.temporary import abandoned_directories
from orchestrator.study.spec import TasksSpec, short

MARKS = ("stop-*", ".seen-*")  # in the store: to end training, and to be seen by the nodes of a cluster
SETTLED_SECONDS = 60.0  # what is younger may belong to a process that is about to take its lock
BY_FIX = "`layerswap doctor --fix` removes it"
PATIENCE_SECONDS = 3.0  # for a process to end by itself after it was asked to


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing: what it is, what to do about it, and how, where that is surely safe."""

    what: str
    remedy: str
    fix: Callable[[], None] | None = None
    healthy: bool = False  # told, but nothing is wrong


def examine(home: Home, needed: set[str] | None) -> list[Finding]:
    """Everything found; `needed` are the stages of the study that the user named, if any."""
    found = list(_machine())
    store = Store(home.store, write=False)
    if not store.root.is_dir():
        return [Finding(f"{home.root} holds no store yet", "run a study, or give another --home", healthy=True), *found]
    asked = {spec.key: spec for spec in task_stages(store)}
    states = store.states(store.all_keys())
    for key, state in states.items():
        again = _again(key, needed) if key not in asked else _asked_again(asked[key])
        found += _left_lease(store, key) if state == "left" else ()
        found += _stage(store, key, state == "held", again)
    found += _torn_files(store.root, home.root)
    nobody = not home.used and "held" not in states.values()
    return [*found, *(_marks(store.root) if nobody else ()), *(_zombies(home) if nobody else ())]


def doctor_text(found: list[Finding], fix: bool) -> tuple[str, int]:
    """What to print, and the exit code: 0 where nothing needs attention (any more). Fixes first where asked."""
    lines, left, fixable = [], 0, 0
    for finding in found:
        done = fix and finding.fix is not None
        if done and finding.fix is not None:
            finding.fix()
        left += not (finding.healthy or done)
        fixable += finding.fix is not None and not done
        lines.append(f"{'fixed ' if done else '  ok  ' if finding.healthy else 'look  '}{finding.what}")
        lines += [] if done else [f"      -> {finding.remedy}"]
    lines.append(f"{left} need attention" if left else "healthy")
    if fixable:
        lines.append(f"layerswap doctor --fix clears {fixable} of them; nothing that was published is touched")
    return "\n".join(lines), 1 if left else 0


def _left_lease(store: Store, key: str) -> Iterator[Finding]:
    """The lease of a holder that died: its stage goes on at once, but another machine waits for its time to be over."""

    def fix() -> None:
        lease = lease_of(store.folder(key))
        if lease is not None:
            while lease.look() is None:
                time.sleep(LOOK_SECONDS)
            lease.clear()

    yield Finding(f"stage {short(key)} has a lease that {_who(store, key)} does not renew any more", BY_FIX, fix)


def _who(store: Store, key: str) -> str:
    attempt = store.attempt(key) or {}
    return f"process {attempt.get('pid', '?')} on {attempt.get('host', '?')}"


def _stage(store: Store, key: str, held: bool, again: str) -> Iterator[Finding]:
    folder, name = store.folder(key), f"stage {short(key)}"
    attempt, who = store.attempt(key) or {}, _who(store, key)
    if held:
        yield Finding(f"{name} is being computed by {who}", "nothing to do", healthy=True)
        return
    if not (folder / "spec.json").is_file():
        if _settled(folder):
            yield Finding(f"{name} has a directory without spec.json: torn", BY_FIX, _locked(store, key, folder))
        return
    leftovers = [path for path in (*sorted(folder.glob("out*")), *_work(store, key)) if path.is_dir()]
    for path in leftovers:
        yield Finding(f"{name} left {path.name}/, which nobody reads", BY_FIX, _locked(store, key, path))
    if store.finished(key):
        damaged = store.damaged(key)
        if damaged is not None:
            yield Finding(f"{name} is finished but its {damaged} is damaged or gone", again)
    elif attempt and store.failure(key) is None and not _alive(attempt):
        yield Finding(f"{name} was begun by {who}, which is dead", again)


def _work(store: Store, key: str) -> list[Path]:
    """The checkpoints of a finished stage; those of an unfinished one are what its next attempt goes on from."""
    return [store.folder(key) / "work"] if store.finished(key) else []


def _again(key: str, needed: set[str] | None) -> str:
    gone = "`layerswap gc STUDY... --delete` frees what no study needs"
    if needed is None:
        return f"run its study again, which goes on from what is whole; {gone}"
    return "`layerswap run` of this study goes on from what is whole" if key in needed else f"not of this study: {gone}"


def _asked_again(spec: TasksSpec) -> str:
    return f"`layerswap evaluate` with --tasks {spec.task} asks it again"


def _torn_files(*roots: Path) -> Iterator[Finding]:
    """Temporary names of files and directories whose writer died between writing and renaming."""
    seen: set[Path] = set()
    for path in sorted(path for root in roots for path in below(root) if path.match(".*.tmp")):
        if path not in seen and not any(parent in seen for parent in path.parents) and _settled(path):
            yield Finding(f"{path} was not written to its end", BY_FIX, lambda path=path: _remove(path))  # type: ignore[misc]
        seen.add(path)


def _marks(store: Path) -> Iterator[Finding]:
    """Files by which a run tells its processes something, of runs that are over."""
    for path in sorted(path for kind in MARKS for path in store.glob(kind) if _settled(path)):
        yield Finding(f"{path} was left by a dead run", BY_FIX, lambda path=path: _remove(path))  # type: ignore[misc]


def _zombies(home: Home) -> Iterator[Finding]:
    """MLflow runs that say RUNNING, where nobody runs in this home."""
    if not home.database_file.is_file():
        return
    from orchestrator.record.tracking.client import (  # takes seconds, so only where there is a database
        AnotherVersionError,
        still_running,
    )

    try:
        running = list(still_running(home))
    except AnotherVersionError as error:
        what, _, remedy = str(error).partition(": ")
        yield Finding(f"MLflow: {what}", remedy)
        return
    except Exception as error:  # whatever MLflow raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield Finding(
            f"MLflow's database {home.database_file} cannot be read ({reason})",
            "move it away: `layerswap report STUDY` makes it again from the store",
        )
        return
    for name, run_id, end in running:
        yield Finding(
            f"MLflow run {name} ({run_id[:8]}) says RUNNING while nobody runs here",
            "run its study again, which takes it up, or `layerswap doctor --fix`, which marks it KILLED",
            end,
        )


def _machine() -> Iterator[Finding]:
    """Temporary directories of dead drivers, with the Ray processes that still live in them."""
    for folder in abandoned_directories():
        living = [process.pid for process in _inside(folder)]
        told = f", and processes {', '.join(map(str, living))} of it still run" if living else ""
        yield Finding(f"{folder} was left by a dead run{told}", BY_FIX, lambda folder=folder: _clear(folder))  # type: ignore[misc]


def _inside(folder: Path) -> list[psutil.Process]:
    """This user's processes that were started with the directory among their words."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            mine = process.uids().real == os.getuid() and process.pid != os.getpid()
            if mine and any(f"{folder}/" in word or word.endswith(str(folder)) for word in words):
                found.append(process)
    return found


def _clear(folder: Path) -> None:
    living = _inside(folder)
    for process in living:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, stubborn = psutil.wait_procs(living, timeout=PATIENCE_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _remove(folder)


def _locked(store: Store, key: str, path: Path) -> Callable[[], None]:
    """Remove a path of a stage unless somebody computes it by then."""

    def fix() -> None:
        with exclusively(store.folder(key)) as ours:
            if ours:
                _remove(path)

    return fix


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settled(path: Path) -> bool:
    try:
        return abs(time.time() - path.stat().st_mtime) > SETTLED_SECONDS
    except OSError:
        return False


def _alive(attempt: dict[str, Any]) -> bool:
    """Whether the process of an attempt may live: on another host nobody can say, so its lock alone tells."""
    if attempt.get("host") != platform.node():
        return False
    try:
        process = psutil.Process(int(attempt["pid"]))
        return bool(process.create_time() <= float(attempt["started"]) + 1.0)
    except (psutil.Error, KeyError, ValueError):
        return False
