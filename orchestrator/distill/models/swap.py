"""Surgery: put an operator where a layer's attention was, and nothing else.

Invariant: what is not named is not touched; a model with no layer swapped is bitwise the model it was.

Shapes: B batch, L positions, D model width, S positions in the mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from operators.config import OperatorConfig
from operators.decoding.state import State
from operators.registry import build
from operators.skip import Skip
from operators.transfer.attention import AttentionStatistics
from orchestrator.distill.models.families import family_of


class SwappedAttention(nn.Module):
    """An operator with the call signature of the attention it replaces.

    Attributes:
        step_mode, croppable: the states that decoding starts from, see `Hyena.init_state`.
    """

    def __init__(self, operator: Any, layer: int, cache_argument: str) -> None:
        super().__init__()
        self.operator = operator
        self.layer = layer
        self.cache_argument = cache_argument
        self.step_mode: str | None = None
        self.croppable = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """(B, L, D) -> (B, L, D) and no attention weights; with a cache, continues from what it has seen."""
        cache: Cache | None = others.get(self.cache_argument)
        new = hidden_states.shape[1]
        if cache is None:
            return self.operator(hidden_states, real_tokens(attention_mask, 0, new)), None
        state = self._state(cache, hidden_states.shape[0])
        mask_BL = real_tokens(attention_mask, state.length, new)
        output, _ = self.operator.extend(hidden_states, state, mask_BL)
        return output, None

    def new_state(self, batch: int) -> State:
        """The state of `batch` sequences of which nothing was seen. ValueError for a mode that the operator lacks."""
        state: State = self.operator.init_state(batch, self.step_mode, croppable=self.croppable)
        return state

    def _state(self, cache: Cache, batch: int) -> State:
        while len(cache.layers) <= self.layer:
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        held = cache.layers[self.layer]
        if not isinstance(held, OperatorCacheLayer):
            held = OperatorCacheLayer(self.new_state(batch), held)
            cache.layers[self.layer] = held
        if held.state.length == 0 and held.state.batch != batch:
            held.state = self.new_state(batch)
        return held.state


class OperatorCacheLayer(CacheLayerMixin):
    """An operator's state in the place of a layer's keys and values.

    One model makes one mask for all layers, from what the first layer's cache says of its size and every layer's of
    being compileable. So in a static cache this layer says what the layer it replaces would.
    """

    is_sliding = False

    def __init__(self, state: State, replaced: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.is_croppable = state, state.croppable
        self.fixed: int | None = replaced.max_cache_len if isinstance(replaced, StaticLayer) else None
        self.is_compileable = self.fixed is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state is made with the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called: a swapped layer has no keys and values."""
        raise AssertionError("a swapped layer keeps a state, not keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that covers all positions seen and the new ones, or all that a static cache
        has room for."""
        return self.fixed or self.state.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.state.length

    def get_max_length(self) -> int:
        """The operator's longest sequence, or what a static cache has room for."""
        return self.fixed or self.state.max_length

    def reset(self) -> None:
        """Forget everything."""
        self.state.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on as the one named."""
        self.state.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; the number is given as a negative one."""
        self.state.crop(self.state.length - abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named sequences."""
        self.state.select(torch.arange(self.state.batch)[indices.cpu()])


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
        replacement = SwappedAttention(operator, layer, family.cache_argument)
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


def real_tokens(attention_mask: Tensor | None, start: int, length: int) -> Tensor | None:
    """Which of the positions `start` to `start + length` - 1 hold real tokens, (B, L); None: all.

    From a causal mask (B, 1, L, S) of all S positions that a cache has, or has room for. The last query may look at
    every real token, so its row tells which keys are padding.
    """
    if attention_mask is None:
        return None
    row_BL = attention_mask[:, 0, -1, start : start + length]
    mask_BL = row_BL if row_BL.dtype == torch.bool else row_BL == 0
    return None if bool(mask_BL.all()) else mask_BL
