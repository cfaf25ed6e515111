"""A study's values -> the stages they ask for: the text, the teacher, and what a path of students is made of.

Pure functions; a `StudyError` begins with the key at fault. Invariant: a stage names all it depends on, so equal
values from equal parents are one stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from operators.config import OperatorConfig, SkipConfig
from orchestrator.study.loader import StudyError
from orchestrator.study.placing import PerLayer, mapped
from orchestrator.study.recipe import Numerics, Phase
from orchestrator.study.schema import Evaluation, Pretrain, Study
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import (
    Device,
    DistilSpec,
    EvaluateSpec,
    ImportSpec,
    PhaseSpec,
    ProbesSpec,
    ScratchSpec,
    Spec,
    TeacherSpec,
    ThroughputSpec,
    TokensSpec,
)

# kept: the path goes on from it. extended: trained on, for its gate wanted more. given_back: its layers are attention
# again, for more did not help. last: it ended its path, by its gate or by what its choice goes on until.
Outcome = Literal["kept", "extended", "given_back", "last"]


@dataclasses.dataclass(frozen=True)
class Step:
    """A trained stage and its evaluation, at its place on a path."""

    train: Spec
    evaluate: EvaluateSpec
    swapped: tuple[int, ...]
    tokens: int  # trained on the path so far, this stage included
    joint: bool = False
    probes: ProbesSpec | None = None
    outcome: Outcome = "kept"
    placed: OperatorConfig | PerLayer | None = None  # in all its swapped layers; none: what its stage has

    @property
    def operator(self) -> Any:
        """What stands in its swapped layers; None of a teacher."""
        return getattr(self.train, "operator", None) if self.placed is None else self.placed

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
    steps_of_tokens(made.tokens, made.batch_size, study, "teacher.tokens")
    check_shares(made.batch_size, study, "teacher.batch_size")
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


def throughput_of(step: Step, study: Study, teacher: str, hardware: str) -> ThroughputSpec:
    """The speed measurement of a step's architecture; equal architectures have one."""
    operator = mapped(step.operator or SkipConfig(), drawn)  # speed does not depend on the weights
    # What trains nothing, such as a skipped layer, is measured as the study trains.
    student = step.train if isinstance(step.train, DistilSpec | ScratchSpec) and step.own_tokens else None
    rest_scale = (student.optimizer if student else study.recipe.optimizer).rest_scale
    freeze = study.recipe.freeze if student is None else getattr(student, "freeze", ())
    freeze = tuple(sorted(set(freeze))) if step.swapped else ()
    rest_trains = rest_scale > 0 or not step.swapped
    # The layers of a teacher that is trained here look alike: where all of it trains, their number says the speed.
    alike = isinstance(study.teacher, Pretrain) and rest_trains and not freeze and not isinstance(operator, PerLayer)
    return ThroughputSpec(
        teacher=teacher,
        operator=operator,
        layers=tuple(range(len(step.swapped))) if alike else step.swapped,
        throughput=study.throughput,
        train_batch_size=student.batch_size if student else study.recipe.batch_size,
        sequence_length=study.data.sequence_length,
        numerics=alone(student.numerics if student else study.numerics),
        hardware=hardware,
        rest_trains=rest_trains,
        freeze=freeze,
    )


def drawn(operator: OperatorConfig) -> OperatorConfig:
    """The same operator from random weights."""
    return operator if isinstance(operator, SkipConfig) else dataclasses.replace(operator, init="random")


def alone(numerics: Numerics) -> Numerics:
    """The numerics of what does not train: one process, however many share a batch, and full precision of products."""
    return numerics.model_copy(update={"world_size": 1, "sharding": "none", "matmul": "highest"})


def whole(numerics: Numerics) -> Numerics:
    """The numerics of what has no frozen teacher beside it: how that is held does not matter."""
    return numerics.model_copy(update={"teacher_dtype": "float32"})


def check_shares(batch_size: int, study: Study, key: str) -> None:
    """A `StudyError` where ranks cannot share a batch equally."""
    ranks = study.numerics.world_size
    if batch_size % ranks:
        raise StudyError(f"{key}: {batch_size} sequences cannot be shared equally by numerics.world_size {ranks}")


def text_windows(study: Study) -> int | None:
    """Windows of training text that students read; none: all there are."""
    tokens = study.recipe.text_tokens
    if tokens is None:
        return None
    steps_of_tokens(tokens, study.recipe.batch_size, study, "recipe.text_tokens")  # no batch has a window twice
    return tokens // study.data.sequence_length


def phase_of(phase: Phase, layers: int, study: Study, key: str) -> PhaseSpec:
    """A phase with its budget worked out, for a stage that trains so many layers; `key` names it in errors."""
    tokens = phase.tokens if phase.tokens is not None else (phase.tokens_per_layer or 0) * layers
    key += ".tokens" if phase.tokens is not None else ".tokens_per_layer"
    return PhaseSpec(losses=phase.losses.canonical, steps=steps_of_tokens(tokens, study.recipe.batch_size, study, key))


def steps_of_tokens(tokens: int, batch_size: int, study: Study, key: str) -> int:
    """Steps that a budget pays for; a `StudyError` where it pays for none."""
    size = batch_size * study.data.sequence_length
    if tokens < size:
        told = f"{tokens} tokens are less than one step of {size} (batch_size x sequence_length)"
        raise StudyError(f"{key}: {told}: raise it, or lower one of those")
    return tokens // size
