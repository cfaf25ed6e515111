"""The study file as frozen, strict models: every option a user can write, its default and its rule.

Place in the flow: `loader` turns YAML into these, `plan` turns these into stage specifications. Invariant: a `Study`
that exists is one that can be planned; what depends on the teacher's size is checked by `plan`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from operators.config import HyenaConfig, SkipConfig, WindowConfig

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _with_filter_kind(operator: Any) -> Any:
    """A filter is implicit where it names no kind."""
    match operator:
        case {"filter": {"kind": _}}:
            return operator
        case {"filter": dict(values)}:
            return {**operator, "filter": {"kind": "implicit", **values}}
        case _:
            return operator


Operator = Annotated[
    HyenaConfig | WindowConfig | SkipConfig, Field(discriminator="kind"), BeforeValidator(_with_filter_kind)
]


class Model(BaseModel):
    """A frozen mapping that takes no unknown key and converts nothing silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


class Average(Model):
    """A mean of the weights after a stage's steps, which it ends with instead of the last ones."""

    ema: Share | None = None  # of all steps, the mean so far weighing this and the newest weights the rest
    last: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # of this share of the steps, all alike

    @model_validator(mode="after")
    def _one_kind(self) -> Average:
        if (self.ema is None) == (self.last is None):
            raise ValueError(f"exactly one of ema and last is needed, got ema={self.ema} last={self.last}")
        return self


class Optimizer(Model):
    """Muon for matrices and AdamW for the rest, or AdamW alone, on a warmup-stable-decay schedule per stage."""

    method: Literal["muon", "adamw"] = "muon"
    matrix_lr: Rate = 0.01  # Muon's, for weight matrices
    lr: Rate = 3e-3  # AdamW's, for all else
    rest_scale: Weight = 0.3  # learning rates outside the swapped operators, times this; 0 freezes the rest
    weight_decay: Weight = 0.0
    betas: tuple[Share, Share] = (0.9, 0.98)
    gradient_clip: Rate = 1.0
    warmup: Share = 0.05  # share of the stage's steps
    decay: Share = 0.4  # share of the stage's steps, linearly to zero at its end
    # Learning rates of a layer, times this for every layer above it; embeddings lie below all, the output head above.
    layer_decay: Annotated[Rate, Field(exclude_if=lambda value: value == 1.0)] = 1.0
    average: Annotated[Average | None, Field(exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _phases_fit(self) -> Optimizer:
        if self.warmup + self.decay > 1.0:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} exceed the stage: their sum must be at most 1"
            )
        return self


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


class LogitKL(Model):
    """Kullback-Leibler divergence between the next-token distributions of teacher and student."""

    weight: Weight = 1.0
    direction: Literal["forward", "reverse"] = "forward"  # forward: KL(teacher || student)
    temperature: Rate = 1.0


class Losses(Model):
    """Weights of a phase's losses, each in nats or squared units per valid token."""

    mixer_mse: Weight = 0.0  # operator output against attention output, both fed the teacher's input of that layer
    hidden_mse: Weight = 0.0  # residual stream after each swapped layer, the student fed its own
    kl: LogitKL | Weight = 0.0  # a number is the weight of the forward divergence at temperature 1
    ce: Weight = 0.0  # cross-entropy with the text itself
    # What a token that completes a trigram already in its window counts in kl and ce; others count 1, and the mean is
    # over the sum of what tokens count.
    hit_weight: Annotated[Rate, Field(exclude_if=lambda value: value == 1.0)] = 1.0

    @property
    def logit_kl(self) -> LogitKL:
        """The divergence's settings, whichever way they were written."""
        return self.kl if isinstance(self.kl, LogitKL) else LogitKL(weight=self.kl)

    @model_validator(mode="after")
    def _some_weight(self) -> Losses:
        if self.mixer_mse + self.hidden_mse + self.logit_kl.weight + self.ce == 0:
            raise ValueError("all loss weights are 0: give at least one of mixer_mse, hidden_mse, kl, ce a weight")
        return self


class Phase(Model):
    """A token budget and the losses it is spent on."""

    losses: Losses
    tokens: Positive | None = None  # for the phase
    tokens_per_layer: Positive | None = None  # times the layers the stage trains

    @model_validator(mode="after")
    def _one_budget(self) -> Phase:
        if (self.tokens is None) == (self.tokens_per_layer is None):
            raise ValueError("a phase needs a token budget: exactly one of tokens and tokens_per_layer")
        return self


