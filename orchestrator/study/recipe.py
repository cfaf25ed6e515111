"""The part of a study file that says how stages train: optimizer, losses, phases, numerics.

Invariant: an option that came later is left out of what names a stage where it is off, so stages keep their names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.study.values import Model, Positive, Rate, Share, Weight


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

    @property
    def canonical(self) -> Optimizer:
        """The same without what has no effect: Muon's rate where there is no Muon."""
        if self.method == "muon":
            return self
        return self.model_copy(update={"matrix_lr": type(self).model_fields["matrix_lr"].default})


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

    @property
    def canonical(self) -> Losses:
        """The same losses in one way of writing them, which stages are named by, without what has no effect."""
        kl, said = self.logit_kl, self.kl
        if kl.weight == 0 or kl == LogitKL(weight=kl.weight):
            said = kl.weight
        weighed = kl.weight + self.ce > 0  # hits count in these two only
        return self.model_copy(update={"kl": said, "hit_weight": self.hit_weight if weighed else 1.0})

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
    # without matrix units for bfloat16 (and there up to twice as fast), in bfloat16 on those that have them; but for
    # attention's, which are small and stay in float32 on CPUs.
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
