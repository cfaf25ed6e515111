"""Where a decoder has softmax attention that an operator can take the place of: its sites, found by structure.

A site is the module of a layer that owns projections to queries, keys and values and one out of the heads, and nothing
else that it could not be read without (`families`). What has other parts, or is called with other inputs, is no site,
and the reason is told.

Invariant: looking changes nothing. A site that is swapped is found where its attention was.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from orchestrator.distill.models.families import Family, families, family_of
from orchestrator.distill.models.projections import (
    BOTH_NORMS,
    FUSED,
    GATES,
    KEY_NORMS,
    KEYS,
    OUTPUTS,
    QUERIES,
    QUERY_NORMS,
    VALUE_NORMS,
    VALUES,
    part,
)

REMEDY = "describe it by a family of your own (docs/families.md), or take another model"
PARTS = {*QUERIES, *KEYS, *VALUES, *FUSED, *OUTPUTS, *QUERY_NORMS, *KEY_NORMS, *VALUE_NORMS, *BOTH_NORMS, *GATES}
OWN_TENSORS = {"sinks", "gate_bias", "dense_bias"}  # beside the parts; sinks are left to the profile of lags
CACHES = ("past_key_values", "past_key_value", "layer_past")
INPUTS = {
    "hidden_states", "attention_mask", "position_embeddings", "position_ids", "cache_position", "alibi",
    "residual", "position_bias", "attention_scaling", "use_cache", "output_attentions", "encoder_hidden_states",
    "encoder_attention_mask", "key_value_states", "head_mask", "layer_head_mask", "shared_kv_states", *CACHES,
}  # fmt: skip
NO_ATTENTION = "it has no softmax attention with projections to query, key and value and out of the heads"
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj")
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length", "seq_length",
    "model_max_length", "context_length", "n_ctx",
)  # fmt: skip
LENGTH_WITHOUT_LIMIT = 2048  # as `study.shapes`


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention of a model: the layer's index, the module that holds it and as what, how it differs from others."""

    layer: int
    parent: nn.Module
    name: str
    family: Family

    @property
    def attention(self) -> Any:
        """The module there, swapped or not."""
        return getattr(self.parent, self.name)


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer calls its attention.

    Attributes:
        arguments: names of those that may come by position, in order; the first is the input (B, L, D).
        cache: name of the one that brings the cache.
        index: of the layer in that cache.
    """

    arguments: tuple[str, ...]
    cache: str
    index: int

    def by_name(self, positional: tuple[Any, ...], others: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call; the input is called `hidden_states`, whatever the class calls it."""
        given = {**dict(zip(self.arguments, positional, strict=False)), **others}
        if self.arguments[0] in given:
            given["hidden_states"] = given[self.arguments[0]]
        return given


class Replacement(nn.Module):
    """What took the place of attention, and is called and answers as it did."""

    call: Call
    family: Family


def call_of(site: Site) -> Call:
    """How the layer calls its attention, or what took its place."""
    if isinstance(site.attention, Replacement):
        return site.attention.call
    arguments = _arguments(site.attention)
    cache = next(name for name in CACHES if name in arguments)
    index = getattr(site.attention, "layer_idx", getattr(site.attention, "layer_id", None))
    return Call(arguments, cache, site.layer if index is None else int(index))


def sites(model: Any) -> dict[int, Site]:
    """The sites of a model by layer. ValueError with the reason where it has none."""
    layers = decoder_layers(model)
    looked = {index: _look(model, index, layer) for index, layer in enumerate(layers)}
    found = {index: site for index, site in looked.items() if isinstance(site, Site)}
    shared = _shared(found)
    if not found or shared:
        told = sorted((str(reason) for reason in looked.values()), key=NO_ATTENTION.__eq__)
        reason = "layers share one attention" if shared else next(iter(told), "it has no layers")
        raise ValueError(f"models of type {_type(model)!r} cannot be swapped: {reason}: {REMEDY}")
    return found


def site_of(model: Any, layer: int) -> Site:
    """The site of a layer. ValueError with the reason, and the layers that have one, where it has none."""
    layers = decoder_layers(model)
    known = 0 <= layer < len(layers)
    found = _look(model, layer, layers[layer]) if known else f"the model has {len(layers)} layers, counted from 0"
    if isinstance(found, Site):
        return found
    raise ValueError(f"layer {layer} cannot be swapped: {found}; these can: {', '.join(map(str, sites(model)))}")


