"""Where the rows of an attention's projections lie: separate ones under usual names, or fused in an order of heads.

Shapes: D model width, H heads, G heads of keys and values, K width of a head's query and key, V of its value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

QUERIES, KEYS, VALUES = ("q_proj",), ("k_proj",), ("v_proj",)
FUSED = ("query_key_value", "qkv_proj", "Wqkv", "c_attn")
OUTPUTS = ("o_proj", "out_proj", "dense", "Wo", "c_proj")
QUERY_NORMS, KEY_NORMS = ("q_norm", "q_layernorm", "query_layernorm"), ("k_norm", "k_layernorm", "key_layernorm")
VALUE_NORMS, BOTH_NORMS = ("v_norm",), ("qk_norm",)
GATES = ("gate_proj", "g_proj")
Rows = tuple[Tensor, Tensor | None]  # weight (rows, D) and bias (rows,)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The rows of an attention's projections as they lie: queries (H K), keys (G K), values (G V), gates (H or H V)."""

    query: Rows
    key: Rows
    value: Rows
    gate: Rows | None = None


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


def head_size(attention: Any) -> int:
    """K, as the attention says it. ValueError where it does not."""
    for name in ("head_dim", "head_size"):
        if isinstance(found := getattr(attention, name, None), int):
            return found
    raise ValueError(f"{type(attention).__name__} does not say how wide its heads are: use init: random")


def separate(attention: Any) -> Parts:
    """Each part by a projection of its own, under a usual name."""
    value, gate = part(attention, VALUES), part(attention, GATES)
    key = rows_of(part(attention, KEYS))
    gates = None if gate is None else rows_of(gate)
    if gates is not None and (shift := getattr(attention, "gate_bias", None)) is not None:
        each = shift.detach().repeat_interleave(len(gates[0]) // len(shift))
        gates = gates[0], each if gates[1] is None else gates[1] + each
    return Parts(rows_of(part(attention, QUERIES)), key, key if value is None else rows_of(value), gates)


def heads_with_three(attention: Any) -> Parts:
    """Query, key and value of a head beside each other: rows (H, 3, K)."""
    rows, size = rows_of(part(attention, FUSED)), head_size(attention)
    cuts = [lambda t, i=i: t.unflatten(0, (-1, 3, size))[:, i].flatten(0, 1) for i in range(3)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def groups_then_two(attention: Any) -> Parts:
    """Falcon's: the queries of a group of heads, their key and their value: rows (G, H / G + 2, K)."""
    if not (attention.new_decoder_architecture or attention.multi_query):
        return heads_with_three(attention)
    rows, size = rows_of(part(attention, FUSED)), head_size(attention)
    groups = attention.num_kv_heads if attention.new_decoder_architecture else 1
    places = (slice(None, -2), slice(-2, -1), slice(-1, None))
    cuts = [lambda t, place=place: t.unflatten(0, (groups, -1, size))[:, place].flatten(0, 2) for place in places]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def queries_then_groups(attention: Any) -> Parts:
    """All queries, all keys, all values: rows H K, G K, G K; H K are as many as the output takes."""
    rows = rows_of(part(attention, FUSED))
    queries = rows_of(part(attention, OUTPUTS))[0].shape[1]
    keys = (len(rows[0]) - queries) // 2
    cuts = [lambda t, i=i: t.split([queries, keys, keys])[i] for i in range(3)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def big_code(attention: Any) -> Parts:
    """GPT-BigCode's, whose order hangs on whether heads share one key."""
    return (queries_then_groups if attention.multi_query else heads_with_three)(attention)


def code_gen(attention: Any) -> Parts:
    """In four blocks, each of a quarter of the heads: rows (4, 3, H K / 4), the value before the key."""
    rows = rows_of(part(attention, FUSED))
    cuts = [lambda t, i=i: t.unflatten(0, (4, 3, -1))[:, i].flatten(0, 1) for i in (0, 2, 1)]
    return Parts(*(_taken(rows, cut) for cut in cuts))


def _taken(rows: Rows, take: Callable[[Tensor], Tensor]) -> Rows:
    weight, bias = rows
    return take(weight), None if bias is None else take(bias)
