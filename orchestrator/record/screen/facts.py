"""What a look at the store finds of a plan's stages: done, running, failed or waiting, with what is measured so far.

Place in the flow: `Look` reads; the time left and the tree on the screen are functions of what it found.
Invariant: looking changes nothing, and no comparison of clock times decides what is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Mapping
from typing import Any, Literal

import psutil

from orchestrator.distill.training.journal import NAME
from orchestrator.run.store import Store
from orchestrator.study.names import operator_name
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import Spec, ThroughputSpec
from orchestrator.study.stages import Step

State = Literal["waiting", "running", "done", "failed"]
TAIL = 1 << 16  # bytes of a long journal that are read, the last ones


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage as it was found."""

    state: State = "waiting"
    since: float = 0.0  # of a running one: when it was first seen so, on the clock of who looks
    seconds: float | None = None  # of a done one: that its only attempt took
    beside: float | None = None  # of them, those beside the training
    tokens: int = 0  # trained so far
    points: tuple[tuple[int, float], ...] = ()  # tokens trained and tokens a second up to there, as its journal tells
    heard: float = 0.0  # when the newest of them was first seen
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    memory_mb: float | None = None  # of the process of a running one, where it is on this machine
    fresh: bool = False  # begun since the first look
    attempt: int = 0  # of a failed one, which attempt that was
    error: str = ""


Facts = dict[str, Stage]  # by key


class Look:
    """Reads what the store holds of a plan, again and again; what cannot change any more is read once."""

    def __init__(self, store: Store, keys: Mapping[str, Spec]) -> None:
        self.store, self.keys = store, keys
        self.before = {key: store.attempt(key) for key in keys}  # attempts of earlier runs
        self.done_before = {key for key in keys if store.finished(key)}
        self.since: dict[str, tuple[Any, float]] = {}
        self.done: dict[str, Stage] = {}
        self.journals: dict[str, _Journal] = {}

    def add(self, keys: Mapping[str, Spec]) -> None:
        """Look for these stages from now on; those that are new are taken as they are now."""
        new = {key: spec for key, spec in keys.items() if key not in self.keys}
        self.before |= {key: self.store.attempt(key) for key in new}
        self.done_before |= {key for key in new if self.store.finished(key)}
        self.keys = keys

    def look(self, now: float) -> Facts:
        """What there is at this moment of a clock that only this object and its readers use."""
        return {key: self._stage(key, now) for key in self.keys}

    def _stage(self, key: str, now: float) -> Stage:
        if self.store.finished(key):
            if key not in self.done:
                self.done[key] = self._done(key, now)
            return self.done[key]
        self.done.pop(key, None)  # withdrawn, for it was damaged
        attempt, failure = self.store.attempt(key), self.store.failure(key)
        told = self._journal(key, now)
        begun = Stage(tokens=told.tokens, points=tuple(told.points), losses=told.losses, heard=told.heard)
        if attempt is None or attempt == self.before[key]:
            return begun
        number = int(attempt.get("number", 0))
        if failure is not None:
            error = str(failure.get("error", "gone"))
            return dataclasses.replace(begun, state="failed", fresh=True, attempt=number, error=error)
        if self.since.get(key, (None, 0.0))[0] != attempt:
            self.since[key] = (attempt, now)
        memory = None if self.keys[key].world_size > 1 else _memory_mb(attempt)
        return dataclasses.replace(
            begun, state="running", fresh=True, since=self.since[key][1], memory_mb=memory, attempt=number
        )

    def _done(self, key: str, now: float) -> Stage:
        try:
            manifest = self.store.done(key)
        except (OSError, ValueError):  # withdrawn at this moment, or damaged
            return Stage("done")
        told, fresh = self._journal(key, now), key not in self.done_before
        return done_stage(manifest, tuple(told.points), fresh)

    def _journal(self, key: str, now: float) -> _Journal:
        journal = self.journals.setdefault(key, _Journal())
        if hasattr(self.keys[key], "optimizer") and journal.read(self.store, key):
            journal.heard = now
        return journal


def done_stage(manifest: Mapping[str, Any], points: tuple[tuple[int, float], ...], fresh: bool) -> Stage:
    """A finished stage; one that was resumed has seconds of its last attempt only, which say nothing of the whole."""
    result, seconds = manifest["result"], manifest.get("seconds")
    if seconds is None or result.get("resumed_at"):
        return Stage("done", points=points, fresh=fresh)
    beside = max(0.0, seconds - (result.get("seconds") or 0.0)) if "tokens_per_s" in result else None
    return Stage("done", seconds=float(seconds), beside=beside, points=points, fresh=fresh)


