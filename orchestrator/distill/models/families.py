"""How the attention of a decoder reads as query, key, value and output maps of each head.

Most have separate projections under usual names and need no entry. Fused ones keep the heads' rows in an order that no
name tells, so each class that has one is an entry of `FAMILIES`; entries of others come by entry points of the group
`layerswap.families`, by model type or by class of the attention.

What is not read is left to training, or to the profile of lags that a filter follows: rotations, sinks, soft caps,
biases by distance, clipped projections, dropout.

Shapes: D model width, H heads, G heads of keys and values, K width of a head's query and key, V of its value.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from operators.transfer.attention import AttentionStatistics, AttentionWeights, QueryKeyNorm
from orchestrator.distill.models.masks import BLOCKED

GROUP = "layerswap.families"
QUERIES, KEYS, VALUES = ("q_proj",), ("k_proj",), ("v_proj",)
FUSED = ("query_key_value", "qkv_proj", "Wqkv", "c_attn")
OUTPUTS = ("o_proj", "out_proj", "dense", "Wo", "c_proj")
QUERY_NORMS, KEY_NORMS = ("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm")
VALUE_NORMS, BOTH_NORMS = ("v_norm",), ("qk_norm",)
GATES = ("gate_proj", "g_proj")
Rows = tuple[Tensor, Tensor | None]  # weight (rows, D) and bias (rows,)


def _pair(output: Tensor, _: Mapping[str, Any]) -> Any:
    return output, None


def _first(answer: Any, _: Mapping[str, Any]) -> Tensor:
    output: Tensor = answer[0]
    return output


@dataclasses.dataclass(frozen=True)
class Parts:
    """The rows of an attention's projections as they lie: queries (H K), keys (G K), values (G V), gates (H or H V)."""

    query: Rows
    key: Rows
    value: Rows
    gate: Rows | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What neither the structure of a model nor the names in it tell.

    Attributes:
        parts: attention -> the rows of its projections; None for separate ones under usual names.
        read: attention, statistics or None -> `AttentionWeights`, where even that does not do; None: from the parts.
        layers: model -> its layers in order; None for the decoder's list of as many as the configuration says.
        attention: path of the attention in a layer, such as "mixer.attn"; None where it is found by its projections.
        answer: (B, L, D) output and the arguments of a call by name -> what the layer expects back; usually a pair of
            the output and attention weights, of which there are none.
        mixed: the other way round: what an attention answers, and the arguments -> its output.
        gate: what the gate's rows go through.
        visible: a mask as the attention gets it -> one of the usual kinds, see `masks.pattern_of`.
        any_strides: whether the layer takes an output whose positions lie last in memory; else it gets a copy.
    """

    parts: Callable[[Any], Parts] | None = None
    read: Callable[[Any, AttentionStatistics | None], AttentionWeights] | None = None
    layers: Callable[[Any], Sequence[nn.Module]] | None = None
    attention: str | None = None
    answer: Callable[[Tensor, Mapping[str, Any]], Any] = _pair
    mixed: Callable[[Any, Mapping[str, Any]], Tensor] = _first
    gate: Callable[[Tensor], Tensor] = torch.sigmoid
    visible: Callable[[Tensor], Tensor] | None = None
    any_strides: bool = False


def family_of(model_type: str, attention: nn.Module | None = None) -> Family:
    """The entry of a model type, or of the class of an attention; the usual one where there is none."""
    entries = families()
    return entries.get(model_type) or entries.get(type(attention).__name__) or Family()


@functools.cache
def families() -> dict[str, Family]:
    """All entries by name, those of installed packages before those of this one. ValueError for what is no Family."""
    installed = {entry.name: entry.load() for entry in entry_points(group=GROUP)}
    # By name: an exported folder brings its own copy of the class.
    wrong = [name for name, family in installed.items() if type(family).__name__ != Family.__name__]
    if wrong:
        raise ValueError(f"the entry point {wrong[0]!r} of {GROUP} must be a Family, see docs/families.md")
    return FAMILIES | installed


def part(attention: Any, names: Sequence[str]) -> Any:
    """The first of these modules that the attention has; None where it has none."""
    return next((found for name in names if (found := getattr(attention, name, None)) is not None), None)


def rows_of(linear: Any) -> Rows:
    """Weight (out, in) and bias of a linear layer in single precision or more; GPT-2's keeps its weight transposed."""
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ValueError(f"a projection of type {type(linear).__name__} cannot be read: use init: random")
    weight, bias = (None if one is None else one.detach() for one in (linear.weight, linear.bias))
    kind = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.t() if isinstance(linear, Conv1D) else weight
    return weight.to(kind), None if bias is None else bias.to(kind)


def read(attention: Any, family: Family, statistics: AttentionStatistics | None = None) -> AttentionWeights:
    """What the attention computes, keys and values repeated for every head that shares them.

    A gate on what the heads gathered, and a norm of values, are taken at the mean input; without statistics a gate at
    an input of zero, and a norm of values not at all.

    Raises:
        ValueError: a part that cannot be read.
    """
    if family.read is not None:
        return family.read(attention, statistics)
    parts = (family.parts or _separate)(attention)
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


