"""Study + resolved sources + results so far -> the tree of stages, printable before anything runs.

A pure function: no clock, no files, no torch. Where results decide what comes next, a plan has the stages up to there
and says what it waits for; planned again with that result it has grown. Invariant: two trials that share a prefix of
values share its keys, so what is shared is computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from operators.config import SkipConfig
from orchestrator.study.checks import check_lengths, check_operator, check_swept_rates
from orchestrator.study.controls import controls_of
from orchestrator.study.drawing import Drawing, drawing_of
from orchestrator.study.explain import steps_of
from orchestrator.study.halving import Rung, rungs_of
from orchestrator.study.loader import Document, StudyError, with_values
from orchestrator.study.memory import stage_bytes
from orchestrator.study.model_sizes import Sizes, sizes_of
from orchestrator.study.names import operator_name
from orchestrator.study.path import Results, check_rule, nothing_known, path_of
from orchestrator.study.placing import by_layer
from orchestrator.study.schema import Study
from orchestrator.study.search import sample
from orchestrator.study.sources import Resolved
from orchestrator.study.space import Decode, Objective
from orchestrator.study.spec import (
    Device,
    DistilSpec,
    ScoreSpec,
    Spec,
    TeacherSpec,
    ThroughputSpec,
    TokensSpec,
)
from orchestrator.study.stages import (
    Step,
    evaluation_of,
    probes_of,
    roots_of,
    throughput_of,
)
from orchestrator.study.trial import Trial as Trial


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a process of a stage takes at most, in bytes."""

    name: str  # for people
    spec: Spec
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a study asks for, before anything runs."""

    study: Study
    tokens: TokensSpec
    teacher: Step
    controls: dict[str, Step]  # by name
    trials: tuple[Trial, ...]
    total_layers: int
    sizes: Sizes
    device: Device = "cpu"
    drawing: Drawing = dataclasses.field(default_factory=Drawing)

    @property
    def steps(self) -> Iterator[Step]:
        """Every step of the plan, shared ones as often as they are asked for."""
        yield self.teacher
        yield from self.controls.values()
        for trial in self.trials:
            yield from trial.steps

    @property
    def specs(self) -> dict[str, Spec]:
        """Distinct stages by key, parents before children."""
        first: list[Spec] = [self.teacher.train, self.tokens]
        if isinstance(self.teacher.train, TeacherSpec):
            first.reverse()
        rest = [
            (step.evaluate.of(step.evaluate.teacher), step.train, step.evaluate, *step.probed) for step in self.steps
        ]
        decided: list[Spec] = [spec for trial in self.trials for spec in trial.path.specs]
        decided += [*self.drawing.rounds, *self.drawing.measured]
        return parents_first([*first, *(spec for several in rest for spec in several), *decided])

    @property
    def waits(self) -> dict[str, list[str]]:
        """Keys of the stages whose results let the plan grow -> the trials that wait for them."""
        found: dict[str, list[str]] = {}
        for trial in self.trials:
            if trial.path.waits is not None:
                found.setdefault(trial.path.waits, []).append(trial.name)
        for key in self.drawing.waits:
            found.setdefault(key, []).append(f"trial-{len(self.trials):02d}")
        return found

    @property
    def names(self) -> list[str]:
        """Of all trials, those that are to be drawn yet among them."""
        return [f"trial-{number:02d}" for number in range(len(self.trials) + self.drawing.left)]

    @property
    def rest(self) -> int:
        """Stages that it may still grow by, at most."""
        return sum(trial.path.rest for trial in self.trials)

    @property
    def paths(self) -> dict[tuple[str, ...], list[Trial]]:
        """Keys of a path's trained stages -> the trials that have it: several where their values mean the same."""
        found: dict[tuple[str, ...], list[Trial]] = {}
        for trial in self.trials:
            key = tuple(step.train.key for step in trial.steps)
            found.setdefault((*key, trial.name) if trial.open else key, []).append(trial)
        return found

    @property
    def notes(self) -> list[str]:
        """What of the search is otherwise than it looks: fewer points than asked for, trials that are one path."""
        asked, there = self.study.search.trials, len(self.trials)
        fewer = [f"search.trials is {asked} and the space has {there} points: each is tried once"]
        there += self.drawing.left
        equal = [[trial.name for trial in several] for several in self.paths.values() if several[1:]]
        same = [f"{', '.join(names)} are one path, whose values mean the same: it is computed once" for names in equal]
        how = self.study.search.learning
        goals = " and ".join(map(_goal, how.objectives))
        later = [f"{self.drawing.left} trials are drawn at run time: {how.sampler}, {how.batch} at a time, by {goals}"]
        return (fewer if asked is not None and there < asked else []) + (later if self.drawing.left else []) + same

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Where early stopping compares trials; none without it."""
        stopping = self.study.search.early_stopping
        paths = {trial.name: trial.steps for trial in self.trials}
        return () if stopping is None else rungs_of(paths, stopping.grace_layers)

    def users(self) -> dict[str, list[str]]:
        """Key of each trained stage -> names of the trials that need it."""
        found: dict[str, list[str]] = {}
        for trial in self.trials:
            for step in trial.steps:
                found.setdefault(step.train.key, []).append(trial.name)
        return found


def make_plan(
    document: Document,
    study: Study,
    resolved: Resolved,
    device: Device = "cpu",
    results: Results = nothing_known,
    hardware: str = "",
) -> Plan:
    """Lay out all trials and controls of a study whose stages compute on `device`, as far as `results` decide them.

    `hardware` is what speeds are measured on that decide something.

    Raises `StudyError` where a point of the search space is no valid study, or asks for layers the teacher lacks.
    """
    check_lengths(document, study, resolved)
    with _placed(document):
        roots = roots_of(study, resolved, device)
    layers, teacher = resolved.architecture.layers, roots.teacher.key

    def made_of(index: int, values: dict[str, Any]) -> Trial:
        point, at = with_values(document, values)
        check_operator(at, point, resolved)
        with _placed(at):
            check_rule(point)
            speed = partial(throughput_of, study=point, teacher=teacher, hardware=hardware)
            first = path_of(point, roots, resolved, nothing_known, speed)
            path = first if first.waits is None else path_of(point, roots, resolved, results, speed)
        return Trial(f"trial-{index:02d}", values, point, path, first)

    speed = partial(throughput_of, study=study, teacher=teacher, hardware=hardware)
    drawing = drawing_of(study, results, speed, made_of)
    trials = [*(made_of(index, values) for index, values in enumerate(sample(study))), *drawing.trials]
    check_swept_rates(document, [(trial.study, trial.values) for trial in trials])
    evaluated, probes = evaluation_of(study, roots, teacher), probes_of(study, roots, teacher)
    root = Step(roots.teacher, evaluated, (), 0, probes=probes)
    controls = dict(controls_of(study, resolved, roots, trials, complete=not drawing.left))
    known = resolved.sizes or sizes_of(resolved.architecture)
    made = Plan(study, roots.tokens, root, controls, tuple(trials), layers, known, device, drawing)
    _check_stopping(document, made)
    return made


@dataclasses.dataclass(frozen=True)
class Planner:
    """All that a plan is a function of but for results: it may go to another process."""

    document: Document
    study: Study
    resolved: Resolved
    device: Device
    hardware: str

    def __call__(self, results: Results) -> Plan:
        """The plan with these results. Raises what `make_plan` does."""
        return make_plan(self.document, self.study, self.resolved, self.device, results, self.hardware)

    def speeds(self, plan: Plan) -> dict[str, ThroughputSpec]:
        """By the key of each trained stage of such a plan the measurement of its speed."""
        return throughput_specs(plan, self.hardware)

    def memory(self, plan: Plan, speeds: Mapping[str, ThroughputSpec], device: str) -> dict[str, int]:
        """By key, the bytes that a process takes at most of each stage of such a plan that holds a model."""
        return {key: memory.bytes for key, memory in stage_memory(plan, speeds, device).items()}


def _goal(objective: Objective) -> str:
    return f"decode at {objective.decode}" if isinstance(objective, Decode) else objective


def throughput_specs(plan: Plan, hardware: str) -> dict[str, ThroughputSpec]:
    """Train key of each step -> the speed measurement of its architecture; equal architectures share one."""
    return {step.train.key: throughput_of(step, plan.study, plan.teacher.train.key, hardware) for step in plan.steps}


def parents_first(specs: Iterable[Spec]) -> dict[str, Spec]:
    """By key, each after those of its parents that are among them; else in the order given."""
    given = {spec.key: spec for spec in specs}
    found: dict[str, Spec] = {}

    def add(spec: Spec) -> None:
        if spec.key not in found:
            for parent in spec.parents.values():
                if parent in given:
                    add(given[parent])
            found[spec.key] = spec

    for spec in given.values():
        add(spec)
    return found


def stage_memory(plan: Plan, speeds: Mapping[str, ThroughputSpec], device: str) -> dict[str, Memory]:
    """By key, what the stages of a plan that hold a model take; `speeds` are the measurements of its steps."""
    names = {plan.teacher.train.key: "the teacher", **{step.train.key: name for name, step in plan.controls.items()}}
    found: dict[str, Memory] = {}
    for step in plan.steps:
        placed = step.operator or SkipConfig()
        name = names.get(step.train.key, f"{operator_name(placed)} in layers {', '.join(map(str, step.swapped))}")
        operators = by_layer(placed, step.swapped)
        asked: dict[str, Spec | None] = {"": step.train, "evaluation of ": step.evaluate, "probes of ": step.probes}
        asked["speed of "] = speeds.get(step.train.key)
        for prefix, spec in asked.items():
            taken = None if spec is None else stage_bytes(spec, plan.sizes, operators, device, step.train)
            if spec is not None and taken is not None:
                found.setdefault(spec.key, Memory(f"{prefix}{name}", spec, taken))
    for spec in (spec for trial in plan.trials for spec in trial.path.specs):
        if isinstance(spec, ScoreSpec | DistilSpec):  # to score is to evaluate
            like = plan.teacher.evaluate if isinstance(spec, ScoreSpec) else spec
            taken = stage_bytes(like, plan.sizes, spec.layers, device, spec)
            what = f"{operator_name(spec.operator)} in layers {', '.join(map(str, spec.layers)) or 'none'}"
            if taken is not None:
                found.setdefault(spec.key, Memory(f"score of {what}" if like is not spec else what, spec, taken))
    return found


def _check_stopping(document: Document, made: Plan) -> None:
    stopping = made.study.search.early_stopping
    ruled = [trial.name for trial in made.trials if trial.ruled]
    if stopping is not None and ruled:
        raise StudyError(
            f"{document.place(('search', 'early_stopping'))}: search.early_stopping: compares students whose stages "
            f"are known before, and results decide those of {', '.join(ruled[:3])}: take it out, or schedule.choice "
            "and schedule.gate"
        )
    if stopping is not None and not made.rungs:
        raise StudyError(
            f"{document.place(('search', 'early_stopping'))}: search.early_stopping: can stop nothing: no two students "
            f"of {stopping.grace_layers} swapped layers or more have equally many of them after equally many trained "
            "tokens and stages left to save: take it out, lower grace_layers, or sweep what differs in earlier stages"
        )


@contextlib.contextmanager
def _placed(document: Document) -> Iterator[None]:
    """Errors that begin with a key get its place in the study file."""
    try:
        yield
    except StudyError as error:
        key = str(error).split(":")[0]
        raise StudyError(f"{document.place(tuple(steps_of(key)))}: {error}") from None
