"""Surgery: put an operator where a layer's attention was, and nothing else.

Invariant: what is not named is not touched; a model with no layer swapped is bitwise the model it was.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from operators.config import OperatorConfig, WindowConfig
from operators.decoding.state import State
from operators.near import fitting
from operators.registry import build
from operators.skip import Skip
from operators.transfer.attention import AttentionStatistics, AttentionWeights
from orchestrator.distill.models.cache import OperatorCacheLayer, layer_for
from orchestrator.distill.models.families import Family
from orchestrator.distill.models.masks import by_document, packed_documents, pattern_of
from orchestrator.distill.models.reading import on_processor, read, widths
from orchestrator.distill.models.sites import (
    Call,
    Replacement,
    Site,
    call_of,
    decoder_layers,
    longest_text,
    site_of,
    sites,
    trunk_of,
)

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SwappedAttention(Replacement):
    """An operator with the call signature of the attention it replaces.

    Attributes:
        layer: index of the layer it is in.
        call: how that layer calls it.
        family: what the layer expects back.
        config: the language model's configuration, which says how its attention is computed.
        step_mode, croppable: the states that decoding starts from, see `Hyena.init_state`.
    """

    def __init__(self, operator: Any, layer: int, call: Call, family: Family, config: Any) -> None:
        super().__init__()
        self.operator = operator
        self.layer = layer
        self.call = call
        self.family = family
        self.config = config
        self.step_mode: str | None = None
        self.croppable = True

    def forward(self, *positional: Any, **others: Any) -> Any:
        """As the attention it replaces: (B, L, D) -> what the layer expects back of (B, L, D), usually a pair of it and
        None; with a cache, continues from what it has seen.

        Padding and packed documents are honoured as `masks` says; with a cache, packed documents are a ValueError.
        """
        given = self.call.by_name(positional, others)
        y_BLD = self._mixed(given)
        return self.family.answer(y_BLD if self.family.any_strides else y_BLD.contiguous(), given)

    def _mixed(self, given: Mapping[str, Any]) -> Tensor:
        x_BLD: Tensor = given["hidden_states"]
        mask = given.get("attention_mask")
        if self.family.visible is not None and isinstance(mask, Tensor):
            mask = self.family.visible(mask)
        cache: Any = given.get(self.call.cache)
        cache = getattr(cache, "self_attention_cache", cache)
        batch, new, _ = x_BLD.shape
        held = None if cache is None else self._held(cache, batch)
        seen, hidden = (0, 0) if held is None else (held.state.length, held.hidden(mask, new))
        pattern = pattern_of(mask, batch, seen - hidden, new)
        if mask is None and new > 1 and not torch.compiler.is_compiling():
            in_mask = held is None and self.config._attn_implementation in ("sdpa", "eager")  # if there are several
            position_ids = None if in_mask else given.get("position_ids")
            pattern = packed_documents(position_ids, given.get("cu_seq_lens_q"), batch, new)
        if held is not None:
            held.check(pattern)
            if cache.offloading:
                self._bring_the_next(cache, x_BLD.device)
            return self.operator.extend(x_BLD, held.state, pattern.real_BL)[0]  # type: ignore[no-any-return]
        if pattern.document_BL is not None:
            return by_document(self.operator, x_BLD, pattern.document_BL)
        return self.operator(x_BLD, pattern.real_BL)  # type: ignore[no-any-return]

    def new_state(self, batch: int) -> State:
        """The state of `batch` sequences of which nothing was seen. ValueError for a mode that the operator lacks."""
        state: State = self.operator.init_state(batch, self.step_mode, croppable=self.croppable)
        return state

    def _bring_the_next(self, cache: Any, device: torch.device) -> None:
        """What attention does in a cache that lies on the CPU: copy the next layer's keys and values meanwhile."""
        if device.type == "cuda":
            cache.prefetch_stream.wait_stream(torch.cuda.default_stream(device))
        cache.prefetch(self.call.index + 1, cache.only_non_sliding)

    def _held(self, cache: Cache, batch: int) -> OperatorCacheLayer:
        index = self.call.index
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        found: Any = cache.layers[index]
        if isinstance(found, OperatorCacheLayer):
            held = found
        elif isinstance(found, CacheLayerMixin) and found.get_seq_length() > 0:
            raise ValueError(
                f"the cache has keys and values of layer {self.layer}, which is swapped: start a new cache"
            )
        else:
            held = cache.layers[index] = layer_for(self.new_state(batch), found)
        if held.state.length == 0 and held.state.batch != batch:
            held.state = self.new_state(batch)
        return held


