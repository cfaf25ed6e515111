"""The identity of a stage: everything that decides its result and nothing else.

Invariant: every field of a specification changes its key; where to run, where files lie and how often to save are in
`RunContext`, another type, and cannot. Parents enter by their keys, so a key names a whole history.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter

from orchestrator.files import canonical_json
from orchestrator.study.placing import Placed
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation, Throughput
from orchestrator.study.values import Model

STAGE_VERSION = 6  # raise it with any change that makes an old result differ from a new one
DOMAIN = b"layerswap/stage\n"

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)
# What computes a stage's numbers: each has bits of its own. It came later, and keys of the CPU stay as they were.
Processor = Annotated[Device, Field(exclude_if=lambda value: value == "cpu")]


class Spec(Model):
    """What all stages have: the version of the code's meaning, and a key."""

    version: int = STAGE_VERSION

    @cached_property
    def key(self) -> str:
        """sha256 in hex over the canonical JSON of the validated fields."""
        return hashlib.sha256(DOMAIN + canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def changed(self, **values: Any) -> Self:
        """The same with other values, and the key of those: a copy would keep the old one."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)

    @property
    def parents(self) -> dict[str, str]:
        """Role -> key of the stages that must be finished before this one."""
        roles = ("tokens", "teacher", "parent", "subject", "reference", "prepared", "blend", "previous")
        found = {role: getattr(self, role, None) for role in roles}
        return {role: key for role, key in found.items() if key is not None}

    @property
    def threads(self) -> int:
        """Cores that one process of the stage keeps busy."""
        return int(self.numerics.threads) if hasattr(self, "numerics") else 1

    @property
    def world_size(self) -> int:
        """Processes that compute the stage together."""
        return int(self.numerics.world_size) if hasattr(self, "numerics") else 1

    @property
    def cores(self) -> int:
        """Cores that the whole stage keeps busy."""
        return self.threads * self.world_size


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


# Windows of training text that are read again and again; none: all there are.
TextWindows = Annotated[int | None, Field(exclude_if=lambda value: value is None)]


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


Prepared = Annotated[str | None, Field(exclude_if=lambda value: value is None)]


class ScoreSpec(Spec):
    """What a student costs with further layers swapped and nothing trained, on text that no report reads.

    `reference` is the score of the teacher itself, which keeps the teacher's side for all others; that one has none.
    """

    kind: Literal["score"] = "score"
    tokens: str
    teacher: str
    subject: str  # the student that it begins from, or the teacher
    reference: str | None = None
    prepared: Prepared = None  # a student in which each of the layers has its operator; none: as operators start
    layers: tuple[int, ...]  # swapped beside those of the subject
    operator: Placed  # of these layers
    sequence_length: int
    text_windows: TextWindows = None  # as of the stage that is to train the layers: operators may start from text
    batch_size: int = 16  # windows that are read at a time
    text: int  # tokens of held-out text, at least two windows of them
    reported: int  # tokens of held-out text that evaluations read: none of them are read here
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int

    def of(self, subject: str, layers: tuple[int, ...], reference: str | None, **more: Any) -> ScoreSpec:
        """The same score of another student."""
        return self.changed(subject=subject, layers=layers, reference=reference, **more)


class BlendSpec(Spec):
    """One number a layer that blends attention and operator, all of them trained together and all else frozen."""

    kind: Literal["blend"] = "blend"
    tokens: str
    teacher: str
    subject: str
    prepared: Prepared = None
    layers: tuple[int, ...]  # candidates
    operator: Placed
    steps: int
    batch_size: int
    sequence_length: int
    first_sequence: int
    text_windows: TextWindows = None
    numerics: Numerics
    processor: Processor = "cpu"
    seed: int


class Candidate(Model):
    """A layer that may be swapped next, by which of the study's operators, and the key of that score."""

    layer: int
    score: str
    operator: Annotated[int, Field(ge=0, exclude_if=lambda value: value == 0)] = 0

    @property
    def role(self) -> str:
        """What its score is among the parents of a choice."""
        return f"layer {self.layer}" + (f" operator {self.operator}" if self.operator else "")


class Solve(Model):
    """What a set of swaps has to have: a decoding speed over the teacher's, a number of layers, or both."""

    decode: float | None
    layers: int | None
    seconds: float  # of the teacher for a token, measured
    added: tuple[float, ...]  # to it by each candidate alone, in their order; mostly below zero


class ChoiceSpec(Spec):
    """Which layers go next: candidates in order, by their scores."""

    kind: Literal["choice"] = "choice"
    subject: str  # the student whose layers are chosen
    reference: str | None = None  # the teacher's own score
    candidates: tuple[Candidate, ...] = ()
    blend: Prepared = None  # in the place of candidates: the highest gate first, whatever is measured
    measure: Literal["kl", "loss", "hits"] = "kl"
    solve: Annotated[Solve | None, Field(exclude_if=lambda value: value is None)] = None  # none: all of them
    ascending: bool = True  # the lowest score first: of swapped layers; of restored ones the highest
    seed: int

    @property
    def parents(self) -> dict[str, str]:
        """As of any stage, and the score of every candidate by its layer and operator."""
        return {**super().parents, **{each.role: each.score for each in self.candidates}}


class DrawSpec(Spec):
    """Points of a search space to try next, by what trials of the points before came to: Optuna's."""

    kind: Literal["draw"] = "draw"
    previous: str | None = None  # the draw before, whose storage it goes on with
    told: tuple[tuple[float, ...], ...] = ()  # for each of that one's points, what its trial came to
    spaces: tuple[dict[str, Any], ...]  # as a study file has them
    whole: tuple[str, ...]  # keys that take whole numbers
    sampler: Literal["tpe", "nsga2", "qmc"]
    directions: tuple[Literal["minimize", "maximize"], ...]
    count: int  # points to draw
    seed: int


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
