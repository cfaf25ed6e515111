"""Queries and keys of an attention so that operators can do with them what it does.

Shapes: D model width, H heads, K width of a head's query and key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from operators.transfer.attention import Affine, AttentionWeights, QueryKeyNorm
from operators.transfer.rotation import Rotation


@dataclass(frozen=True, eq=False)
class Turned:
    """Queries or keys in order: rows (H K, D) and biases (H K,); what their norm multiplies by and adds, (H K,) each,
    or None for none."""

    rows: Affine
    norm: Affine | None


def norm_kind(attention: AttentionWeights) -> str:
    """The name that `HyenaConfig.near_norm` has for what the attention does to queries and keys. ValueError where it
    does not do the same to both."""
    kinds = {_kind(norm, attention) for norm in (attention.query_norm, attention.key_norm)}
    if len(kinds) > 1:
        raise ValueError(
            f"queries and keys are normed unlike each other ({', '.join(sorted(kinds))}): leave out window"
        )
    return kinds.pop()


def _kind(norm: QueryKeyNorm | None, attention: AttentionWeights) -> str:
    if norm is None:
        return "none"
    together = attention.heads > 1 and norm.weight.shape == (len(attention.query),)
    return ("layer" if norm.centred else "rms") + ("_all" if together else "")


def turned(attention: AttentionWeights, rotation: Rotation) -> tuple[Tensor, Turned, Turned]:
    """Frequencies (K // 2,), queries and keys, whose products times K^-1/2 are the attention's logits."""
    width, heads = attention.key_width, attention.heads
    frequencies, channels, factors = rotation.in_order(width)
    scale = 1.0 if attention.scale is None else attention.scale * float(width) ** 0.5
    found = []
    for name, norm, size in (("query", attention.query_norm, scale), ("key", attention.key_norm, 1.0)):
        by_head = [x.double().unflatten(0, (heads, width))[:, channels] for x in _rows(attention, name)]
        each = (factors * size).expand(heads, -1)
        if norm is None:
            found.append(Turned((_flat(by_head[0] * each[..., None]), _flat(by_head[1] * each)), None))
        else:
            weight, bias = _of_heads(norm.weight, heads, width), _of_heads(norm.bias, heads, width)
            made = _flat(weight[:, channels] * each), _flat(bias[:, channels] * each)
            found.append(Turned((_flat(by_head[0]), _flat(by_head[1])), made))
    return frequencies, found[0], found[1]


def _rows(attention: AttentionWeights, name: str) -> Affine:
    return getattr(attention, name), attention.bias_of(name)


def _of_heads(values: Tensor | None, heads: int, width: int) -> Tensor:
    """Values of a norm for every head, (H, K); zeros for None."""
    if values is None:
        return torch.zeros(heads, width, dtype=torch.float64)
    return values.double().reshape(-1, width).expand(heads, width)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1).contiguous()
