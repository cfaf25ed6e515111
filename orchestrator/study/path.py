"""A path of students as a rule: what was measured so far -> its next stage, "not known yet", or its end.

Pure functions of a study and of results: whoever walks a path with the same results finds the same stages, so a run
that was killed makes no decision again. A fixed order is the rule that asks for nothing. Invariant: what a path is, is
known by its stages' keys alone; ways that come to the same layers share them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from operators.config import OperatorConfig
from orchestrator.study.choosing import Gate
from orchestrator.study.decision import Chooser, Decision
from orchestrator.study.loader import StudyError
from orchestrator.study.placing import PerLayer, operator_of, placing
from orchestrator.study.recipe import Phase
from orchestrator.study.schedule import free_layers, swap_order
from orchestrator.study.schema import Study
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import DistilSpec, Solve, Spec, ThroughputSpec
from orchestrator.study.stages import (
    Outcome,
    Roots,
    Step,
    check_shares,
    evaluation_of,
    phase_of,
    probes_of,
    text_windows,
)

Results = Callable[[str], Mapping[str, Any] | None]  # the result of a finished stage by its key
Speed = Callable[[Step], ThroughputSpec]


def nothing_known(_: str) -> None:
    """The results before anything runs."""


@dataclasses.dataclass(frozen=True)
class Path:
    """The stages of a path as far as results tell them."""

    steps: tuple[Step, ...]
    decisions: tuple[Decision, ...] = ()  # that it rests on, the last of them perhaps not made yet
    measured: tuple[ThroughputSpec, ...] = ()  # speeds that it rests on
    waits: str | None = None  # key of the stage whose result says how it goes on; none: it is whole
    rest: int = 0  # stages that may still come, at most
    most: int = 0  # tokens that it trains on in all, at most

    @property
    def specs(self) -> Iterator[Spec]:
        """What is computed for its decisions beside its stages, parents first."""
        for decision in self.decisions:
            yield from (*decision.needs, decision.spec)
        yield from self.measured


class _NotKnown(Exception):
    """A result that the path needs is not there yet."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclasses.dataclass
class _At:
    """Where a path stands: the student so far."""

    parent: str
    swapped: tuple[int, ...] = ()
    sequences: int = 0  # of the text, read so far


def path_of(study: Study, roots: Roots, resolved: Resolved, results: Results, speed: Speed) -> Path:
    """The stages from the teacher to the last student, as far as `results` tell them."""
    return _Walk(study, roots, resolved, results, speed).path()