class _Journal:
    """What a stage has told so far; `read` goes on where it was."""

    def __init__(self) -> None:
        self.at = 0
        self.heard = 0.0
        self.tokens = 0
        self.points: list[tuple[int, float]] = []
        self.losses: dict[str, float] = {}

    def read(self, store: Store, key: str) -> bool:
        """Take the new lines; returns whether there were any."""
        path = store.folder(key) / NAME
        try:
            size = path.stat().st_size
            if size < self.at:  # another one: the stage was removed and begun again
                self.at, self.tokens, self.points, self.losses = 0, 0, [], {}
            if size == self.at:
                return False
            with path.open("rb") as stream:
                self.at = max(self.at, size - TAIL)
                stream.seek(self.at)
                raw = stream.read(size - self.at)
        except OSError:  # none yet
            return False
        whole = raw[: raw.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                self._take(json.loads(line))
        return bool(whole)

    def _take(self, told: dict[str, Any]) -> None:
        metrics = told["metrics"]
        self.tokens = int(told["tokens"])
        if "tokens_per_s" in metrics:
            self.points.append((self.tokens, float(metrics["tokens_per_s"])))
        self.losses = {
            name.removeprefix("loss/"): value
            for name, value in metrics.items()
            if name.startswith("loss/") and "layer_" not in name
        }


def _memory_mb(attempt: Mapping[str, Any]) -> float | None:
    """Of the process of an attempt, if it is one of this machine."""
    if attempt.get("host") != platform.node():
        return None
    try:
        return float(psutil.Process(int(attempt["pid"])).memory_info().rss) / 2**20
    except (psutil.Error, KeyError, ValueError):
        return None


def distinct_steps(plan: Plan) -> dict[str, tuple[str, Step]]:
    """Key of every distinct trained stage -> a name for people and the step."""
    found: dict[str, tuple[str, Step]] = {plan.teacher.train.key: ("teacher", plan.teacher)}
    for trial in plan.trials:
        for index, step in enumerate(trial.steps):
            label = "joint" if step.joint else f"stage {place(trial, index)}"
            layers = ",".join(map(str, getattr(step.train, "layers", ())))
            found.setdefault(step.train.key, (f"{trial.name} {label} layers {layers}", step))
    for name, step in plan.controls.items():
        found.setdefault(step.train.key, (f"control {name}", step))
    return found


def stage_names(plan: Plan, speeds: Mapping[str, ThroughputSpec]) -> dict[str, str]:
    """All that may run or fail, by key, with names for people."""
    named = {plan.tokens.key: "text"}
    for key, (name, step) in distinct_steps(plan).items():
        named |= {key: name, step.evaluate.key: f"evaluation of {name}"}
        named |= {spec.key: f"probes of {name}" for spec in step.probed if spec.key not in named}
    for trial in plan.trials:
        for number, decision in enumerate(trial.path.decisions, 1):
            for spec in decision.needs:
                named.setdefault(spec.key, _scored(trial, number, spec))
            named.setdefault(decision.spec.key, f"{trial.name} choice {number}")
        named |= {spec.key: f"speed of {_architecture(spec)}" for spec in trial.path.measured}
    named |= {spec.key: f"draw {number}" for number, spec in enumerate(plan.drawing.rounds, 1)}
    return named | {spec.key: f"speed of {_architecture(spec)}" for spec in speeds.values()}


def place(trial: Trial, index: int) -> str:
    """A stage's number on its path, of how many where that is known from the start."""
    return f"{index + 1}" if trial.ruled else f"{index + 1}/{len(trial.steps)}"


def _scored(trial: Trial, number: int, spec: Any) -> str:
    layers = ",".join(map(str, spec.layers)) or "none"
    what = {"score": "score of", "distil": "preparation of", "blend": "blend of"}[spec.kind]
    several = isinstance(trial.study.operator, tuple) and bool(spec.layers)
    return f"{trial.name} choice {number}, {what} {f'{operator_name(spec.operator)} ' * several}layers {layers}"


def _architecture(spec: ThroughputSpec) -> str:
    layers = ",".join(map(str, spec.layers))
    return f"{operator_name(spec.operator)} layers {layers}" if spec.layers else "teacher"
