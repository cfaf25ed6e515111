"""A study's values -> the stages they ask for: the text, the teacher, a path of students.

Pure functions; a `StudyError` begins with the key at fault. Invariant: a stage names all it depends on, so equal
values from equal parents are one stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from orchestrator.study.loader import StudyError
from orchestrator.study.recipe import Numerics, Phase
from orchestrator.study.schedule import swap_order
from orchestrator.study.schema import Evaluation, Pretrain, Study
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import (
    Device,
    DistilSpec,
    EvaluateSpec,
    ImportSpec,
    PhaseSpec,
    ProbesSpec,
    Spec,
    TeacherSpec,
    TokensSpec,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A trained stage and its evaluation, at its place on a path."""

    train: Spec
    evaluate: EvaluateSpec
    swapped: tuple[int, ...]
    tokens: int  # trained on the path so far, this stage included
    joint: bool = False
    probes: ProbesSpec | None = None

    @property
    def probed(self) -> tuple[ProbesSpec, ...]:
        """The probes of its teacher and its own; none where nothing is asked for."""
        return () if self.probes is None else (self.probes.of(self.probes.teacher), self.probes)

    @property
    def own_tokens(self) -> int:
        """Tokens that this stage itself trains on."""
        return sum(tokens for _, tokens in self.stretches)

    @property
    def stretches(self) -> list[tuple[str, int]]:
        """Its tokens in order, by what makes them cost alike."""
        return stretches_of(self.train)


def stretches_of(spec: Any) -> list[tuple[str, int]]:
    """The tokens of a stage in order, by what makes them cost alike: one model, a teacher beside it, both without
    logits."""
    if hasattr(spec, "token_budget"):
        return [("alone", int(spec.token_budget))]
    each = [(phase.losses, phase.steps) for phase in getattr(spec, "phases", ())]
    return [
        (
            "beside" if losses.ce + losses.logit_kl.weight > 0 else "layers",
            steps * spec.batch_size * spec.sequence_length,
        )
        for losses, steps in each
    ]


@dataclasses.dataclass(frozen=True)
class Roots:
    """The text and the teacher, which every path begins with, and the device that stages compute on."""

    tokens: TokensSpec
    teacher: TeacherSpec | ImportSpec
    device: Device


def roots_of(study: Study, resolved: Resolved, device: Device) -> Roots:
    """What the paths of a study begin with."""
    imported = ImportSpec(fingerprint=resolved.teacher) if resolved.teacher is not None else None
    tokens = TokensSpec(
        train=resolved.train,
        validation=resolved.validation,
        validation_share=None if resolved.validation else study.data.validation_share,
        sequence_length=study.data.sequence_length,
        vocabulary=None if imported else study.data.effective_vocabulary,
        teacher=imported.key if imported else None,
    )
    if imported is not None:
        return Roots(tokens, imported, device)
    made = study.teacher
    assert isinstance(made, Pretrain)
    _steps_of(made.tokens, made.batch_size, study, "teacher.tokens")
    _check_shares(made.batch_size, study, "teacher.batch_size")
    teacher = TeacherSpec(
        tokens=tokens.key,
        architecture=resolved.architecture,
        token_budget=made.tokens,
        batch_size=made.batch_size,
        sequence_length=study.data.sequence_length,
        optimizer=made.optimizer.canonical,
        numerics=whole(study.numerics).model_copy(update={"threads": made.threads}),
        processor=device,
        seed=study.seed,
    )
    return Roots(tokens, teacher, device)


def evaluation_of(study: Study, roots: Roots, subject: str) -> EvaluateSpec:
    """What is measured of the stage with the key `subject`."""
    teacher = roots.teacher.key
    own = EvaluateSpec(
        tokens=roots.tokens.key,
        teacher=teacher,
        subject=teacher,
        sequence_length=study.data.sequence_length,
        evaluation=Evaluation(**{name: getattr(study.evaluation, name) for name in Evaluation.model_fields}),
        numerics=alone(study.numerics),
        processor=roots.device,
    )
    return own if subject == teacher else own.of(subject, own.key)


