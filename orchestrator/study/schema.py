"""The study file as frozen, strict models: every option a user can write, its default and its rule.

Place in the flow: `loader` turns YAML into these, `plan` turns these into stage specifications. Invariant: a `Study`
that exists is one that can be planned; what depends on the teacher's size is checked by `plan`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operators.config import HyenaConfig
from orchestrator.study.choosing import Choice, Gate, Joint
from orchestrator.study.placing import Candidates, Placed
from orchestrator.study.recipe import Numerics, Optimizer, Recipe
from orchestrator.study.reported import Report
from orchestrator.study.space import Search
from orchestrator.study.values import Model, NonNegative, Positive, Seed


class StdlibSource(Model):
    """The Python sources of the running interpreter's standard library, tests left out; one document a file."""

    source: Literal["python-stdlib"] = "python-stdlib"


class FileSource(Model):
    """Local files: whole text files, or records with a text field (json, jsonl, parquet); all but parquet also as .gz.

    What is empty or null is left out; a field that is no text, or text that is not UTF-8, is an error with its place.
    """

    source: Literal["text", "json", "jsonl", "parquet"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]  # paths or globs, relative to the study file; each file once
    field: str = "text"


class HubSource(Model):
    """A data set of the Hugging Face hub, streamed until `max_tokens` are tokenised.

    As training text without validation text of its own: until that many are for training; what was held out up to there
    is for validation.
    """

    source: Literal["hub"]
    name: str
    configuration: str | None = None
    revision: str = "main"
    split: str = "train"
    field: str = "text"
    max_tokens: Positive


Source = Annotated[StdlibSource | FileSource | HubSource, Field(discriminator="source")]


class Data(Model):
    """Text for training and for validation; windows of `sequence_length` tokens."""

    train: Source = StdlibSource()
    validation: Source | None = None  # none: a share of the training documents is held out
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    sequence_length: Annotated[int, Field(ge=8)] = 256
    vocabulary: Annotated[int, Field(ge=257, le=65_536)] | None = None  # only for a teacher trained here

    @property
    def effective_vocabulary(self) -> int:
        """Entries of the byte-level BPE that is trained for a teacher trained here."""
        return self.vocabulary or 2048