class Recipe(Model):
    """How each stage is distilled."""

    phases: tuple[Phase, ...] = ()  # of every stage that swaps layers
    joint: tuple[Phase, ...] = ()  # of a last stage over all swapped layers; empty: no such stage
    batch_size: Positive = 4
    # Tokens of training text that a path reads, the first ones of its order, again and again; none: all there are.
    text_tokens: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    freeze: tuple[str, ...] = ()  # globs over parameter names that stay as they are
    # The activations of a layer are computed again for its gradients instead of kept: a third more time for memory that
    # no longer grows with layers. The same bits.
    checkpoint_activations: bool = False
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _some_budget(self) -> Recipe:
        if not self.phases and not self.joint:
            raise ValueError("the recipe has no token budget: give phases, joint or both at least one phase")
        return self


class Numerics(Model):
    """What decides the bits beside the data: part of every stage's identity."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; parameters, filters and FFTs stay float32
    # torch.set_float32_matmul_precision of stages that train. medium: float32 products by oneDNN, in float32 on CPUs
    # without matrix units for bfloat16 (and there up to twice as fast), in bfloat16 on those that have them.
    matmul: Literal["highest", "high", "medium"] = "highest"
    # native: channel-wise operators by the compiled core (make build-ext), up to twice as fast on CPUs; other bits.
    core: Literal["torch", "native"] = "torch"
    threads: Positive = 1
    world_size: Positive = 1  # processes that share each batch of a training stage; each has `threads`
    # full: each of them holds its part of all parameters, gradients and optimizer states, and gathers a layer where it
    # is needed (FSDP2). The same losses but for the order of sums.
    sharding: Annotated[Literal["none", "full"], Field(exclude_if=lambda value: value == "none")] = "none"
    # bfloat16: the teacher, and what a student shares with it, take two bytes a number instead of four. What trains
    # stays float32, norms and the residual stream too. The same results where a model's weights came in bfloat16.
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _some_share(self) -> Numerics:
        if self.sharding == "full" and self.world_size == 1:
            raise ValueError("sharding full needs several processes but world_size is 1: raise it, or set none")
        return self

    @model_validator(mode="after")
    def _products_are_as_narrow(self) -> Numerics:
        if self.teacher_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(
                f"teacher_dtype bfloat16 needs products in bfloat16 but dtype is {self.dtype}: set dtype too"
            )
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


class Asha(Model):
    """Early stopping at stage boundaries (Li et al. 2020): a rung is a number of swapped layers."""

    reduction_factor: Annotated[int, Field(ge=2)] = 2
    grace_layers: Positive = 1


class Uniform(Model):
    """Random search: a real number between two bounds, on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low} must be below high {self.high}, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} must be positive on a logarithmic scale")
        return self


Axis = tuple[Any, ...] | Uniform
Space = dict[str, Axis]


class Search(Model):
    """Which values are tried. `space` maps study keys to choices; a list of such mappings is their union."""

    method: Literal["grid", "random"] = "grid"
    space: Space | tuple[Space, ...] = {}
    trials: Positive | None = None  # random: how many
    early_stopping: Asha | None = None

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The mappings, whichever way they were written."""
        return self.space if isinstance(self.space, tuple) else (self.space,)

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.method == "random" and self.trials is None:
            raise ValueError("random search needs trials: how many points to draw")
        if self.method == "grid" and self.trials is not None:
            raise ValueError(f"trials={self.trials} belongs to random search: a grid runs every point")
        for space in self.spaces:
            for key, axis in space.items():
                if isinstance(axis, Uniform) and self.method == "grid":
                    raise ValueError(f"{key} is a range: a grid needs a list of values")
                if isinstance(axis, tuple) and not axis:
                    raise ValueError(f"{key} has no value: list at least one")
        return self


class Study(Model):
    """One study file."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=128)]  # the name of a folder as well
    question: str = ""
    seed: Seed = 0
    teacher: Teacher = Pretrain()
    data: Data = Data()
    operator: Operator = HyenaConfig()
    schedule: Schedule = Schedule()
    recipe: Recipe
    numerics: Numerics = Numerics()
    evaluation: Measured = Measured()
    throughput: Throughput = Throughput()
    controls: Controls = Controls()
    search: Search = Search()

    @model_validator(mode="after")
    def _vocabulary_only_when_trained(self) -> Study:
        if self.data.vocabulary is not None and isinstance(self.teacher, Pretrained):
            raise ValueError("data.vocabulary has no use with a pretrained teacher, which brings its own tokenizer")
        return self
