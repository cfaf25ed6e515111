"""What an attention computes, read from its module: weights of heads, scales, norms and gates.

What is not read is left to training, or to the profile of lags that a filter follows: rotations, sinks, soft caps,
biases by distance, clipped projections, dropout.

Shapes: D model width, H heads, G heads of keys and values, K width of a head's query and key, V of its value.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from operators.transfer.attention import AttentionStatistics, AttentionWeights, QueryKeyNorm
from orchestrator.distill.models.families import Family
from orchestrator.distill.models.projections import (
    BOTH_NORMS,
    KEY_NORMS,
    OUTPUTS,
    QUERY_NORMS,
    VALUE_NORMS,
    Rows,
    head_size,
    part,
    rows_of,
    separate,
)

SCALES = {"GPTNeoSelfAttention": 1.0}  # of classes that do not say it


def read(attention: Any, family: Family, statistics: AttentionStatistics | None = None) -> AttentionWeights:
    """What the attention computes, keys and values repeated for every head that shares them.

    A gate on what the heads gathered, and a norm of values, are taken at the mean input; without statistics a gate at
    an input of zero, and a norm of values not at all.

    Raises:
        ValueError: a part that cannot be read.
    """
    if family.read is not None:
        return family.read(attention, statistics)
    parts = (family.parts or separate)(attention)
    output, output_bias = rows_of(part(attention, OUTPUTS))
    size = head_size(attention)
    groups = len(parts.key[0]) // size
    heads = output.shape[1] // (len(parts.value[0]) // groups)
    query, gate = parts.query, parts.gate
    if len(query[0]) == 2 * heads * size:  # a gate lies beside the query of every head
        query, gate = _of_heads(query, heads, slice(0, size)), _of_heads(query, heads, slice(size, None))
    if len(query[0]) != heads * size or heads % groups:
        raise ValueError(
            f"{len(query[0])} rows of queries, {len(parts.key[0])} of keys and {len(parts.value[0])} of values make no "
            f"heads of {size}: use init: random"
        )
    key = _repeated(_scaled(parts.key, getattr(attention, "key_multiplier", None)), groups, heads)
    value = _repeated(_scaled(parts.value, getattr(attention, "v_scale", None)), groups, heads)
    for factor in (_gate_at_mean(family, gate, statistics), _norm_at_mean(attention, value, heads, statistics)):
        value = _scaled(value, factor if factor is None else factor.repeat_interleave(len(value[0]) // len(factor)))
    norms = [
        norm_of(part(attention, (*names, *BOTH_NORMS)), count, heads, size)
        for names, count in ((QUERY_NORMS, heads), (KEY_NORMS, groups))
    ]
    extra = getattr(attention, "dense_bias", None)  # which the layer adds
    return AttentionWeights(
        query[0].clone(), key[0].clone(), value[0].clone(), output.clone(), heads, query[1], key[1], value[1],
        output_bias if extra is None else extra.detach(), statistics, scale_of(attention),
        norms[0], norms[1],
    )  # fmt: skip


def on_processor(weights: AttentionWeights) -> AttentionWeights:
    """The same on the CPU, where operators are set, and in no less than single precision."""
    tensors: dict[str, Any] = {
        name: value.to("cpu", torch.promote_types(value.dtype, torch.float32))
        for name, value in vars(weights).items()
        if isinstance(value, Tensor)
    }
    return dataclasses.replace(weights, **tensors)


def widths(attention: Any, family: Family) -> tuple[int, int]:
    """D, and H V, what the heads gather."""
    if family.read is not None:
        return family.read(attention, None).output.shape  # type: ignore[return-value]
    width, inner = rows_of(part(attention, OUTPUTS))[0].shape
    return width, inner


def scale_of(attention: Any) -> float:
    """What the attention multiplies products of query and key by. ValueError where it does not say so."""
    if (known := SCALES.get(type(attention).__name__)) is not None:
        return known
    for name in ("scaling", "softmax_scale", "inv_norm_factor"):
        if (factor := getattr(attention, name, None)) is not None:
            return float(factor)
    for name in ("scale_attn", "norm_factor"):
        if (divisor := getattr(attention, name, None)) is not None:
            return 1.0 / float(divisor)
    raise ValueError(f"{type(attention).__name__} does not say how it scales its products: use init: random")


@torch.no_grad()
def norm_of(norm: Any, groups: int, heads: int, size: int) -> QueryKeyNorm | None:
    """A norm of `groups` heads of `size` channels, repeated for `heads`, by what it does to probes; None for None.

    Classes differ in how they keep their weights, so the norm is asked. ValueError for what is neither a layer norm nor
    divides by the root mean square.
    """
    if norm is None:
        return None
    norm = copy.deepcopy(norm).to("cpu", torch.float64)
    own = next(norm.parameters(), None)
    together = own is not None and groups > 1 and own.shape == (groups * size,)
    probe = 4.0 * torch.randn(4, groups, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = probe.flatten(1) if together else probe
    bias = _normed(norm, torch.zeros_like(given[:1]))[0].double()
    for centred in (False, True):
        x = given - given.mean(-1, keepdim=True) if centred else given
        weight = (_normed(norm, given).double() - bias) * x.square().mean(-1, keepdim=True).sqrt() / x
        if torch.allclose(weight, weight[:1].expand_as(weight), rtol=1e-3, atol=1e-4):
            parts = [
                part.float().view(groups, size).repeat_interleave(heads // groups, 0) for part in (weight.mean(0), bias)
            ]
            if together:
                parts = [part.flatten() for part in parts]
            elif all(torch.allclose(part, part[:1].expand_as(part), rtol=1e-5, atol=1e-6) for part in parts):
                parts = [part[0] for part in parts]
            return QueryKeyNorm(parts[0], parts[1] if bool(parts[1].any()) else None, centred)
    raise ValueError(f"what {type(norm).__name__} does to queries and keys cannot be read: use init: random")


def _normed(norm: Any, x: Tensor) -> Tensor:
    if isinstance(each := getattr(norm, "norms", None), nn.ModuleList):  # one for every head
        return torch.stack([one(x[:, head]) for head, one in enumerate(each)], dim=1)
    found: Tensor = norm(x)
    return found


def _gate_at_mean(family: Family, gate: Rows | None, statistics: AttentionStatistics | None) -> Tensor | None:
    if gate is None:
        return None
    weight, bias = gate
    logits = weight.new_zeros(len(weight)) if bias is None else bias
    if statistics is not None:
        logits = logits + weight @ statistics.input_mean.to(weight)
    return family.gate(logits)


def _norm_at_mean(attention: Any, value: Rows, heads: int, statistics: AttentionStatistics | None) -> Tensor | None:
    """One over the root mean square of every head's values."""
    if part(attention, VALUE_NORMS) is None or statistics is None:
        return None
    mean, covariance = (found.double().to(value[0].device) for found in statistics.inputs)
    weight = value[0].double()
    at_mean = weight @ mean + (0.0 if value[1] is None else value[1].double())
    square = (weight @ covariance * weight).sum(1) + at_mean.square()
    return square.view(heads, -1).mean(1).rsqrt().to(value[0])


def _scaled(rows: Rows, factor: Any) -> Rows:
    """Rows times a number, or times one number each."""
    if factor is None:
        return rows
    weight, bias = rows
    each = factor[:, None] if isinstance(factor, Tensor) else factor
    return weight * each, None if bias is None else bias * factor


def _of_heads(rows: Rows, heads: int, chosen: slice) -> Rows:
    """Of the rows of every head the chosen ones."""
    weight, bias = (None if part is None else part.unflatten(0, (heads, -1))[:, chosen].flatten(0, 1) for part in rows)
    assert weight is not None
    return weight, bias


def _repeated(rows: Rows, groups: int, heads: int) -> Rows:
    """The rows of every group for all heads that share them."""
    weight, bias = (
        None if part is None else part.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)
        for part in rows
    )
    assert weight is not None
    return weight, bias
