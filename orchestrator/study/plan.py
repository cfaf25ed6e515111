"""Study + resolved sources -> the tree of stages, printable before anything runs.

A pure function: no clock, no files, no torch. Invariant: two trials that share a prefix of values share its keys, so
what is shared is computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from operators.config import HyenaConfig, SkipConfig, WindowConfig
from orchestrator.study.checks import check_lengths, check_operator, check_swept_rates
from orchestrator.study.explain import steps_of
from orchestrator.study.halving import Rung, rungs_of
from orchestrator.study.loader import Document, StudyError, with_values
from orchestrator.study.memory import stage_bytes
from orchestrator.study.model_sizes import Sizes, sizes_of
from orchestrator.study.schema import Study
from orchestrator.study.search import sample
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import (
    Device,
    DistilSpec,
    ImportSpec,
    ScratchSpec,
    Spec,
    TeacherSpec,
    ThroughputSpec,
    TokensSpec,
)
from orchestrator.study.stages import (
    Roots,
    Step,
    alone,
    evaluation_of,
    path_of,
    probes_of,
    roots_of,
    text_windows,
    whole,
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the search space: a path of stages from the teacher."""

    name: str
    values: dict[str, Any]
    study: Study
    steps: tuple[Step, ...]


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
        ordered = [*first, *(spec for several in rest for spec in several)]
        return {spec.key: spec for spec in ordered}

    @property
    def paths(self) -> dict[tuple[str, ...], list[Trial]]:
        """Keys of a path's trained stages -> the trials that have it: several where their values mean the same."""
        found: dict[tuple[str, ...], list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(tuple(step.train.key for step in trial.steps), []).append(trial)
        return found

    @property
    def notes(self) -> list[str]:
        """What of the search is otherwise than it looks: fewer points than asked for, trials that are one path."""
        asked, there = self.study.search.trials, len(self.trials)
        fewer = [f"search.trials is {asked} and the space has {there} points: each is tried once"]
        equal = [[trial.name for trial in several] for several in self.paths.values() if several[1:]]
        same = [f"{', '.join(names)} are one path, whose values mean the same: it is computed once" for names in equal]
        return (fewer if asked is not None and there < asked else []) + same

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


def make_plan(document: Document, study: Study, resolved: Resolved, device: Device = "cpu") -> Plan:
    """Lay out all trials and controls of a study whose stages compute on `device`.

    Raises `StudyError` where a point of the search space is no valid study, or asks for layers the teacher lacks.
    """
    check_lengths(document, study, resolved)
    with _placed(document):
        roots = roots_of(study, resolved, device)
    layers = resolved.architecture.layers
    trials = []
    for index, values in enumerate(sample(study)):
        point, at = with_values(document, values)
        check_operator(at, point, resolved)
        with _placed(at):
            steps = tuple(path_of(point, roots, resolved))
        trials.append(Trial(f"trial-{index:02d}", values, point, steps))
    check_swept_rates(document, [(trial.study, trial.values) for trial in trials])
    teacher, probes = roots.teacher, probes_of(study, roots, roots.teacher.key)
    root = Step(teacher, evaluation_of(study, roots, teacher.key), (), 0, probes=probes)
    controls = dict(_controls(study, resolved, roots, trials))
    known = resolved.sizes or sizes_of(resolved.architecture)
    made = Plan(study, roots.tokens, root, controls, tuple(trials), layers, known, device)
    _check_stopping(document, made)
    return made


def throughput_specs(plan: Plan, hardware: str) -> dict[str, ThroughputSpec]:
    """Train key of each step -> the speed measurement of its architecture; equal architectures share one."""
    found: dict[str, ThroughputSpec] = {}
    for step in plan.steps:
        operator = getattr(step.train, "operator", SkipConfig())
        if not isinstance(operator, SkipConfig):
            operator = dataclasses.replace(operator, init="random")  # speed does not depend on the weights
        # What trains nothing, such as a skipped layer, is measured as the study trains.
        student = step.train if isinstance(step.train, DistilSpec | ScratchSpec) and step.own_tokens else None
        rest_scale = (student.optimizer if student else plan.study.recipe.optimizer).rest_scale
        freeze = plan.study.recipe.freeze if student is None else getattr(student, "freeze", ())
        found[step.train.key] = ThroughputSpec(
            teacher=plan.teacher.train.key,
            operator=operator,
            layers=step.swapped,
            throughput=plan.study.throughput,
            train_batch_size=student.batch_size if student else plan.study.recipe.batch_size,
            sequence_length=plan.study.data.sequence_length,
            numerics=alone(student.numerics if student else plan.study.numerics),
            hardware=hardware,
            rest_trains=rest_scale > 0 or not step.swapped,
            freeze=tuple(sorted(set(freeze))) if step.swapped else (),
        )
    return found


def stage_memory(plan: Plan, speeds: Mapping[str, ThroughputSpec], device: str) -> dict[str, Memory]:
    """By key, what the stages of a plan that hold a model take; `speeds` are the measurements of its steps."""
    names = {plan.teacher.train.key: "the teacher", **{step.train.key: name for name, step in plan.controls.items()}}
    found: dict[str, Memory] = {}
    for step in plan.steps:
        operator = operator_name(getattr(step.train, "operator", SkipConfig()))
        name = names.get(step.train.key, f"{operator} in layers {', '.join(map(str, step.swapped))}")
        asked: dict[str, Spec | None] = {"": step.train, "evaluation of ": step.evaluate, "probes of ": step.probes}
        asked["speed of "] = speeds.get(step.train.key)
        for prefix, spec in asked.items():
            taken = None if spec is None else stage_bytes(spec, plan.sizes, step.swapped, device, step.train)
            if spec is not None and taken is not None:
                found.setdefault(spec.key, Memory(f"{prefix}{name}", spec, taken))
    return found


def _check_stopping(document: Document, made: Plan) -> None:
    stopping = made.study.search.early_stopping
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


def _controls(study: Study, resolved: Resolved, roots: Roots, trials: list[Trial]) -> Iterator[tuple[str, Step]]:
    tokens, teacher, optimizer = roots.tokens, roots.teacher, study.recipe.optimizer.canonical
    if study.controls.scratch != "none":
        names: set[str] = set()
        longest: dict[HyenaConfig | WindowConfig, Step] = {}
        for trial in trials:
            operator, last = trial.study.operator, trial.steps[-1]
            if study.controls.scratch == "own" and operator != study.operator:
                continue
            if not isinstance(operator, SkipConfig):
                bare = dataclasses.replace(operator, init="random")
                if bare not in longest or longest[bare].tokens < last.tokens:
                    longest[bare] = last
        for operator, last in longest.items():
            spec = ScratchSpec(
                tokens=tokens.key,
                teacher=teacher.key if isinstance(teacher, ImportSpec) else None,
                architecture=resolved.architecture,
                operator=operator,
                layers=last.swapped,
                token_budget=last.tokens,
                batch_size=study.recipe.batch_size,
                sequence_length=study.data.sequence_length,
                text_windows=text_windows(study),
                optimizer=optimizer.model_copy(update={"rest_scale": 1.0}),
                numerics=whole(study.numerics),
                processor=roots.device,
                checkpoint_activations=study.recipe.checkpoint_activations,
                seed=study.seed,
            )
            name = f"scratch {operator_name(operator)}"
            if name in names:
                name += f" {spec.key[:6]}"
            names.add(name)
            yield name, Step(spec, evaluation_of(study, roots, spec.key), last.swapped, last.tokens)
    if study.controls.skip:
        for skipped in [*((layer,) for layer in resolved.sites), resolved.sites]:
            name = f"skip {skipped[0]}" if len(skipped) == 1 else "skip all"
            skip = DistilSpec(
                tokens=tokens.key, teacher=teacher.key, parent=teacher.key, layers=skipped, new_layers=skipped,
                operator=SkipConfig(), phases=(), batch_size=1, sequence_length=study.data.sequence_length,
                first_sequence=0, freeze=(), optimizer=optimizer, numerics=alone(study.numerics),
                processor=roots.device, seed=0,
            )  # fmt: skip
            probes = probes_of(study, roots, skip.key) if skipped == resolved.sites else None
            yield name, Step(skip, evaluation_of(study, roots, skip.key), skipped, 0, probes=probes)


def operator_name(operator: Any) -> str:
    """A short name for people: `hyena-2` by order, `hyena-4h` by heads, `hyena-4h-power` with a feature map,
    `hyena-2-modal` with filters that are not implicit, `hyena-4h-power-w32` with a window, `window-64`, `skip`."""
    if isinstance(operator, WindowConfig):
        return f"window-{operator.window}"
    if not isinstance(operator, HyenaConfig):
        return str(operator.kind)
    shape = f"{operator.order}" if operator.heads is None else f"{operator.heads}h"
    features = "" if operator.feature_map == "identity" else f"-{operator.feature_map}"
    kind = "" if operator.filter.kind == "implicit" else f"-{operator.filter.kind}"
    return f"hyena-{shape}{features}{kind}" + ("" if operator.window is None else f"-w{operator.window}")
