"""A stage that asks a model a task of lm-eval: the model loaded as it was trained beside, the scores by item.

Place in the flow: `layerswap evaluate` plans these stages, one for every model and task; the teacher's is the same for
all its students. Invariant: what is asked is what the specification's fingerprint says, or the stage fails.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from operators.decoding.kept import frozen_filters
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import load_tokenizer
from orchestrator.distill.measuring.harness import ask, load_task
from orchestrator.distill.measuring.scores import Items, write_items
from orchestrator.distill.models import whole
from orchestrator.distill.models.sites import longest_text
from orchestrator.distill.models.student import load_student, load_teacher, parameter_count
from orchestrator.distill.training.loop import held, prepare
from orchestrator.study.spec import TasksSpec


def measure_task(spec: TasksSpec, place: Workplace) -> dict[str, Any]:
    """Ask the task and keep what its items gave.

    Returns:
        items; requests; parameters; metrics: by name the value, its standard error and the chance level, each None
        where there is none.

    Raises:
        ValueError: the task's files changed meanwhile.
        ArithmeticError: a score is not finite.
    """
    prepare(spec.numerics, spec.seed)
    file = Path(place.context.locations[spec.fingerprint].files[0])
    asked = load_task(spec.task, file, spec.limit, spec.rotate)
    if asked.fingerprint != spec.fingerprint:
        raise ValueError(f"task {spec.task} of {file} changed while it was waited for: run the same command")
    model, tokenizer = _model(spec, place)
    length = longest_text(model.config)
    narrow = torch.bfloat16 if spec.numerics.teacher_dtype == "bfloat16" else None
    with frozen_filters(model), held(spec.numerics, place.context.device):
        found = ask(asked, model, tokenizer, spec.batch_size, max_length=length, mixed_precision_dtype=narrow)
    write_items(place.out, {name: score for name, score in found.items() if isinstance(score, Items)})
    metrics = {name: _told(score) for name, score in found.items()}
    bad = [name for name, told in metrics.items() if not math.isfinite(told["value"])]
    if bad:
        raise ArithmeticError(f"task {spec.task} gave no finite {', '.join(bad)}: the model has diverged")
    return {
        "items": asked.items,
        "requests": asked.requests,
        "parameters": parameter_count(model),
        "metrics": metrics,
    }


def _told(score: Items | float) -> dict[str, Any]:
    if isinstance(score, Items):
        return {"value": score.value, "stderr": score.stderr, "chance": score.guess}
    return {"value": score, "stderr": None, "chance": None}


def _model(spec: TasksSpec, place: Workplace) -> tuple[Any, Any]:
    """The model that is asked, in evaluation mode on the device, and its tokenizer."""
    device = place.context.device
    if spec.folder is not None:
        given = whole.Given(place.context.locations[spec.folder].files[0])
        model = whole.load_whole(given).eval().requires_grad_(False)
        return model.to(device), whole.load_tokenizer(given, model.config)
    teacher = load_teacher(place.inputs["teacher"], spec.numerics.teacher_dtype)
    return load_student(place.inputs["subject"], teacher).eval().to(device), load_tokenizer(place.inputs["tokens"])
