"""What must hold when a disturbed study has ended: everything the undisturbed one has, bit for bit, and nothing more.

Times, speeds and memory differ from run to run and are not compared; that they are there, and once, is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from orchestrator.files import sha256_file
from tests.chaos.scene import ESCAPED, Scene, read

TIMES = ("seconds", "tokens_per_s", "resumed_at", "said")  # of a stage's result
TIMED = ("tokens_per_s", "_ratio/", "train_ratio", "peak_mb")  # parts of the names of metrics that are measured times
CLOCKED = ("optuna.log",)  # artefacts that have clock times in them
Point = tuple[str, int, float | None]  # metric, step, value unless it is a measured time


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the undisturbed run left."""

    results: dict[str, Any]  # stage key -> result without times; None for measurements of speed
    files: dict[str, dict[str, str]]  # stage key -> digest of every artefact
    points: dict[str, Counter[Point]]  # identity of an MLflow run -> its points
    seconds: float


def remember(home: Path, seconds: float) -> Expected:
    """Read what a finished home holds, its own records included."""
    manifests = _manifests(home)
    return Expected(
        {key: _result(manifest) for key, manifest in manifests.items()},
        {key: _files(manifest) for key, manifest in manifests.items()},
        {identity: points for identity, (_, points) in _records(home / "mlflow.db").items()},
        seconds,
    )


def problems(scene: Scene, expected: Expected) -> list[str]:
    """Everything that is not as it must be, a line each; none is a pass."""
    return [
        *scene.wrong,
        *_wrong_stages(scene.home, expected),
        *_wrong_attempts(scene),
        *_wrong_records(scene.database, expected),
        *_leftovers(scene),
    ]


def _wrong_stages(home: Path, expected: Expected) -> list[str]:
    manifests = _manifests(home)
    told = [f"stage {key[:8]} is not finished" for key in expected.results.keys() - manifests.keys()]
    told += [f"stage {key[:8]} is nobody's" for key in manifests.keys() - expected.results.keys()]
    for key in manifests.keys() & expected.results.keys():
        name = f"{manifests[key]['kind']} {key[:8]}"
        if _result(manifests[key]) != expected.results[key]:
            told.append(f"{name} has another result than the undisturbed one")
        if _files(manifests[key]) != expected.files[key]:
            told.append(f"{name} has other artefacts than the undisturbed one")
        artefacts = home / "store" / key[:2] / key / "artefacts"
        for file, digest in manifests[key]["files"].items():
            path = artefacts / file
            if not path.is_file() or sha256_file(path) != digest:
                told.append(f"{name}: {file} is not what its manifest says")
    return told


def _wrong_attempts(scene: Scene) -> list[str]:
    """Stages that were computed more often than their interruptions explain."""
    told = []
    for stage in scene.stages():
        most = 1 + scene.allowed[stage.key]
        if stage.attempts > most:
            told.append(f"{stage} was computed {stage.attempts} times, {most} are explained")
    return told


def _wrong_records(database: Path, expected: Expected) -> list[str]:
    found = _records(database)
    told = [f"MLflow lacks the run {name[:14]}" for name in expected.points.keys() - found.keys()]
    told += [f"MLflow has a run too many, {name[:14]}" for name in found.keys() - expected.points.keys()]
    for name, (statuses, points) in found.items():
        if statuses != ["FINISHED"]:
            told.append(f"MLflow run {name[:14]} is {', '.join(statuses)}")
        if name == "study" or name not in expected.points:  # the study's own summary is one point a run
            continue
        lost, more = expected.points[name] - points, points - expected.points[name]
        if lost:
            told.append(f"MLflow run {name[:14]} lost {lost.total()} points: {_some(lost)}")
        if more:
            told.append(f"MLflow run {name[:14]} has {more.total()} points too many: {_some(more)}")
    return told


def _leftovers(scene: Scene) -> list[str]:
    """Torn directories of finished stages; temporary files, and what others cannot read or have written, anywhere in
    the home."""
    told = [f"{path.relative_to(scene.home)} was left" for path in scene.home.rglob(".*.tmp")]
    told += [f"{ESCAPED} was written by a mirror"] if (scene.home / ESCAPED).exists() else []
    for path in scene.home.rglob("*"):
        about = path.lstat()
        if about.st_uid != os.getuid():
            told.append(f"{path.relative_to(scene.home)} is user {about.st_uid}'s")
        if not about.st_mode & stat.S_IROTH:
            told.append(f"{path.relative_to(scene.home)} cannot be read by others")
    for stage in scene.stages():
        for path in [p for name in ("out-*", "work", "failure.json") for p in stage.folder.glob(name)]:
            if stage.done:
                told.append(f"{stage}: {path.name} was left")
    return told


def _manifests(home: Path) -> dict[str, dict[str, Any]]:
    found = {path.parent.name: read(path) for path in home.glob("store/??/*/DONE.json")}
    return {key: manifest for key, manifest in found.items() if manifest is not None}


def _files(manifest: dict[str, Any]) -> dict[str, str]:
    """Digests of its artefacts, but for what keeps clock times."""
    return {file: digest for file, digest in manifest["files"].items() if file not in CLOCKED}


def _result(manifest: dict[str, Any]) -> Any:
    if manifest["kind"] == "throughput":
        return None
    return {name: value for name, value in manifest["result"].items() if name not in TIMES}


def _records(database: Path) -> dict[str, tuple[list[str], Counter[Point]]]:
    """Identity of each MLflow run -> statuses of the runs that have it, and their points; runs that were deleted since
    they were there twice are not looked at."""
    if not database.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        names = dict(connection.execute("SELECT run_uuid, value FROM tags WHERE key = 'layerswap.id'").fetchall())
        there = "FROM runs WHERE lifecycle_stage = 'active'"
        statuses = connection.execute(f"SELECT run_uuid, status {there} ORDER BY run_uuid").fetchall()
        points = connection.execute(
            f"SELECT run_uuid, key, step, value FROM metrics WHERE run_uuid IN (SELECT run_uuid {there})"
        ).fetchall()
    found: dict[str, tuple[list[str], Counter[Point]]] = {}
    for run, status in statuses:
        found.setdefault(names.get(run, f"unnamed {run}"), ([], Counter()))[0].append(status)
    for run, key, step, value in points:
        timed = any(part in key for part in TIMED)
        found[names.get(run, f"unnamed {run}")][1][key, step, None if timed else value] += 1
    return found


def _some(points: Counter[Point]) -> str:
    return ", ".join(f"{name} at {step}" for name, step, _ in sorted(points, key=str)[:3])