def head_size(attention: Any) -> int:
    """K, as the attention says it. ValueError where it does not."""
    for name in ("head_dim", "head_size"):
        if isinstance(found := getattr(attention, name, None), int):
            return found
    raise ValueError(f"{type(attention).__name__} does not say how wide its heads are: use init: random")


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


def _separate(attention: Any) -> Parts:
    value, gate = part(attention, VALUES), part(attention, GATES)
    key = rows_of(part(attention, KEYS))
    gates = None if gate is None else rows_of(gate)
    if gates is not None and (shift := getattr(attention, "gate_bias", None)) is not None:
        each = shift.detach().repeat_interleave(len(gates[0]) // len(shift))
        gates = gates[0], each if gates[1] is None else gates[1] + each
    return Parts(rows_of(part(attention, QUERIES)), key, key if value is None else rows_of(value), gates)


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


def _taken(rows: Rows, take: Callable[[Tensor], Tensor]) -> Rows:
    weight, bias = rows
    return take(weight), None if bias is None else take(bias)


def _heads_with_three(attention: Any) -> Parts:
    """Query, key and value of a head beside each other: rows (H, 3, K)."""
    rows, size = rows_of(part(attention, FUSED)), head_size(attention)
    cuts = [lambda t, i=i: t.unflatten(0, (-1, 3, size))[:, i].flatten(0, 1) for i in range(3)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def _groups_then_two(attention: Any) -> Parts:
    """Falcon's: the queries of a group of heads, their key and their value: rows (G, H / G + 2, K)."""
    if not (attention.new_decoder_architecture or attention.multi_query):
        return _heads_with_three(attention)
    rows, size = rows_of(part(attention, FUSED)), head_size(attention)
    groups = attention.num_kv_heads if attention.new_decoder_architecture else 1
    places = (slice(None, -2), slice(-2, -1), slice(-1, None))
    cuts = [lambda t, place=place: t.unflatten(0, (groups, -1, size))[:, place].flatten(0, 2) for place in places]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def _queries_then_groups(attention: Any) -> Parts:
    """All queries, all keys, all values: rows H K, G K, G K; H K are as many as the output takes."""
    rows = rows_of(part(attention, FUSED))
    queries = rows_of(part(attention, OUTPUTS))[0].shape[1]
    keys = (len(rows[0]) - queries) // 2
    cuts = [lambda t, i=i: t.split([queries, keys, keys])[i] for i in range(3)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def _big_code(attention: Any) -> Parts:
    return (_queries_then_groups if attention.multi_query else _heads_with_three)(attention)


def _code_gen(attention: Any) -> Parts:
    """In four blocks, each of a quarter of the heads: rows (4, 3, H K / 4), the value before the key."""
    rows = rows_of(part(attention, FUSED))
    cuts = [lambda t, i=i: t.unflatten(0, (4, 3, -1))[:, i].flatten(0, 1) for i in (0, 2, 1)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def _with_residual(output: Tensor, given: Mapping[str, Any]) -> Any:
    residual = given.get("residual")
    return output if residual is None else output + residual, None


def _without_residual(answer: Any, given: Mapping[str, Any]) -> Tensor:
    residual = given.get("residual")
    return _first(answer, given) if residual is None else _first(answer, given) - residual


def _without_bias(mask: Tensor) -> Tensor:
    """Falcon's mask has its bias by distance in it; what is blocked is far below."""
    return mask > BLOCKED if mask.is_floating_point() else mask


def _with_no_bias(output: Tensor, _: Mapping[str, Any]) -> Any:
    """What the layer adds a bias to, and none, for the operator's output has it."""
    return output, None, None


def _with_its_bias(answer: Any, given: Mapping[str, Any]) -> Tensor:
    return _first(answer, given) if answer[2] is None else _first(answer, given) + answer[2]


SCALES = {"GPTNeoSelfAttention": 1.0}  # of classes that do not say it
FAMILIES: dict[str, Family] = {
    "BloomAttention": Family(_heads_with_three, answer=_with_residual, mixed=_without_residual),
    "CodeGenAttention": Family(_code_gen),
    "DbrxAttention": Family(_queries_then_groups),
    "FalconAttention": Family(_groups_then_two, visible=_without_bias),
    "GPT2Attention": Family(_queries_then_groups),
    "GPTBigCodeAttention": Family(_big_code),
    "GPTNeoXAttention": Family(_heads_with_three, any_strides=True),
    "GPTNeoXJapaneseAttention": Family(_heads_with_three, answer=_with_no_bias, mixed=_with_its_bias),
    "LagunaAttention": Family(gate=nn.functional.softplus),
    "MptAttention": Family(_queries_then_groups, visible=torch.logical_not),
    "PersimmonAttention": Family(_heads_with_three),
    "Phi3Attention": Family(_queries_then_groups),
    "Phi4MultimodalAttention": Family(_queries_then_groups),
}
