"""What a stage begins with: a student in which some layers have operators as they start.

Place in the flow: `distil` trains what this gives, `score` measures it, `blend` mixes it with the attention. Invariant:
the same fields of a specification give the same bits in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operators.config import OperatorConfig
from operators.transfer.attention import AttentionStatistics
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import STUDENT_ORDER, batch, load_tokens
from orchestrator.distill.measuring.statistics import SEQUENCES, attention_statistics
from orchestrator.distill.models.student import load_operators
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training.loop import held
from orchestrator.study.placing import by_layer
from orchestrator.study.spec import BlendSpec, DistilSpec, ScoreSpec

Swapping = DistilSpec | ScoreSpec | BlendSpec


def swap_layers(student: torch.nn.Module, layers: tuple[int, ...], spec: Swapping, place: Workplace) -> None:
    """Swap layers of `student` (in place) for the operators of `spec`, in float32.

    Operators start as they are configured, drawn from the seed of `spec` in the order of `layers`; those of a stage
    that has a prepared student are that one's, else a `ValueError`, see `load_operators`.
    """
    operators = by_layer(spec.operator, layers)
    if "prepared" in place.inputs:
        for layer, operator in operators.items():
            load_operators(place.inputs["prepared"], student, (layer,), operator)
        return
    generator = torch.Generator().manual_seed(spec.seed)
    statistics = _statistics(student, operators, spec, place)
    swap(student, layers, operators, generator, statistics=statistics, dtype=torch.float32)


def _statistics(
    student: torch.nn.Module, operators: Mapping[int, OperatorConfig], spec: Swapping, place: Workplace
) -> dict[int, AttentionStatistics]:
    """By layer, what the attention that is about to be replaced does on the first text of the path, where it matters.

    Computed on the stage's device, told on the CPU, where operators are set.
    """
    needing: dict[bool, list[int]] = {}  # layers, by whether their operators have a window
    for layer, operator in operators.items():
        if getattr(operator, "needs_statistics", False):
            needing.setdefault(getattr(operator, "window", None) is not None, []).append(layer)
    if not needing:
        return {}
    tokens = load_tokens(place.inputs["tokens"], "train")
    ids_BL = batch(tokens, spec.sequence_length, spec.seed + STUDENT_ORDER, 0, SEQUENCES, spec.text_windows)
    ids_BL = ids_BL.to(place.context.device)
    found: dict[int, AttentionStatistics] = {}
    with held(spec.numerics, place.context.device):
        for near, layers in needing.items():
            found |= attention_statistics(student, tuple(layers), ids_BL, near=near)
    return found
