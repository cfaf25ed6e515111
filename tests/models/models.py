"""Teachers and students of every type, small and with weights that matter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig, OperatorConfig
from orchestrator.distill.models.sites import sites
from orchestrator.distill.models.swap import swap
from tests.models.tiny import VOCABULARY, build

CHANNELS = HyenaConfig()
HEADS = HyenaConfig(
    heads=2, feature_map="power", key_dim=4, normalise=True, key_gate=True, filter=ImplicitFilterConfig(positive=True)
)
TEXT = 14  # positions: longer than a tiny window, shorter than a tiny model's longest text


def teacher_of(name: str, seed: int = 0, **more: Any) -> Any:
    """A model whose matrices are large enough to matter, norms and biases as trained ones have them."""
    model = build(name, seed, **more)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(0.1 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def student_of(name: str, operator: OperatorConfig = CHANNELS, every: int = 1, **more: Any) -> Any:
    """The same model, all sites swapped or every second one, with operators that do more than they start with."""
    model = teacher_of(name, **more)
    for layer in list(sites(model))[::every]:
        placed = swap(model, [layer], operator, torch.Generator().manual_seed(layer))[0]
        with torch.no_grad():
            for parameter in placed.operator.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def text(rows: int = 2, length: int = TEXT, seed: int = 1) -> Tensor:
    """Tokens (rows, length), none of them special."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """(B, L, V), without a cache unless one is asked for."""
    found: Tensor = model(input_ids=ids, **{"use_cache": False, **more}).logits
    return found


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has such an argument, or hands it on to its decoder's."""
    own, inside = (inspect.signature(one.forward).parameters for one in (model, model.get_decoder()))
    return argument in own or (argument in inside and "kwargs" in own)


def near(found: Tensor, wanted: Tensor, tolerance: float = 2e-4) -> bool:
    """Equal but for rounding, at the scale of what is wanted."""
    found, wanted = found.detach(), wanted.detach()
    scale = float(wanted.abs().max())
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= tolerance * scale