def attention_of(model: Any, layer: int) -> nn.Module:
    """The attention of a layer, or what took its place."""
    attention: nn.Module = site_of(model, layer).attention
    return attention


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model's decoder in order. ValueError where it has no one list of them."""
    own = families().get(_type(model))
    if own is not None and own.layers is not None:
        return list(own.layers(model))
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for trunk in (model.get_decoder(), trunk_of(model)):
        lists = [
            (name.count("."), module)
            for name, module in trunk.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and any(module[0].children())
        ]
        highest = [module for depth, module in lists if depth == min(depth for depth, _ in lists)]
        if len(highest) == 1:
            return list(highest[0])
    raise ValueError(f"models of type {_type(model)!r} cannot be swapped: they have no one list of layers: {REMEDY}")


def trunk_of(model: Any) -> Any:
    """What a model is below its output head."""
    inside = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next((trunk for trunk in (model.base_model, model.get_decoder(), *inside) if trunk is not model), model)


def longest_text(config: Any) -> int:
    """Positions that a model can see, or are asked of one whose configuration states no limit."""
    told = config.get_text_config(decoder=True)
    stated = (getattr(told, name, None) for name in LENGTHS)
    return next((value for value in stated if type(value) is int and value > 0), LENGTH_WITHOUT_LIMIT)


def _type(model: Any) -> str:
    """The model type; of an exported student the one that it is made of."""
    return str(getattr(model.config, "base_model_type", None) or model.config.model_type)


def _look(model: Any, index: int, layer: nn.Module) -> Site | str:
    """The site of a layer, or why it has none."""
    own = family_of(_type(model))
    if own.attention is not None:
        parent, _, name = own.attention.rpartition(".")
        holder = layer.get_submodule(parent)
        return Site(index, holder, name, own) if hasattr(holder, name) else f"it has no {own.attention}"
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    kind = str(kinds[index]) if index < len(kinds) else ""
    if "chunked" in kind:
        return "its attention sees chunks of the text only"
    owners = [(name, module) for name, module in layer.named_modules() if name and _owns_projections(module)]
    if len(owners) != 1:
        return "it looks at another text too (cross attention)" if owners else _without(layer)
    path, attention = owners[0]
    parent, _, name = path.rpartition(".")
    holder = layer.get_submodule(parent)
    if isinstance(attention, Replacement):
        return Site(index, holder, name, attention.family)
    family = family_of(_type(model), attention)
    return _unreadable(attention, family) or Site(index, holder, name, family)


def _owns_projections(module: nn.Module) -> bool:
    if isinstance(module, Replacement):
        return True
    names = dict(module.named_children()).keys()
    return bool(names & set(OUTPUTS)) and (bool(names & set(FUSED)) or {*QUERIES, *KEYS} <= names)


def _without(layer: nn.Module) -> str:
    """What a layer has that has no attention that could be read."""
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    if names & set(LATENT):
        return "its keys and values come from a latent state that all heads share"
    if {"query", "key", "value"} <= names:
        return "it is a layer of an encoder"
    return NO_ATTENTION


def _unreadable(attention: Any, family: Family) -> str | None:
    """Why an attention cannot be read or replaced; None if it can."""
    name = type(attention).__name__
    children = {part: module for part, module in attention.named_children() if not _passes(module)}
    odd = sorted({*children, *(own for own, _ in attention.named_parameters(recurse=False))} - PARTS - OWN_TENSORS)
    inputs = sorted(set(_arguments(attention)) - INPUTS)
    if set(children) & set(LATENT):
        return "its keys and values come from a latent state that all heads share"
    if odd or inputs:
        what = f"has {', '.join(odd)}" if odd else f"takes {', '.join(inputs)}"
        return f"its {name} {what}, which is not known how to read"
    if getattr(attention, "is_kv_shared_layer", False) or getattr(attention, "store_full_length_kv", False):
        return f"its {name} shares keys and values with other layers"
    if not set(CACHES) & set(_arguments(attention)):
        return f"its {name} has no cache"
    if part(attention, FUSED) is not None and family.parts is None and family.read is None:
        return f"the order of rows in the fused projection of {name} is not known"
    if attention.__dict__.get("is_cross_attention"):
        return "it looks at another text (cross attention)"
    return None


def _passes(module: nn.Module) -> bool:
    """Whether a part has nothing to say: dropout, rotations, an empty list."""
    empty = isinstance(module, nn.ModuleList) and len(module) == 0
    return empty or isinstance(module, nn.Dropout | nn.Identity) or "Rotary" in type(module).__name__


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward that may come by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(module.forward).parameters.values()
    return tuple(one.name for one in given if one.kind in kinds)


def _shared(found: dict[int, Site]) -> bool:
    """Whether layers share an attention, or weights of it."""
    owned = [{id(parameter) for parameter in site.attention.parameters()} for site in found.values()]
    return len(set().union(*owned)) < sum(map(len, owned))
