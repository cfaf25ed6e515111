"""Gradients of a layer from its input alone: what else its forward pass keeps is computed again for them.

Place in the flow: a stage asks for it where `recipe.checkpoint_activations` does. transformers has the same for models
in training mode only; a student of distillation is in evaluation mode, so that dropout is off (`train_operators_only`).
Invariant: outputs and gradients have the bits of the model without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.distill.models.sites import decoder_layers


def recompute_layers(model: Any) -> None:
    """Let every layer of a model, operator or attention in it, keep its input only, whenever gradients are taken."""
    for block in decoder_layers(model):
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **more)
    return checkpoint(forward, *arguments, use_reentrant=False, **more)
