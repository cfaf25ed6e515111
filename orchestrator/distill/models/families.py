"""How the attention of a decoder reads as query, key, value and output maps of each head.

Most have separate projections under usual names and need no entry. Fused ones keep the heads' rows in an order that no
name tells, so each class that has one is an entry of `FAMILIES`; entries of others come by entry points of the group
`layerswap.families`, by model type or by class of the attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from operators.transfer.attention import AttentionStatistics, AttentionWeights
from orchestrator.distill.models.masks import BLOCKED
from orchestrator.distill.models.projections import (
    Parts,
    big_code,
    code_gen,
    groups_then_two,
    heads_with_three,
    queries_then_groups,
)

GROUP = "layerswap.families"


def _pair(output: Tensor, _: Mapping[str, Any]) -> Any:
    return output, None


def _first(answer: Any, _: Mapping[str, Any]) -> Tensor:
    output: Tensor = answer[0]
    return output


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


FAMILIES: dict[str, Family] = {
    "BloomAttention": Family(heads_with_three, answer=_with_residual, mixed=_without_residual),
    "CodeGenAttention": Family(code_gen),
    "DbrxAttention": Family(queries_then_groups),
    "FalconAttention": Family(groups_then_two, visible=_without_bias),
    "GPT2Attention": Family(queries_then_groups),
    "GPTBigCodeAttention": Family(big_code),
    "GPTNeoXAttention": Family(heads_with_three, any_strides=True),
    "GPTNeoXJapaneseAttention": Family(heads_with_three, answer=_with_no_bias, mixed=_with_its_bias),
    "LagunaAttention": Family(gate=nn.functional.softplus),
    "MptAttention": Family(queries_then_groups, visible=torch.logical_not),
    "PersimmonAttention": Family(heads_with_three),
    "Phi3Attention": Family(queries_then_groups),
    "Phi4MultimodalAttention": Family(queries_then_groups),
}
