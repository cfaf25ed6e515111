"""The frozen teacher that a stage distils from or measures beside."""

from __future__ import annotations

from typing import Any

from orchestrator.distill.context import Workplace
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.training.head import check_output_head
from orchestrator.distill.training.loop import held


def frozen_teacher(spec: Any, place: Workplace) -> Any:
    """The stage's teacher on its device, in the precision that its numerics say.

    Raises ValueError where its logits cannot be made of its last hidden state, as losses and measurements make them.
    """
    device = place.context.device
    teacher = load_teacher(place.inputs["teacher"], spec.numerics.teacher_dtype).to(device)
    with held(spec.numerics, device):
        check_output_head(teacher)
    return teacher
