"""A decision which layers go next, as stages: the score of every candidate, and the choice made of them.

Pure functions. Invariant: a decision's key comes from the student it is made at, the candidates, the score's settings
and the text, so equal decisions are one, and none is made twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from operators.config import OperatorConfig, SkipConfig
from orchestrator.study.choosing import Choice, Joint, Local, Probe
from orchestrator.study.placing import PerLayer, by_layer, placed_in, placing
from orchestrator.study.recipe import Losses
from orchestrator.study.schema import Study
from orchestrator.study.spec import (
    BlendSpec,
    Candidate,
    ChoiceSpec,
    DistilSpec,
    PhaseSpec,
    ScoreSpec,
    Solve,
    Spec,
)
from orchestrator.study.stages import Roots, alone, steps_of_tokens, text_windows

KEY = "schedule.choice"
Operators = Mapping[int, OperatorConfig]  # by layer


@dataclasses.dataclass(frozen=True)
class Decision:
    """A choice and what it needs."""

    spec: ChoiceSpec
    needs: tuple[Spec, ...]  # parents first, those of several candidates side by side
    candidates: tuple[int, ...]


Solving = Callable[[Decision], Solve]


class Chooser:
    """Lays out the decisions of a path; `decisions` are those it was asked for."""

    def __init__(self, study: Study, choice: Choice, roots: Roots) -> None:
        self.study, self.choice, self.roots = study, choice, roots
        self.decisions: list[Decision] = []

    @property
    def operators(self) -> tuple[OperatorConfig | PerLayer, ...]:
        """What a layer may be swapped by."""
        operator = self.study.operator
        return operator if isinstance(operator, tuple) else (operator,)

    def decide(
        self, student: str, swapped: Operators, candidates: tuple[int, ...], read: int, solve: Solving
    ) -> Decision:
        """The decision that the next stage rests on: of a path whose student has these layers swapped by these
        operators and has read so many sequences. `solve` gives what an exact choice is to solve."""
        teacher = self.roots.teacher.key
        match self.choice.rerank:
            case "once":
                decision = self.decisions[0] if self.decisions else self._at(teacher, {}, candidates, 0)
                if self.choice.solver == "exact" and not self.decisions:
                    spec = decision.spec.changed(solve=solve(decision))
                    decision = dataclasses.replace(decision, spec=spec)
            case "forward":
                decision = self._at(teacher, swapped, candidates, 0)
            case "every_stage":
                decision = self._at(student, {}, candidates, read)
        if decision not in self.decisions:
            self.decisions.append(decision)
        return decision

    def _at(self, subject: str, picked: Operators, candidates: tuple[int, ...], read: int) -> Decision:
        """At a student, beside whose layers the picked ones are swapped untrained."""
        choice = self.choice
        needs: list[Spec] = []
        prepared: dict[int, str] = {}
        if isinstance(choice.prepared, Local):
            for number, operator in enumerate(self.operators):
                everything = {**by_layer(operator, candidates), **picked}
                local = self._distilled(subject, everything, choice.prepared.local, Losses(mixer_mse=1.0), read)
                needs.append(local)
                prepared[number] = local.key
        if isinstance(choice.score, Joint):
            blend = self._blend(subject, candidates, choice.score.joint, prepared.get(0), read)
            spec = ChoiceSpec(subject=subject, blend=blend.key, seed=self.study.seed)
            return Decision(spec, (*needs, blend), candidates)
        scores: dict[tuple[int, int], ScoreSpec] = {}
        for layer in candidates:
            restored = choice.scored == "restored_alone"
            beside = tuple(other for other in candidates if other != layer) if restored else (layer,)
            for number, operator in enumerate(self.operators):
                placed = {**by_layer(operator, beside), **picked}
                if isinstance(choice.score, Probe):
                    probe = self._distilled(subject, placed, choice.score.probe, Losses(kl=1.0), read)
                    needs.append(probe)
                    scores[layer, number] = self._score(probe.key, {}, None)
                else:
                    scores[layer, number] = self._score(subject, placed, prepared.get(number))
        spec = ChoiceSpec(
            subject=subject,
            reference=self._reference.key,
            candidates=tuple(
                Candidate(layer=layer, operator=number, score=score.key) for (layer, number), score in scores.items()
            ),
            measure=choice.score if choice.score in ("loss", "hits") else "kl",
            ascending=choice.scored == "swapped_alone",
            seed=self.study.seed,
        )
        return Decision(spec, (*needs, self._reference, *scores.values()), candidates)

    @functools.cached_property
    def _reference(self) -> ScoreSpec:
        """The teacher's own score."""
        study, teacher = self.study, self.roots.teacher.key
        return ScoreSpec(
            tokens=self.roots.tokens.key,
            teacher=teacher,
            subject=teacher,
            layers=(),
            operator=SkipConfig(),
            sequence_length=study.data.sequence_length,
            text=self.choice.texts,
            reported=study.evaluation.tokens,
            batch_size=study.evaluation.batch_size,
            numerics=alone(study.numerics),
            processor=self.roots.device,
            seed=0,
        )

    def _score(self, subject: str, placed: Operators, prepared: str | None) -> ScoreSpec:
        layers, own = tuple(sorted(placed)), self.choice.score != "skip" and bool(placed)
        operator: Any = placing(placed) if own else SkipConfig()
        seed = self.study.seed if layers and not isinstance(operator, SkipConfig) else 0
        reference = self._reference.key
        more = {"operator": operator, "seed": seed, "prepared": prepared if layers else None}
        more["text_windows"] = text_windows(self.study) if own else None  # operators may start from training text
        return self._reference.of(subject, layers, reference, **more)

    def _distilled(self, subject: str, placed: Operators, tokens: int, losses: Losses, read: int) -> DistilSpec:
        """A student that is trained to be scored: its operators alone, by the recipe's optimizer."""
        layers = tuple(sorted(placed))
        study = self.study
        return DistilSpec(
            tokens=self.roots.tokens.key,
            teacher=self.roots.teacher.key,
            parent=subject,
            layers=layers,
            new_layers=layers,
            operator=placing(placed),
            phases=(PhaseSpec(losses=losses.canonical, steps=self._steps(tokens)),),
            batch_size=study.recipe.batch_size,
            sequence_length=study.data.sequence_length,
            first_sequence=read,
            text_windows=text_windows(study),
            freeze=(),
            checkpoint_activations=study.recipe.checkpoint_activations,
            optimizer=study.recipe.optimizer.canonical.model_copy(update={"rest_scale": 0.0}),
            numerics=study.numerics,
            processor=self.roots.device,
            seed=study.seed,
        )

    def _blend(
        self, subject: str, candidates: tuple[int, ...], tokens: int, prepared: str | None, read: int
    ) -> BlendSpec:
        study = self.study
        return BlendSpec(
            tokens=self.roots.tokens.key,
            teacher=self.roots.teacher.key,
            subject=subject,
            prepared=prepared,
            layers=candidates,
            operator=placed_in(self.operators[0], candidates),
            steps=self._steps(tokens),
            batch_size=study.recipe.batch_size,
            sequence_length=study.data.sequence_length,
            first_sequence=read,
            text_windows=text_windows(study),
            numerics=study.numerics,
            processor=self.roots.device,
            seed=study.seed,
        )

    def _steps(self, tokens: int) -> int:
        return steps_of_tokens(tokens, self.study.recipe.batch_size, self.study, KEY)
