"""Surgery: put an operator where a layer's attention was, and nothing else.

Invariant: what is not named is not touched; a model with no layer swapped is bitwise the model it was.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from operators.config import OperatorConfig
from operators.decoding.state import State
from operators.registry import build
from operators.skip import Skip
from operators.transfer.attention import AttentionStatistics
from orchestrator.distill.models.cache import OperatorCacheLayer
from orchestrator.distill.models.families import family_of
from orchestrator.distill.models.masks import by_document, packed_documents, pattern_of


class SwappedAttention(nn.Module):
    """An operator with the call signature of the attention it replaces.

    Attributes:
        config: the model's configuration, which says how its attention is computed.
        step_mode, croppable: the states that decoding starts from, see `Hyena.init_state`.
    """

    def __init__(self, operator: Any, layer: int, cache_argument: str, config: Any) -> None:
        super().__init__()
        self.operator = operator
        self.layer = layer
        self.cache_argument = cache_argument
        self.config = config
        self.step_mode: str | None = None
        self.croppable = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """(B, L, D) -> (B, L, D) and no attention weights; with a cache, continues from what it has seen.

        Padding and packed documents are honoured as `masks` says; with a cache, packed documents are a ValueError.
        """
        cache: Cache | None = others.get(self.cache_argument)
        batch, new, _ = hidden_states.shape
        held = None if cache is None else self._held(cache, batch)
        pattern = pattern_of(attention_mask, batch, 0 if held is None else held.state.length, new)
        if attention_mask is None and new > 1 and not torch.compiler.is_compiling():
            in_mask = held is None and self.config._attn_implementation in ("sdpa", "eager")  # if there are several
            position_ids = None if in_mask else others.get("position_ids")
            pattern = packed_documents(position_ids, others.get("cu_seq_lens_q"), batch, new)
        if held is not None:
            held.check(pattern)
            return self.operator.extend(hidden_states, held.state, pattern.real_BL)[0], None
        if pattern.document_BL is not None:
            return by_document(self.operator, hidden_states, pattern.document_BL), None
        return self.operator(hidden_states, pattern.real_BL), None

    def new_state(self, batch: int) -> State:
        """The state of `batch` sequences of which nothing was seen. ValueError for a mode that the operator lacks."""
        state: State = self.operator.init_state(batch, self.step_mode, croppable=self.croppable)
        return state

    def _held(self, cache: Cache, batch: int) -> OperatorCacheLayer:
        while len(cache.layers) <= self.layer:
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        found: Any = cache.layers[self.layer]
        if isinstance(found, OperatorCacheLayer):
            held = found
        elif found.get_seq_length() > 0:
            raise ValueError(
                f"the cache has keys and values of layer {self.layer}, which is swapped: start a new cache"
            )
        else:
            held = cache.layers[self.layer] = OperatorCacheLayer(self.new_state(batch), found)
        if held.state.length == 0 and held.state.batch != batch:
            held.state = self.new_state(batch)
        return held


def swap(
    model: Any,
    layers: Iterable[int],
    config: OperatorConfig,
    generator: torch.Generator,
    *,
    statistics: Mapping[int, AttentionStatistics] | None = None,
    initialise: bool = True,
) -> list[SwappedAttention]:
    """Replace the attention of `layers` in place and return what took its place.

    With `initialise` the operators are set as the configuration's `init` says, from the attention they replace and
    from `statistics`, by layer what it does on real text; without, they await a state dict.
    Raises `ValueError` for an unsupported family or an impossible transfer.
    """
    family = family_of(model)
    blocks = family.layers(model)
    placed = []
    for layer in layers:
        block = blocks[layer]
        attention = getattr(block, family.attribute)
        if isinstance(attention, SwappedAttention):
            raise ValueError(f"layer {layer} is swapped already")
        operator: Any = build(config, model.config.hidden_size, model.config.max_position_embeddings)
        if initialise:
            transfer = getattr(config, "init", "random") == "transfer"
            read = family.read(attention) if transfer else None
            if read is not None and statistics and layer in statistics:
                read = dataclasses.replace(read, statistics=statistics[layer])
            operator.initialise(read, generator)
        operator.to(device=model.device)
        replacement = SwappedAttention(operator, layer, family.cache_argument, model.config)
        setattr(block, family.attribute, replacement)
        placed.append(replacement)
    return placed


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

    Computes the fit where it is not known: seconds a layer.
    """
    fitted = {placed.layer: placed.operator.frozen() for placed in swapped(model) if placed.step_mode == "modal"}
    return {layer: filters.fitted[1] for layer, filters in fitted.items() if filters.modes is None}


def swapped(model: Any) -> list[SwappedAttention]:
    """What took the place of attention, by layer."""
    found = [attention_of(model, layer) for layer in range(len(family_of(model).layers(model)))]
    return [module for module in found if isinstance(module, SwappedAttention)]


def attention_of(model: Any, layer: int) -> nn.Module:
    """The module that mixes positions in a layer, swapped or not."""
    family = family_of(model)
    module: nn.Module = getattr(family.layers(model)[layer], family.attribute)
    return module