def probes_of(study: Study, roots: Roots, subject: str) -> ProbesSpec | None:
    """The probes of the stage with the key `subject`; none where the study asks for none."""
    asked, length = study.evaluation.probes, study.data.sequence_length
    if asked is None:
        return None
    return ProbesSpec(
        tokens=roots.tokens.key,
        teacher=roots.teacher.key,
        subject=subject,
        sequence_length=length,
        lengths=tuple(sorted({*(asked.lengths or (length,))})),
        windows=asked.windows,
        needles=asked.needles,
        numerics=alone(study.numerics),
        processor=roots.device,
        seed=study.evaluation.seed,
    )


def alone(numerics: Numerics) -> Numerics:
    """The numerics of what does not train: one process, however many share a batch, and full precision of products."""
    return numerics.model_copy(update={"world_size": 1, "sharding": "none", "matmul": "highest"})


def whole(numerics: Numerics) -> Numerics:
    """The numerics of what has no frozen teacher beside it: how that is held does not matter."""
    return numerics.model_copy(update={"teacher_dtype": "float32"})


def _check_shares(batch_size: int, study: Study, key: str) -> None:
    ranks = study.numerics.world_size
    if batch_size % ranks:
        raise StudyError(f"{key}: {batch_size} sequences cannot be shared equally by numerics.world_size {ranks}")


def path_of(study: Study, roots: Roots, resolved: Resolved) -> Iterator[Step]:
    """The stages from the teacher to the last student, in their order."""
    order = swap_order(study, resolved.architecture.layers, resolved.sites)
    stages = [(new, study.recipe.phases, False) for new in order]
    if study.recipe.joint:
        everything = tuple(sorted(layer for stage in order for layer in stage))
        if not study.recipe.phases:  # the joint stage is the only one, and swaps as well
            stages = []
        stages.append((everything, study.recipe.joint, True))
    parent, sequences = roots.teacher.key, 0
    swapped: tuple[int, ...] = ()
    window = study.recipe.batch_size
    _check_shares(window, study, "recipe.batch_size")
    for trained, phases, joint in stages:
        new = tuple(layer for layer in trained if layer not in swapped)
        swapped = tuple(sorted({*swapped, *trained}))
        key = "recipe.joint" if joint else "recipe.phases"
        planned = tuple(_phase(phase, len(trained), study, f"{key}.{i}") for i, phase in enumerate(phases))
        spec = DistilSpec(
            tokens=roots.tokens.key, teacher=roots.teacher.key, parent=parent, layers=trained, new_layers=new,
            operator=study.operator, phases=planned, batch_size=window,
            sequence_length=study.data.sequence_length, first_sequence=sequences, freeze=study.recipe.freeze,
            optimizer=study.recipe.optimizer.canonical, numerics=study.numerics, processor=roots.device,
            checkpoint_activations=study.recipe.checkpoint_activations, text_windows=text_windows(study),
            seed=study.seed,
        )  # fmt: skip
        sequences += window * sum(phase.steps for phase in planned)
        parent = spec.key
        trained_tokens = sequences * study.data.sequence_length
        asked = (study, roots, spec.key)
        yield Step(spec, evaluation_of(*asked), swapped, trained_tokens, joint, probes_of(*asked))


def text_windows(study: Study) -> int | None:
    """Windows of training text that students read; none: all there are."""
    tokens = study.recipe.text_tokens
    if tokens is None:
        return None
    _steps_of(tokens, study.recipe.batch_size, study, "recipe.text_tokens")  # no batch has a window twice
    return tokens // study.data.sequence_length


def _phase(phase: Phase, layers: int, study: Study, key: str) -> PhaseSpec:
    tokens = phase.tokens if phase.tokens is not None else (phase.tokens_per_layer or 0) * layers
    key += ".tokens" if phase.tokens is not None else ".tokens_per_layer"
    return PhaseSpec(losses=phase.losses.canonical, steps=_steps_of(tokens, study.recipe.batch_size, study, key))


def _steps_of(tokens: int, batch_size: int, study: Study, key: str) -> int:
    size = batch_size * study.data.sequence_length
    if tokens < size:
        told = f"{tokens} tokens are less than one step of {size} (batch_size x sequence_length)"
        raise StudyError(f"{key}: {told}: raise it, or lower one of those")
    return tokens // size