class Pretrain(Model):
    """A small GPT-NeoX trained on the study's own text: the root of the stage tree."""

    kind: Literal["pretrain"] = "pretrain"
    layers: Positive = 6
    hidden: Positive = 128
    heads: Positive = 4
    intermediate: Positive | None = None  # none: four times hidden
    max_length: Positive = 1024
    tokens: Positive = 2_000_000
    batch_size: Positive = 8
    threads: Positive = 1
    optimizer: Optimizer = Optimizer(matrix_lr=0.02, rest_scale=1.0, weight_decay=0.1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Pretrain:
        if self.hidden % self.heads or (self.hidden // self.heads) % 8:
            raise ValueError(f"hidden {self.hidden} over heads {self.heads} must give a whole head size divisible by 8")
        return self


class Pretrained(Model):
    """A causal language model with its tokenizer: a hub id and revision, or a local folder."""

    kind: Literal["pretrained"]
    hub: str | None = None
    folder: str | None = None  # relative to the study file
    revision: str = "main"
    gguf: str | None = None  # a GGUF file in the folder, which holds weights, sizes and tokenizer
    fetched_by: str | None = None  # the command that brings the folder, told where it is not there

    @model_validator(mode="after")
    def _one_place(self) -> Pretrained:
        if (self.hub is None) == (self.folder is None):
            raise ValueError(f"exactly one of hub and folder is needed, got hub={self.hub} folder={self.folder}")
        if self.folder is None and self.gguf is not None:
            raise ValueError(f"gguf {self.gguf} is a file of a folder: give folder instead of hub")
        return self


Teacher = Annotated[Pretrain | Pretrained, Field(discriminator="kind")]


class Schedule(Model):
    """Which layers are swapped in which stage."""

    layer_order: Literal["bottom_up", "top_down", "interleaved"] | tuple[tuple[NonNegative, ...], ...] = "bottom_up"
    layers_per_stage: Positive = 1  # not used where layer_order lists the stages
    keep: tuple[NonNegative, ...] = ()  # layers that stay attention
    choice: Choice | None = None  # layers by what was measured, instead of layer_order
    gate: Gate | None = None  # what a stage that is not good enough comes to

    @model_validator(mode="after")
    def _one_order(self) -> Schedule:
        both = {"layer_order", "layers_per_stage"} & self.model_fields_set
        if self.choice is not None and both:
            raise ValueError(
                f"choice decides the order itself: take out {' and '.join(sorted(both))} (see choice.take)"
            )
        return self

    @model_validator(mode="after")
    def _stages_are_disjoint(self) -> Schedule:
        if isinstance(self.layer_order, tuple):
            layers = [layer for stage in self.layer_order for layer in stage]
            if not layers or not all(self.layer_order):
                raise ValueError("layer_order lists an empty stage: every stage needs at least one layer")
            twice = sorted({layer for layer in layers if layers.count(layer) > 1})
            if twice:
                raise ValueError(f"layer_order swaps layers {twice} more than once: name each layer once")
            kept = sorted(set(layers) & set(self.keep))
            if kept:
                raise ValueError(f"layers {kept} stand in both layer_order and keep: take them out of one")
        return self


class Evaluation(Model):
    """What is measured after every stage, the teacher beside it."""

    tokens: Positive = 32_768
    batch_size: Positive = 16
    prompts: NonNegative = 16  # begun texts that model and teacher go on with, greedily and by sampling
    prompt_tokens: Positive = 64
    new_tokens: Positive = 32
    seed: NonNegative = 0  # of the samples, and of the keys of `probes`


class Probes(Model):
    """What perplexity hides, measured of the teacher, every student and `skip all` on validation text."""

    # Tokens of the windows; none: data.sequence_length. Positions and hits are told of the longest ones.
    lengths: Annotated[tuple[Annotated[int, Field(ge=8)], ...], Field(min_length=1)] | None = None
    windows: Positive = 8  # of the longest length; of the others as many as have the same tokens
    needles: NonNegative = 16  # texts with keys to find, for every length and depth; 0: none


class Measured(Evaluation):
    """The same, and what is off where a study does not ask for it."""

    probes: Probes | None = None


class Throughput(Model):
    """Speed of every distinct student architecture against its teacher, in one process that has the machine alone."""

    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (256, 1024)
    batch_size: Positive = 1
    decode_tokens: Positive = 32
    repeats: Positive = 5


class Controls(Model):
    """Rows that keep the result honest."""

    skip: bool = True  # each layer's attention left out alone, and all of them at once
    # Operators trained from random weights on their longest path's tokens: the study's own, every one that is swept.
    scratch: Literal["own", "every", "none"] = "own"


class Wandb(Model):
    """Weights & Biases."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TensorBoard(Model):
    """Event files in the study's folder of the home."""


class Trackers(Model):
    """Where runs are told beside MLflow; no stage depends on it."""

    wandb: Wandb | None = None
    tensorboard: TensorBoard | None = None


class Study(Model):
    """One study file."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=128)]  # the name of a folder as well
    question: str = ""
    seed: Seed = 0
    teacher: Teacher = Pretrain()
    data: Data = Data()
    operator: Candidates | Placed = HyenaConfig()
    schedule: Schedule = Schedule()
    recipe: Recipe
    numerics: Numerics = Numerics()
    evaluation: Measured = Measured()
    throughput: Throughput = Throughput()
    controls: Controls = Controls()
    search: Search = Search()
    report: Report = Report()
    record: Trackers = Trackers()

    @model_validator(mode="after")
    def _vocabulary_only_when_trained(self) -> Study:
        if self.data.vocabulary is not None and isinstance(self.teacher, Pretrained):
            raise ValueError("data.vocabulary has no use with a pretrained teacher, which brings its own tokenizer")
        return self

    @model_validator(mode="after")
    def _candidates_are_chosen_from(self) -> Study:
        if not isinstance(self.operator, tuple):
            return self
        choice = self.schedule.choice
        if choice is None:
            raise ValueError("operator lists candidates, and only a choice takes one: give one, or schedule.choice")
        if choice.layers is not None:
            raise ValueError(
                "schedule.choice.layers says no operators, and operator lists candidates: set it to one operator, or "
                "{default: ..., layers: ...}"
            )
        if choice.score == "skip" or isinstance(choice.score, Joint):
            score = "skip" if choice.score == "skip" else "joint"
            raise ValueError(
                f"schedule.choice.score {score} tells no operators apart: set it to kl, loss, hits or a probe, or "
                "operator to one operator"
            )
        if choice.scored == "restored_alone":
            raise ValueError(
                "schedule.choice.scored restored_alone gives layers their attention back and tells no operators apart: "
                "set it to swapped_alone, or operator to one operator"
            )
        if len(set(self.operator)) < len(self.operator):
            raise ValueError("operator lists a candidate twice: keep one of them")
        return self
