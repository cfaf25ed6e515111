"""Where the attention of each model family sits and how its weights read. A new family is one entry here.

The sizes of a model are read by the plan from its configuration, see `orchestrator.study.shapes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from operators.transfer.attention import AttentionWeights


@dataclasses.dataclass(frozen=True)
class Family:
    """How to find and read the attention of a model."""

    layers: Callable[[nn.Module], nn.ModuleList]
    attribute: str  # of the attention module in a layer
    read: Callable[[Any], AttentionWeights]
    cache_argument: str  # by which a layer hands its attention the cache


def _gpt_neox_layers(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.gpt_neox.layers
    return layers


def _gpt_neox_weights(attention: Any) -> AttentionWeights:
    """GPT-NeoX keeps query, key and value of a head next to each other: rows (heads, 3, head size)."""
    heads = attention.config.num_attention_heads
    fused, dense = attention.query_key_value, attention.dense
    size = fused.weight.shape[0] // (3 * heads)

    def part(tensor: torch.Tensor, which: int) -> torch.Tensor:
        rows = tensor.detach().view(heads, 3, size, *tensor.shape[1:])[:, which]
        return rows.reshape(heads * size, *tensor.shape[1:]).clone()

    biases: list[torch.Tensor | None] = [None, None, None]
    if fused.bias is not None:
        biases = [part(fused.bias, which) for which in range(3)]
    return AttentionWeights(
        query=part(fused.weight, 0),
        key=part(fused.weight, 1),
        value=part(fused.weight, 2),
        output=dense.weight.detach().clone(),
        heads=heads,
        query_bias=biases[0],
        key_bias=biases[1],
        value_bias=biases[2],
        output_bias=None if dense.bias is None else dense.bias.detach().clone(),
    )


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(_gpt_neox_layers, "attention", _gpt_neox_weights, "layer_past"),
}


def family_of(model: Any) -> Family:
    """The family of a model; `ValueError` naming the supported ones where there is none."""
    name = model.config.model_type.removeprefix("layerswap_")  # an exported student keeps its family
    if name not in FAMILIES:
        raise ValueError(f"model type {name!r} cannot be swapped yet; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]
