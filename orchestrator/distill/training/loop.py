"""The training loop that every stage shares: step, log, checkpoint, resume.

Invariant: killed at any moment and started again, it ends with the bits of the uninterrupted run. The learning rate
and the batch are functions of the step; parameters, their average where there is one, optimizer states and random state
are in the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from operators import native
from orchestrator.distill.context import Stopped, Workplace
from orchestrator.distill.models.shards import whole
from orchestrator.distill.training.attention import attend_in_float32
from orchestrator.distill.training.average import WeightAverage
from orchestrator.distill.training.checkpoint import Pace, expected_seconds, load_checkpoint, save_checkpoint
from orchestrator.distill.training.journal import Journal
from orchestrator.distill.training.memory import keep_freed_memory
from orchestrator.distill.training.optimizers import schedule, set_learning_rate
from orchestrator.distill.training.ranks import average_gradients, in_turn, is_first, mean, on_any
from orchestrator.study.recipe import Numerics, Optimizer

Parts = dict[str, Tensor]


class NonFiniteLoss(ArithmeticError):
    """A loss, gradient or weight became NaN or infinite: the stage cannot go on, and trying again gives the same."""


DIVERGED = {
    "student": "the student has diverged; lower recipe.optimizer.lr or matrix_lr, or raise warmup",
    "teacher": "the teacher has diverged; lower teacher.optimizer.lr or matrix_lr, or raise warmup",
}
NO_CORE = "numerics.core native needs the compiled core, and there is none here: run make build-ext, or set torch"


@dataclasses.dataclass(frozen=True)
class Training:
    """What to train and how: `loss(step)` gives the scalar to differentiate and detached parts to log.

    Where ranks share a batch, it is the loss of this rank's part.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    config: Optimizer
    steps: int
    tokens_per_step: int
    loss: Callable[[int], tuple[Tensor, Parts]]
    role: Literal["student", "teacher"] = "student"


def prepare(numerics: Numerics, seed: int = 0) -> None:
    """Set what decides the bits in this process: threads, precision of products, core, determinism, random state.

    And what makes it faster: freed memory is kept, new memory is not filled.

    Raises RuntimeError where there is no compiled core and the study asks for it.
    """
    if native.use(numerics.core == "native") != (numerics.core == "native"):
        raise RuntimeError(NO_CORE)
    keep_freed_memory()
    torch.set_num_threads(numerics.threads)
    torch.set_float32_matmul_precision(numerics.matmul)
    attend_in_float32()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product; CPUs do not
    torch.use_deterministic_algorithms(True)  # with warnings only, attention's gradients would differ on a GPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nobody reads it
    torch.manual_seed(seed)


def autocast(numerics: Numerics, device: str) -> Any:
    """The precision of forward passes."""
    if numerics.dtype == "float32":
        return contextlib.nullcontext()
    kept = numerics.sharding == "none"  # casts of weights, kept as long as this lasts, would be of all layers at once
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, cache_enabled=kept)


def held(numerics: Numerics, device: str) -> Any:
    """The precision of passes beside training, float32 wherever the weights are: see `load_teacher`."""
    return contextlib.nullcontext() if numerics.teacher_dtype == "float32" else autocast(numerics, device)


def train(training: Training, place: Workplace) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint if there is one.

    Returns:
        `seconds` of training over all attempts, `tokens`, `tokens_per_s` and `resumed_at`, the step that the last
        attempt began at.

    Raises:
        NonFiniteLoss: names the step and the parts of the loss, or the weight that the last step left.
        Stopped: the run was asked to stop; a checkpoint of this step is written.
    """
    context = place.context
    average = WeightAverage(training.model, training.config.average, training.steps)
    state = (training.model, training.optimizers, average.tensors)
    start, before = in_turn(lambda: load_checkpoint(place.work, *state, place.say))
    journal = Journal(place.journal)
    began = logged = time.monotonic()
    pace = Pace(context.checkpoint_seconds, began, expected_seconds(training.model))
    logged_step = start
    sums: dict[str, float] = {}
    try:
        for step in range(start, training.steps):
            parts = _step(training, step)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            done = step + 1
            average.take(done)
            if done % context.log_every and done != training.steps:
                continue
            now = time.monotonic()
            means = {name: value / (done - logged_step) for name, value in sums.items()}
            means["tokens_per_s"] = (done - logged_step) * training.tokens_per_step / max(now - logged, 1e-9)
            journal.write(done, done * training.tokens_per_step, means)
            sums, logged, logged_step = {}, now, done
            if done == training.steps:
                average.put()
                _check_weights(training)
                break
            stopping = on_any(context.stopping())
            if on_any(stopping or (is_first() and pace.due(now))):
                journal.sync()
                seconds = before + now - began
                save_checkpoint(place.work, done, seconds, *state)
                pace.written(now, time.monotonic())
            if stopping:
                raise Stopped(f"stopped at step {done} of {training.steps}")
    finally:
        journal.close()
    seconds = before + time.monotonic() - began
    tokens = training.steps * training.tokens_per_step
    rate = tokens / max(seconds, 1e-9)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": rate, "resumed_at": start}


def _step(training: Training, step: int) -> dict[str, float]:
    factor = schedule(step, training.steps, training.config)
    set_learning_rate(training.optimizers, factor)
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss, parts = training.loss(step)
    loss.backward()
    trained = [p for optimizer in training.optimizers for group in optimizer.param_groups for p in group["params"]]
    average_gradients(trained)
    norm = whole(nn.utils.clip_grad_norm_(trained, training.config.gradient_clip))
    values = {"loss/total": loss.detach(), **parts, "gradient_norm": norm}
    names = list(values)
    numbers = dict(zip(names, mean(torch.stack([values[name].float() for name in names])).tolist(), strict=True))
    if not all(math.isfinite(number) for number in numbers.values()):
        told = ", ".join(f"{name}={number:g}" for name, number in numbers.items() if not math.isfinite(number))
        raise NonFiniteLoss(f"step {step + 1}: {told}: {DIVERGED[training.role]}")
    for optimizer in training.optimizers:
        optimizer.step()
    numbers["learning_rate_factor"] = factor
    return numbers


def _check_weights(training: Training) -> None:
    """No loss is taken after the last step, which would tell of what that step did."""
    for name, parameter in training.model.named_parameters():
        if parameter.requires_grad and not bool(whole(torch.isfinite(parameter).all())):
            raise NonFiniteLoss(f"after step {training.steps}: {name} is not finite: {DIVERGED[training.role]}")
