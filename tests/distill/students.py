"""Students that did not have to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from operators.config import OperatorConfig
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap


def student_of(teacher: Path, placed: Mapping[int, OperatorConfig]) -> Any:
    """A student whose operators, by layer, do more than copied projections do: all that they hold is moved a little."""
    model = load_teacher(teacher)
    for layer, config in placed.items():
        made = swap(model, [layer], config, torch.Generator().manual_seed(layer))[0]
        with torch.no_grad():
            for parameter in made.operator.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()
