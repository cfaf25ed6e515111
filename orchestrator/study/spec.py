"""The identity of a stage: everything that decides its result and nothing else.

Invariant: every field of a specification changes its key; where to run, where files lie and how often to save are in
`RunContext`, another type, and cannot. Parents enter by their keys, so a key names a whole history.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from orchestrator.study.decision_specs import BlendSpec as BlendSpec
from orchestrator.study.decision_specs import Candidate as Candidate
from orchestrator.study.decision_specs import ChoiceSpec as ChoiceSpec
from orchestrator.study.decision_specs import DrawSpec as DrawSpec
from orchestrator.study.decision_specs import ScoreSpec as ScoreSpec
from orchestrator.study.decision_specs import Solve as Solve
from orchestrator.study.keyed import DEVICES as DEVICES
from orchestrator.study.keyed import STAGE_VERSION as STAGE_VERSION
from orchestrator.study.keyed import Device as Device
from orchestrator.study.keyed import Processor, TextWindows
from orchestrator.study.keyed import Spec as Spec
from orchestrator.study.placing import Placed
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation, Throughput
from orchestrator.study.values import Model


class SourceIdentity(Model):
    """A text source: its kind, how it is read, and the fingerprint of its content."""

    source: Literal["python-stdlib", "text", "json", "jsonl", "parquet", "hub"]
    fingerprint: str
    field: str | None = None
    max_tokens: int | None = None


class TokensSpec(Spec):
    """Text -> one fixed file of tokens for training and one for validation."""

    kind: Literal["tokens"] = "tokens"
    train: SourceIdentity
    validation: SourceIdentity | None
    validation_share: float | None
    sequence_length: int
    vocabulary: int | None  # entries of a byte-level BPE trained here; none: the teacher's tokenizer
    teacher: str | None  # key of the stage that brings the tokenizer


class Architecture(Model):
    """A GPT-NeoX made here, or the configuration of a pretrained teacher by fingerprint."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    max_length: int
    vocabulary: int
    pretrained: str | None = None


class TeacherSpec(Spec):
    """The embedded teacher: a GPT-NeoX trained on the study's tokens."""

    kind: Literal["teacher"] = "teacher"
    tokens: str
    architecture: Architecture
    token_budget: int
    batch_size: int
    sequence_length: int
    optimizer: Optimizer
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int


class ImportSpec(Spec):
    """A pretrained teacher, brought into the store with its tokenizer."""

    kind: Literal["import"] = "import"
    fingerprint: str  # hub commit, or digest of a folder's files


class PhaseSpec(Model):
    """A phase with its budget worked out."""

    losses: Losses
    steps: int


class DistilSpec(Spec):
    """Swap `layers`, then distil: the unit of the stage tree."""

    kind: Literal["distil"] = "distil"
    tokens: str
    teacher: str
    parent: str
    layers: tuple[int, ...]  # trained as operators by this stage
    new_layers: tuple[int, ...]  # of those, the ones swapped by this stage
    operator: Placed
    phases: tuple[PhaseSpec, ...]
    batch_size: int
    sequence_length: int
    first_sequence: int  # of the shuffled training text, where the path's earlier stages ended
    text_windows: TextWindows = None
    freeze: tuple[str, ...]
    checkpoint_activations: bool = False
    optimizer: Optimizer
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int


class ScratchSpec(Spec):
    """The control: the student's architecture trained on the text from random weights."""

    kind: Literal["scratch"] = "scratch"
    tokens: str
    teacher: str | None  # only where the architecture is a pretrained one's
    architecture: Architecture
    operator: Placed
    layers: tuple[int, ...]
    token_budget: int
    batch_size: int
    sequence_length: int
    text_windows: TextWindows = None
    checkpoint_activations: bool = False
    optimizer: Optimizer
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int


class EvaluateSpec(Spec):
    """Quality of a finished stage on validation text, the teacher beside it.

    `reference` is the key of the teacher's own evaluation, which keeps the teacher's side for all others; that one has
    none.
    """

    kind: Literal["evaluate"] = "evaluate"
    tokens: str
    teacher: str
    subject: str
    reference: str | None = None
    sequence_length: int
    evaluation: Evaluation
    numerics: Numerics
    processor: Processor = "cpu"

    def of(self, subject: str, reference: str | None = None) -> EvaluateSpec:
        """The same evaluation of another subject."""
        return self.changed(subject=subject, reference=reference)


class ProbesSpec(Spec):
    """What perplexity hides of a finished stage, on validation text."""

    kind: Literal["probes"] = "probes"
    tokens: str
    teacher: str
    subject: str
    sequence_length: int  # of the windows that the text was made for
    lengths: tuple[int, ...]  # ascending
    windows: int
    needles: int
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int

    def of(self, subject: str) -> ProbesSpec:
        """The same probes of another subject."""
        return self.changed(subject=subject)


Again = Annotated[int, Field(ge=0, exclude_if=lambda value: value == 0)]


# Seconds of all turns of one comparison of speeds, where more turns than asked for can tell more: small models have
# thirty turns in it, large ones those asked for.
CHEAP_SECONDS = 1.5


class ThroughputSpec(Spec):
    """Speed of a student's architecture against its teacher's; weights do not enter, hardware and device do."""

    kind: Literal["throughput"] = "throughput"
    teacher: str
    operator: Placed
    layers: tuple[int, ...]
    throughput: Throughput
    train_batch_size: int
    sequence_length: int
    numerics: Numerics
    hardware: str  # the device is part of its text
    rest_trains: bool = True  # in training, what is not in the swapped layers gets gradients too
    freeze: tuple[str, ...] = ()  # in training, globs over parameter names that get none
    again: Again = 0  # times that the same was measured before


class TasksSpec(Spec):
    """A task of lm-eval asked of a finished stage, or of the model in a folder.

    `fingerprint` covers all that the task asks and how it is scored; a stage's subject has a teacher and a tokenizer,
    a folder all of its own.
    """

    kind: Literal["tasks"] = "tasks"
    tokens: str | None
    teacher: str | None
    subject: str | None
    folder: str | None = None  # digest of its files
    task: str
    fingerprint: str
    harness: str  # version of lm-eval
    limit: int | None = None  # items, the first ones
    rotate: bool = False
    batch_size: int
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int

    def of(self, subject: str) -> TasksSpec:
        """The same task asked of another stage."""
        return self.changed(subject=subject)


StageSpec = Annotated[
    TokensSpec
    | TeacherSpec
    | ImportSpec
    | DistilSpec
    | ScratchSpec
    | EvaluateSpec
    | ProbesSpec
    | ThroughputSpec
    | ScoreSpec
    | BlendSpec
    | ChoiceSpec
    | DrawSpec
    | TasksSpec,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(StageSpec)


def spec_from_json(text: str) -> Any:
    """A specification read back from its JSON; `pydantic.ValidationError` where it is none."""
    return _ADAPTER.validate_json(text, strict=True)


def place_of(key: str) -> str:
    """Where a stage lies below the root of a store or its mirror."""
    return f"{key[:2]}/{key}"


def short(key: str) -> str:
    """The first 16 hex digits of a key, for people."""
    return key[:16]
