"""Quality of a model on validation text, the teacher beside it: likelihood, agreement, copying, generation.

Perplexity alone hides what a long convolution loses first, in-context copying, so the loss is also split into hits
(tokens that complete a trigram already seen in the window) and misses.

The teacher's last hidden states and what it generates are the same for every subject: its own evaluation keeps them,
the others read them. Its logits are made of them again, chunk by chunk; kept, they would be V / D times as large.

Shapes: B windows, L positions, P = L - 1 predicted positions, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from operators.decoding.kept import frozen_filters
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import load_tokens, spread_windows
from orchestrator.distill.hits import trigram_hits
from orchestrator.distill.measuring.generation import compare, perplexity, speak
from orchestrator.distill.measuring.likelihood import hidden_states, token_table
from orchestrator.distill.models.student import load_student, parameter_count, sharing
from orchestrator.distill.training.frozen import frozen_teacher
from orchestrator.distill.training.loop import DIVERGED, prepare
from orchestrator.study.spec import EvaluateSpec

TEACHER = "teacher.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherSide:
    """What the teacher makes of the text: hidden states (B, L, D), and what it says itself, see `speak`."""

    hidden_BLD: Tensor
    said: dict[str, Tensor]


def evaluate(spec: EvaluateSpec, place: Workplace) -> dict[str, Any]:
    """The metrics of a stage.

    Returns:
        perplexity, accuracy, hit_nll, miss_nll (nats per token) of the subject and, as `teacher_*`, of the teacher;
        perplexity_ratio; agreement (share of positions with the teacher's top-1); kl (teacher || subject, nats per
        token); generation_agreement (share of greedily generated tokens equal to the teacher's) and generation_prefix
        (tokens before the first difference); greedy_ and sampled_generation_perplexity (the teacher's, of what the
        subject generates) and, as `teacher_*`, the same of what the teacher generates; parameters; tokens evaluated.

    Raises:
        ArithmeticError: a metric is not finite, since the student (or the teacher) has diverged.
    """
    prepare(spec.numerics)
    device = place.context.device
    teacher = frozen_teacher(spec, place)
    subject = load_student(place.inputs["subject"], sharing(teacher)).eval()
    tokens = load_tokens(place.inputs["tokens"], "valid")
    windows_BL = spread_windows(tokens, spec.sequence_length, spec.evaluation.tokens)
    with frozen_filters(subject):
        side = _teacher_side(teacher, windows_BL, spec, place)
        result = _likelihood(teacher, subject, side, windows_BL, spec, device)
        _check_finite(result)
        result |= compare(speak(subject, teacher, windows_BL, spec, device), side.said)
        _check_finite(result)
    return {**result, "parameters": parameter_count(subject)}


def _check_finite(result: dict[str, float]) -> None:
    bad = [name for name, value in result.items() if not math.isfinite(value)]
    if bad:
        role = "teacher" if any(name.startswith("teacher_") for name in bad) else "student"
        raise ArithmeticError(f"evaluation gave no finite {', '.join(bad)}: {DIVERGED[role]}")


@torch.no_grad()
def _teacher_side(teacher: Any, windows_BL: Tensor, spec: EvaluateSpec, place: Workplace) -> TeacherSide:
    """Read from the teacher's own evaluation, or computed and left beside this one's result."""
    if "reference" in place.inputs:
        kept = load_file(place.inputs["reference"] / TEACHER)
        return TeacherSide(kept.pop("hidden"), kept)
    device = place.context.device
    hidden_BLD = hidden_states(teacher, windows_BL, spec.evaluation.batch_size, spec.numerics, device)
    side = TeacherSide(hidden_BLD, speak(teacher, teacher, windows_BL, spec, device))
    save_file({"hidden": side.hidden_BLD, **side.said}, place.out / TEACHER)
    return side


def _likelihood(
    teacher: Any, subject: Any, side: TeacherSide, windows_BL: Tensor, spec: EvaluateSpec, device: str
) -> dict[str, float]:
    hits_N = trigram_hits(windows_BL).flatten()
    batch = spec.evaluation.batch_size
    table = token_table(teacher, subject, side.hidden_BLD, windows_BL, batch, spec.numerics, device)
    own, teachers = (perplexity(table[name]) for name in ("nll", "teacher_nll"))
    return {
        "perplexity": own,
        "perplexity_ratio": own / teachers,
        "accuracy": float(table["right"].mean()),
        "agreement": float(table["same"].mean()),
        "kl": float(table["kl"].mean()),
        "hit_share": float(hits_N.double().mean()),
        **_split("", table["nll"], hits_N),
        "teacher_perplexity": teachers,
        "teacher_accuracy": float(table["teacher_right"].mean()),
        **_split("teacher_", table["teacher_nll"], hits_N),
        "tokens": float(len(hits_N)),
    }


def _split(prefix: str, nll_N: Tensor, hits_N: Tensor) -> dict[str, float]:
    """Mean loss on hits and on misses; a class without tokens has no entry, for no number would be true."""
    chosen = {"hit_nll": nll_N[hits_N], "miss_nll": nll_N[~hits_N]}
    return {prefix + name: float(values.mean()) for name, values in chosen.items() if len(values)}