def swap(
    model: Any,
    layers: Iterable[int],
    config: OperatorConfig | Mapping[int, OperatorConfig],
    generator: torch.Generator,
    *,
    statistics: Mapping[int, AttentionStatistics] | None = None,
    initialise: bool = True,
    dtype: torch.dtype | None = None,
) -> list[SwappedAttention]:
    """Replace the attention of `layers` in place and return what took its place: one operator in all of them, or one by
    layer.

    With `initialise` the operators are set as the configuration's `init` says, from the attention they replace and
    from `statistics`, by layer what it does on real text; without, they await a state dict. Their device and precision
    are those of the attention they replace, or `dtype`.
    Raises `ValueError` for an unsupported family, weights that are no usual numbers, or an impossible transfer.
    """
    there, told = sites(model), model.config.get_text_config(decoder=True)
    placed = []
    if not swapped(model):
        by_layer = functools.partial(_attentions_by_layer, layers=tuple(there))
        trunk_of(model).register_forward_hook(by_layer)
    for layer in layers:
        site = there[layer] if layer in there else site_of(model, layer)
        attention = site.attention
        if isinstance(attention, Replacement):
            raise ValueError(f"layer {layer} is swapped already")
        like = _precision_of(attention, layer)
        width, inner = widths(attention, site.family)
        seen = (statistics or {}).get(layer)
        own = config[layer] if isinstance(config, Mapping) else config
        weights = _read_for(site, own, seen) if initialise else None
        operator: Any = build(fitting(own, weights), width, longest_text(model.config), inner)
        if initialise:
            operator.to(torch.promote_types(like.dtype, torch.float32))
            operator.initialise(weights if _transfers(own) else None, generator)
        operator.to(like.device, dtype or like.dtype)
        replacement = SwappedAttention(operator, layer, call_of(site), site.family, told)
        setattr(site.parent, site.name, replacement)
        placed.append(replacement)
    return placed


def fitted_config(model: Any, layer: int, config: OperatorConfig) -> OperatorConfig:
    """The configuration that an operator gets by `swap` in the place of a layer's attention: with what the one given
    leaves to the attention. Changes nothing; raises as `swap` does."""
    return fitting(config, _read_for(site_of(model, layer), config, None))


def _read_for(site: Site, config: OperatorConfig, seen: AttentionStatistics | None) -> AttentionWeights | None:
    """What an operator of this configuration needs to know of the attention; None where it needs nothing, or none of it
    can be read and it starts without.

    Random weights need no more of it than norms, and which heads share keys and values.
    """
    asked = _transfers(config) or (isinstance(config, WindowConfig) and config.heads is None)
    with contextlib.nullcontext() if asked else contextlib.suppress(ValueError):
        if asked or getattr(config, "window", None) is not None:
            return on_processor(read(site.attention, site.family, seen))
    return None


def _transfers(config: OperatorConfig) -> bool:
    return getattr(config, "init", "random") == "transfer"


def _attentions_by_layer(trunk: Any, _: Any, output: Any, *, layers: tuple[int, ...]) -> None:
    """Where attention weights are asked for, None in the place of layers that have none; `layers` have a site."""
    weights = getattr(output, "attentions", None)
    if weights is not None:
        without = {module.layer for module in trunk.modules() if isinstance(module, SwappedAttention)}
        left = iter(weights)
        if len(weights) == len(layers) - len(without):
            output["attentions"] = tuple(None if layer in without else next(left) for layer in layers)


def _precision_of(attention: nn.Module, layer: int) -> Tensor:
    """A parameter of the attention, of whose device and precision the operator is to be."""
    found = [parameter.detach() for parameter in attention.parameters()]
    odd = [parameter.dtype for parameter in found if parameter.dtype not in PRECISIONS]
    if odd:
        raise ValueError(
            f"the attention of layer {layer} has weights of {odd[0]}: load the model with dtype=torch.bfloat16 or "
            "float32"
        )
    return found[0]


def decode_by(model: Any, step_mode: str | None, *, croppable: bool = True) -> None:
    """Choose how swapped layers decode, see `Hyena.init_state`; None: each in the usual way of its operator.

    Raises `ValueError`, and changes nothing, where the operator of a layer has no such mode.
    """
    chosen = [placed for placed in swapped(model) if not isinstance(placed.operator, Skip)]
    for placed in chosen:
        try:
            placed.operator.init_state(1, step_mode)
        except ValueError as error:
            raise ValueError(f"layer {placed.layer}: {error}") from None
    for placed in chosen:
        placed.step_mode, placed.croppable = step_mode, croppable


def fit_errors(model: Any) -> dict[int, Tensor]:
    """Of layers that decode by modes that were fitted to their filters, the relative error of every filter, (C,).

    Computes the fit, seconds a layer, which `frozen_filters` keeps for the decoding inside of it.
    """
    fitted = {placed.layer: placed.operator.frozen() for placed in swapped(model) if placed.step_mode == "modal"}
    return {layer: filters.fitted[1] for layer, filters in fitted.items() if filters.modes is None}


def swapped(model: Any) -> list[SwappedAttention]:
    """What took the place of attention, by layer."""
    found = (module for layer in decoder_layers(model) for module in layer.modules())
    return [module for module in found if isinstance(module, SwappedAttention)]
