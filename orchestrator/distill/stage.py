"""A stage, whatever its kind: specification in, artefacts and a result out.

This is the whole of the science in one place: pretrain, swap, distil, evaluate. Details live where their nouns live.
Invariant: a result depends on the specification and the parents' artefacts only.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators import native
from orchestrator.distill.choosing.blend import blend
from orchestrator.distill.choosing.choice import choose
from orchestrator.distill.choosing.draw import draw
from orchestrator.distill.choosing.score import score
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import STUDENT_ORDER, batch, load_tokens, prepare_tokens
from orchestrator.distill.measuring.evaluate import evaluate
from orchestrator.distill.measuring.probes import probe
from orchestrator.distill.measuring.tasks import measure_task
from orchestrator.distill.measuring.throughput import measure_throughput
from orchestrator.distill.models.shards import whole
from orchestrator.distill.models.student import (
    import_teacher,
    load_student,
    new_teacher,
    own_what_trains,
    parameter_count,
    random_like,
    save_student,
    sharing,
)
from orchestrator.distill.models.swap import swap
from orchestrator.distill.start import swap_layers
from orchestrator.distill.training.frozen import frozen_teacher
from orchestrator.distill.training.head import check_output_head
from orchestrator.distill.training.loop import Parts, Training, autocast, prepare, train
from orchestrator.distill.training.losses import batch_losses, next_token_loss, train_operators_only
from orchestrator.distill.training.memory import give_back_freed_memory
from orchestrator.distill.training.optimizers import choose_trained, make_optimizers, trainable_counts
from orchestrator.distill.training.ranks import share
from orchestrator.distill.training.recompute import recompute_layers
from orchestrator.distill.training.sharding import Loss, shard
from orchestrator.study.placing import by_layer
from orchestrator.study.spec import DistilSpec, ScratchSpec, TeacherSpec

Result = dict[str, Any]


def run_stage(spec: Any, place: Workplace) -> Result:
    """Compute what `spec` names into `place.out` and return its result, JSON values only.

    The memory that was kept meanwhile is given back, models that refer to themselves included: the process may stay,
    and wait for the next stage, or go on with something else, for which the compiled core is as it was.
    """
    try:
        with native.as_found():
            return STAGES[spec.kind](spec, place)
    finally:
        gc.collect()
        give_back_freed_memory()


def pretrain_teacher(spec: TeacherSpec, place: Workplace) -> Result:
    """Train the embedded teacher and save it as a Hugging Face folder."""
    prepare(spec.numerics, spec.seed)
    teacher = new_teacher(spec.architecture, spec.seed).to(place.context.device).train()
    around = _sharded(spec, place, teacher)
    optimizers = make_optimizers(teacher, spec.optimizer)
    training = _language_modelling(spec, teacher, optimizers, place, spec.seed)
    result = train(dataclasses.replace(training, role="teacher", loss=around(training.loss)), place)
    teacher.save_pretrained(place.out, state_dict={name: whole(value) for name, value in teacher.state_dict().items()})
    return {**result, "parameters": parameter_count(teacher)}


def train_from_scratch(spec: ScratchSpec, place: Workplace) -> Result:
    """The control: a student's architecture on the same tokens, from random weights and without a teacher."""
    prepare(spec.numerics, spec.seed)
    if spec.teacher is None:
        model = new_teacher(spec.architecture, spec.seed)
    else:
        model = random_like(place.inputs["teacher"], spec.seed)
        check_output_head(model.eval())
    swap(model, spec.layers, by_layer(spec.operator, spec.layers), torch.Generator().manual_seed(spec.seed))
    model.to(place.context.device).train()
    if spec.checkpoint_activations:
        recompute_layers(model)
    around = _sharded(spec, place, model)
    optimizers = make_optimizers(model, spec.optimizer)
    training = _language_modelling(spec, model, optimizers, place, spec.seed + STUDENT_ORDER)
    result = train(dataclasses.replace(training, loss=around(training.loss)), place)
    save_student(model, None, place.out)
    return {**result, "parameters": parameter_count(model)}


def distil(spec: DistilSpec, place: Workplace) -> Result:
    """Swap the new layers, distil, and save what differs from the teacher."""
    prepare(spec.numerics, spec.seed)
    teacher = frozen_teacher(spec, place)
    student = load_student(place.inputs["parent"], sharing(teacher))
    swap_layers(student, spec.new_layers, spec, place)
    train_operators_only(student)
    result: Result = {"seconds": 0.0, "tokens": 0, "tokens_per_s": None}
    if spec.phases:
        choose_trained(student, spec.optimizer, spec.freeze)
        if spec.checkpoint_activations:
            recompute_layers(student)
        around = _sharded(spec, place, student, teacher)
        optimizers = make_optimizers(student, spec.optimizer, spec.freeze)
        training = _distillation(spec, teacher, student, optimizers, place)
        result = train(dataclasses.replace(training, loss=around(training.loss)), place)
    save_student(student, teacher.state_dict(), place.out)
    return {**result, "parameters": parameter_count(student), **trainable_counts(student)}


def _sharded(spec: Any, place: Workplace, model: Any, teacher: Any = None) -> Callable[[Loss], Loss]:
    """Give a model memory of its own for what trains, spread over the ranks if the study says so.

    Returns what to put around the loss of a step.
    """
    if spec.numerics.sharding == "full":
        return shard(place.context.device, model, teacher)
    if teacher is not None:
        own_what_trains(model, teacher)
    return lambda loss: loss


def _language_modelling(
    spec: TeacherSpec | ScratchSpec,
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    place: Workplace,
    order: int,
) -> Training:
    tokens = load_tokens(place.inputs["tokens"], "train")
    size, length, limit = spec.batch_size, spec.sequence_length, getattr(spec, "text_windows", None)

    def loss(step: int) -> tuple[Tensor, Parts]:
        ids_BL = batch(tokens, length, order, *share(step * size, size), limit).to(place.context.device)
        with autocast(spec.numerics, place.context.device):
            entropy = next_token_loss(model, ids_BL)
        return entropy, {"loss/ce": entropy.detach()}

    steps = spec.token_budget // (size * length)
    return Training(model, optimizers, spec.optimizer, steps, size * length, loss)


def _distillation(
    spec: DistilSpec, teacher: Any, student: Any, optimizers: list[torch.optim.Optimizer], place: Workplace
) -> Training:
    tokens = load_tokens(place.inputs["tokens"], "train")
    size, length = spec.batch_size, spec.sequence_length
    phase_of_step = [phase for phase in spec.phases for _ in range(phase.steps)]

    def loss(step: int) -> tuple[Tensor, Parts]:
        mine = share(spec.first_sequence + step * size, size)
        ids_BL = batch(tokens, length, spec.seed + STUDENT_ORDER, *mine, spec.text_windows).to(place.context.device)
        with autocast(spec.numerics, place.context.device):
            return batch_losses(teacher, student, ids_BL, spec.layers, phase_of_step[step].losses)

    return Training(student, optimizers, spec.optimizer, len(phase_of_step), size * length, loss)


STAGES: dict[str, Callable[[Any, Workplace], Result]] = {
    "tokens": prepare_tokens,
    "import": import_teacher,
    "teacher": pretrain_teacher,
    "scratch": train_from_scratch,
    "distil": distil,
    "evaluate": evaluate,
    "probes": probe,
    "throughput": measure_throughput,
    "score": score,
    "blend": blend,
    "choice": choose,
    "draw": draw,
    "tasks": measure_task,
}
