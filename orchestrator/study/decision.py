"""A decision which layers go next, as stages: the score of every candidate, and the choice made of them.

Pure functions. Invariant: a decision's key comes from the student it is made at, the candidates, the score's settings
and the text, so equal decisions are one, and none is made twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from operators.config import SkipConfig
from orchestrator.study.choosing import Choice, Joint, Local, Probe
from orchestrator.study.placing import placed_in
from orchestrator.study.recipe import Losses
from orchestrator.study.schema import Study
from orchestrator.study.spec import (
    BlendSpec,
    Candidate,
    ChoiceSpec,
    DistilSpec,
    PhaseSpec,
    ScoreSpec,
    Spec,
)
from orchestrator.study.stages import Roots, alone, steps_of_tokens, text_windows

KEY = "schedule.choice"


@dataclasses.dataclass(frozen=True)
class Decision:
    """A choice and what it needs."""

    spec: ChoiceSpec
    needs: tuple[Spec, ...]  # parents first, those of several candidates side by side
    candidates: tuple[int, ...]


class Chooser:
    """Lays out the decisions of a path; `decisions` are those it was asked for."""

    def __init__(self, study: Study, choice: Choice, roots: Roots) -> None:
        self.study, self.choice, self.roots = study, choice, roots
        self.decisions: list[Decision] = []

    def decide(self, student: str, swapped: tuple[int, ...], candidates: tuple[int, ...], read: int) -> Decision:
        """The decision that the next stage rests on: of a path whose student has these layers swapped and has read so
        many sequences."""
        teacher = self.roots.teacher.key
        match self.choice.rerank:
            case "once":
                decision = self.decisions[0] if self.decisions else self._at(teacher, (), candidates, 0)
            case "forward":
                decision = self._at(teacher, swapped, candidates, 0)
            case "every_stage":
                decision = self._at(student, (), candidates, read)
        if decision not in self.decisions:
            self.decisions.append(decision)
        return decision

    def _at(self, subject: str, picked: tuple[int, ...], candidates: tuple[int, ...], read: int) -> Decision:
        """At a student, beside whose layers the picked ones are swapped untrained."""
        choice = self.choice
        needs: list[Spec] = []
        prepared = None
        if isinstance(choice.prepared, Local):
            everything = tuple(sorted({*picked, *candidates}))
            local = self._distilled(subject, everything, choice.prepared.local, Losses(mixer_mse=1.0), read)
            needs.append(local)
            prepared = local.key
        if isinstance(choice.score, Joint):
            blend = self._blend(subject, candidates, choice.score.joint, prepared, read)
            spec = ChoiceSpec(subject=subject, blend=blend.key, seed=self.study.seed)
            return Decision(spec, (*needs, blend), candidates)
        scores = {}
        for layer in candidates:
            restored = choice.scored == "restored_alone"
            beside = tuple(other for other in candidates if other != layer) if restored else (layer,)
            layers = tuple(sorted({*picked, *beside}))
            if isinstance(choice.score, Probe):
                probe = self._distilled(subject, layers, choice.score.probe, Losses(kl=1.0), read)
                needs.append(probe)
                scores[layer] = self._score(probe.key, (), None)
            else:
                scores[layer] = self._score(subject, layers, prepared)
        spec = ChoiceSpec(
            subject=subject,
            reference=self._reference.key,
            candidates=tuple(Candidate(layer=layer, score=score.key) for layer, score in scores.items()),
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

    def _score(self, subject: str, layers: tuple[int, ...], prepared: str | None) -> ScoreSpec:
        own = self.choice.score != "skip" and bool(layers)
        operator: Any = placed_in(self.study.operator, layers) if own else SkipConfig()
        seed = self.study.seed if layers and not isinstance(operator, SkipConfig) else 0
        reference = self._reference.key
        more = {"operator": operator, "seed": seed, "prepared": prepared if layers else None}
        more["text_windows"] = text_windows(self.study) if own else None  # operators may start from training text
        return self._reference.of(subject, layers, reference, **more)

    def _distilled(self, subject: str, layers: tuple[int, ...], tokens: int, losses: Losses, read: int) -> DistilSpec:
        """A student that is trained to be scored: its operators alone, by the recipe's optimizer."""
        study = self.study
        return DistilSpec(
            tokens=self.roots.tokens.key,
            teacher=self.roots.teacher.key,
            parent=subject,
            layers=layers,
            new_layers=layers,
            operator=placed_in(study.operator, layers),
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
            operator=placed_in(study.operator, candidates),
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