class _Walk:
    """One walk along a path."""

    def __init__(self, study: Study, roots: Roots, resolved: Resolved, results: Results, speed: Speed) -> None:
        self.study, self.roots, self.results, self.speed = study, roots, results, speed
        self.gate: Gate | None = study.schedule.gate
        self.at = _At(roots.teacher.key)
        self.steps: list[Step] = []
        self.measured: list[ThroughputSpec] = []
        self.kept = set(study.schedule.keep)
        self.chosen: dict[int, int] = {}  # by layer which of the study's operators
        self.more = 0  # times that the gate may still extend the last stage
        self.fixed: list[tuple[int, ...]] | None = None
        self.chooser: Chooser | None = None
        choice = study.schedule.choice
        if choice is None:
            self.fixed = swap_order(study, resolved.architecture.layers, resolved.sites)
            self.until = None
        else:
            self.free = free_layers(study, resolved.architecture.layers, resolved.sites)
            self.chooser, self.until = Chooser(study, choice, roots), choice.until
        check_shares(study.recipe.batch_size, study, "recipe.batch_size")

    def path(self) -> Path:
        """Walk as far as results reach."""
        waits = None
        try:
            self._stages()
        except _NotKnown as unknown:
            waits = unknown.key
        decisions = () if self.chooser is None else tuple(self.chooser.decisions)
        rest = [] if waits is None else self._rest()
        read = self.steps[-1].tokens if self.steps else 0
        most = read + sum(self._tokens(phases, layers) for phases, layers in rest)
        return Path(tuple(self.steps), decisions, tuple(self.measured), waits, len(rest), most)

    def _stages(self) -> None:
        recipe = self.study.recipe
        trained = bool(recipe.phases)  # else the joint stage is the only one, and swaps as well
        picked: list[int] = []
        while layers := self._next(picked):
            picked += layers
            if trained and not self._stage(layers):
                break
        if recipe.joint:
            everything = self.at.swapped if trained else tuple(sorted(picked))
            if everything:
                self._train(everything, recipe.joint, joint=True)

    def _next(self, picked: list[int]) -> tuple[int, ...]:
        """The layers of the next stage; none at the end."""
        if self.chooser is None:
            assert self.fixed is not None
            left = [tuple(layer for layer in stage if layer not in self.kept) for stage in self.fixed]
            return next((stage for stage in left if stage and not set(stage) & set(picked)), ())
        free = [layer for layer in self.free if layer not in self.kept and layer not in picked]
        until = self.until
        there = len(picked) - len(self.kept.intersection(picked))
        most = len(free) if until is None or until.layers is None else min(len(free), until.layers - there)
        if self.chooser.choice.solver == "exact":
            most = len(free)  # of those that are chosen
        elif until is not None and until.decode is not None and most > 0 and self._fast(until.decode):
            return ()
        if most <= 0:
            return ()
        asks = isinstance(self.study.operator, tuple) or self.chooser.choice.solver == "exact"
        count = min(most, self.chooser.choice.take)
        next_ = tuple(sorted(free[:count]))
        if self.chooser.choice.layers is not None or (len(free) == len(next_) and not asks):  # nothing to choose
            return next_
        swapped = tuple(layer for layer in picked if layer not in self.kept)
        operators = {layer: self._operator(layer) for layer in swapped}
        decision = self.chooser.decide(self.at.parent, operators, tuple(free), self.at.sequences, self._solve)
        told = self._known(decision.spec.key)
        order = [int(layer) for layer in told["order"]]
        next_ = tuple(sorted([layer for layer in order if layer in free][:count]))
        self.chosen |= {layer: int(told.get("operators", {}).get(str(layer), 0)) for layer in next_}
        return next_

    def _solve(self, decision: Decision) -> Solve:
        """What an exact choice is to solve, by the speeds of its candidates, each swapped alone."""
        assert self.chooser is not None and self.until is not None
        scores = {spec.key: spec for spec in decision.needs}
        specs = []
        for each in decision.spec.candidates:
            placed = operator_of(self.chooser.operators[each.operator], each.layer)
            evaluate = evaluation_of(self.study, self.roots, each.score)
            specs.append(self.speed(Step(scores[each.score], evaluate, (each.layer,), 0, placed=placed)))
        self.measured += specs
        told, length = [self._known(spec.key) for spec in specs], str(max(self.study.throughput.lengths))
        teacher = [1.0 / result["teacher_decode_tokens_per_s"][length] for result in told]
        student = [1.0 / result["decode_tokens_per_s"][length] for result in told]
        added = tuple(own - whole for own, whole in zip(student, teacher, strict=True))
        until = self.until
        return Solve(decode=until.decode, layers=until.layers, seconds=statistics.median(teacher), added=added)

    def _operator(self, layer: int) -> OperatorConfig:
        """What a layer is swapped by."""
        operator = self.study.operator
        return operator_of(operator[self.chosen[layer]] if isinstance(operator, tuple) else operator, layer)

    def _placed(self, layers: tuple[int, ...]) -> OperatorConfig | PerLayer:
        return placing({layer: self._operator(layer) for layer in layers})

    def _fast(self, ratio: float) -> bool:
        """Whether the student so far decodes so much faster than its teacher."""
        last = next((step for step in reversed(self.steps) if step.outcome == "kept"), None)
        if last is None:
            return False
        spec = self.speed(last)
        self.measured.append(spec)
        told = self._known(spec.key)["decode_ratio"]
        return float(told[str(max(self.study.throughput.lengths))]) >= ratio

    def _stage(self, layers: tuple[int, ...]) -> bool:
        """A stage and what its gate makes of it; returns whether the path goes on."""
        before, first = dataclasses.replace(self.at), len(self.steps)
        self._train(layers, self.study.recipe.phases)
        good = self._good(layers)
        if good == "given_back":
            self.steps[first:] = [dataclasses.replace(step, outcome="given_back") for step in self.steps[first:]]
            self.at = before
            self.kept |= set(layers)
        elif good == "last" or self._over():
            self._mark("last")
            return False
        return True

    def _good(self, layers: tuple[int, ...]) -> Outcome:
        if self.gate is None:
            return "kept"
        for left in range(self.gate.extend, 0, -1):
            self.more = left
            if self._ratio() <= self.gate.ratio:
                self.more = 0
                return "kept"
            self._mark("extended")
            self._train(layers, self.study.recipe.phases)
        self.more = 0
        if self._ratio() <= self.gate.ratio or self.gate.otherwise == "keep":
            return "kept"
        return "given_back" if self.gate.otherwise == "roll_back" else "last"

    def _over(self) -> bool:
        """Whether the path ends since its student is as far from its teacher as it may be."""
        limit = None if self.until is None else self.until.ratio
        return limit is not None and self._ratio() > limit

    def _ratio(self) -> float:
        return float(self._known(self.steps[-1].evaluate.key)["perplexity_ratio"])

    def _mark(self, outcome: Outcome) -> None:
        self.steps[-1] = dataclasses.replace(self.steps[-1], outcome=outcome)

    def _known(self, key: str) -> Mapping[str, Any]:
        result = self.results(key)
        if result is None:
            raise _NotKnown(key)
        return result

    def _train(self, trained: tuple[int, ...], phases: tuple[Phase, ...], joint: bool = False) -> None:
        """A stage more, from the student so far."""
        study, roots, at = self.study, self.roots, self.at
        new = tuple(layer for layer in trained if layer not in at.swapped)
        key = "recipe.joint" if joint else "recipe.phases"
        planned = tuple(phase_of(phase, len(trained), study, f"{key}.{i}") for i, phase in enumerate(phases))
        spec = DistilSpec(
            tokens=roots.tokens.key, teacher=roots.teacher.key, parent=at.parent, layers=trained, new_layers=new,
            operator=self._placed(trained), phases=planned, batch_size=study.recipe.batch_size,
            sequence_length=study.data.sequence_length, first_sequence=at.sequences, freeze=study.recipe.freeze,
            optimizer=study.recipe.optimizer.canonical, numerics=study.numerics, processor=roots.device,
            checkpoint_activations=study.recipe.checkpoint_activations, text_windows=text_windows(study),
            seed=study.seed,
        )  # fmt: skip
        read = at.sequences + study.recipe.batch_size * sum(phase.steps for phase in planned)
        self.at = _At(spec.key, tuple(sorted({*at.swapped, *trained})), read)
        asked = (study, roots, spec.key)
        tokens = read * study.data.sequence_length
        swapped = self.at.swapped
        step = Step(spec, evaluation_of(*asked), swapped, tokens, joint, probes_of(*asked))
        self.steps.append(dataclasses.replace(step, placed=self._placed(swapped)))

    def _rest(self) -> list[tuple[tuple[Phase, ...], int]]:
        """Stages that may still come, at most: their phases and how many layers they train."""
        recipe = self.study.recipe
        if self.chooser is None:
            assert self.fixed is not None
            sizes = [len(set(stage) - self.kept - set(self.at.swapped)) for stage in self.fixed]
        else:
            left = len([layer for layer in self.free if layer not in self.kept and layer not in self.at.swapped])
            if self.until is not None and self.until.layers is not None:
                left = min(left, max(0, self.until.layers - len(self.at.swapped)))
            take = self.chooser.choice.take
            sizes = [min(take, left - start) for start in range(0, left, take)]
        each = 1 + (0 if self.gate is None else self.gate.extend)
        last = len(getattr(self.steps[-1].train, "layers", ())) if self.steps else 0
        again = [(recipe.phases, last)] * self.more
        stages = [(recipe.phases, size) for size in sizes if size and recipe.phases for _ in range(each)]
        joint = [(recipe.joint, len(self.at.swapped) + sum(sizes))] if recipe.joint else []
        return [*again, *stages, *joint]

    def _tokens(self, phases: tuple[Phase, ...], layers: int) -> int:
        """That a stage with these phases trains on."""
        planned = [phase_of(phase, layers, self.study, "recipe") for phase in phases]
        return self.study.recipe.batch_size * self.study.data.sequence_length * sum(phase.steps for phase in planned)


def check_rule(study: Study) -> None:
    """What a rule needs of the recipe. Raises `StudyError`, which begins with the key at fault."""
    choice = study.schedule.choice
    until = None if choice is None else choice.until
    exact = choice is not None and choice.solver == "exact"
    asks = {
        "gate": study.schedule.gate is not None,
        "choice.rerank": choice is not None and choice.rerank == "every_stage",
        "choice.until": until is not None and until.layers is None and (not exact or until.ratio is not None),
    }
    for key, there in asks.items():
        if there and not study.recipe.phases:
            raise StudyError(f"schedule.{key}: looks at students of stages, and recipe.phases has none: add a phase")
