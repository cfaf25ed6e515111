"""The state of a swapped layer in a cache of transformers, in the place of keys and values.

Invariant: whatever `Cache` asks of a layer, this one does as the layer it stands for would.

Shapes: B batch, L new positions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer, StaticLayer

from operators.decoding.state import State
from orchestrator.distill.models.masks import Pattern


class OperatorCacheLayer(CacheLayerMixin):
    """An operator's state in the place of a layer's keys and values.

    One model makes one mask for all layers of a kind, from what the first such layer's cache says of its size and every
    layer's of being compileable. So this layer says what the layer it replaces would.
    """

    is_sliding = False

    def __init__(self, state: State, replaced: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state
        self.fixed: int | None = replaced.max_cache_len if isinstance(replaced, StaticLayer) else None
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.window = copy.copy(replaced) if self.is_sliding else None  # without keys and values: asked for sizes only
        self.is_compileable = self.fixed is not None
        self.is_initialized = True
        self.keys = self.values = torch.empty(0)  # who counts them finds none
        self.padded_B: Tensor | None = None  # sequences of which only padding was seen; None: there is none

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether positions can be forgotten."""
        return self.state.croppable

    def hidden(self, mask: Any, new: int) -> int:
        """Positions seen that a mask for `new` ones has no columns for: those that left a sliding window."""
        seen = self.state.length + new
        shown = mask.shape[-1] if self.is_sliding and isinstance(mask, Tensor) else seen
        return max(0, seen - shown)

    def check(self, pattern: Pattern) -> None:
        """ValueError where the new positions are of several documents, or of another one than those seen."""
        lone_B, only_B = pattern.alone_B, self.padded_B
        fresh = lone_B is not None and bool((lone_B if only_B is None else lone_B & ~only_B).any())
        if fresh or pattern.document_BL is not None:
            raise ValueError(
                "a cache cannot go on from packed documents: call the model with use_cache=False, or give every "
                "document a row of its own"
            )
        if self.state.length == 0 or only_B is not None:
            self.padded_B = None if pattern.real_BL is None else ~pattern.real_BL.any(1)
            if self.padded_B is not None and only_B is not None and self.state.length > 0:
                self.padded_B &= only_B

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state is made with the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """ValueError: a layer with attention asks, and a swapped one has no keys and values."""
        raise ValueError("this cache was filled by a model whose layer is swapped: start a new one for another model")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that covers all positions seen and the new ones, or all that a static cache has
        room for, or those that a sliding window still shows."""
        if self.window is not None:
            self.window.cumulative_length = self.window.cumulative_length_int = self.state.length
            lengths: tuple[int, int] = self.window.get_mask_sizes(query_length)
            return lengths
        return self.fixed or self.state.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.state.length

    def held_bytes(self) -> int:
        """Of the operator's state."""
        return self.state.held_bytes()

    def get_max_length(self) -> int:
        """The operator's longest sequence, or what a static cache has room for."""
        return self.fixed or self.state.max_length

    def offload(self) -> None:
        """Nothing: like the states of linear attention, an operator's stay on their device."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""

    def reset(self) -> None:
        """Forget everything."""
        self.state.crop(0)
        self.padded_B = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on as the one named."""
        self.state.reorder(beam_idx)
        self._choose(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; the number is given as a negative one, as for attention. ValueError if it is not,
        and for more than were seen."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the positions to remove as a negative number")
        if tokens_to_remove < 0:
            self.state.crop(self.state.length + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._choose(torch.arange(self.state.batch).repeat_interleave(repeats))
        self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the named sequences."""
        chosen = torch.arange(self.state.batch)[indices.cpu()]
        self.state.select(chosen)
        self._choose(chosen)

    def _choose(self, indices: Tensor) -> None:
        if self.padded_B is not None:
            self.padded_B = self.padded_B.index_select(0, indices.to(self.padded_B.device))


class OperatorAndLinearCacheLayer(OperatorCacheLayer, LinearAttentionLayer):
    """The same in a layer that has linear attention beside its attention, whose states go on as they are."""

    def __init__(self, state: State, replaced: Any) -> None:
        LinearAttentionLayer.__init__(self, replaced.number_of_states)
        linear = set(vars(self))
        OperatorCacheLayer.__init__(self, state, replaced)
        vars(self).update({name: value for name, value in vars(replaced).items() if name in linear})

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether positions can be forgotten by both."""
        return self.state.croppable and bool(LinearAttentionLayer.is_croppable.fget(self))  # type: ignore[attr-defined]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """What linear attention asks for, by name."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        OperatorCacheLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        OperatorCacheLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        OperatorCacheLayer.crop(self, tokens_to_remove)


def layer_for(state: State, replaced: Any) -> OperatorCacheLayer:
    """The layer of a cache that takes the place of `replaced`, of which nothing was used but its linear attention."""
    kind = OperatorAndLinearCacheLayer if isinstance(replaced, LinearAttentionCacheLayerMixin) else OperatorCacheLayer
    return kind(state, replaced)


def cache_bytes(cache: Any) -> int:
    """Of all layers of a cache, keys and values or states."""
    return sum(
        layer.held_bytes() if isinstance(layer, OperatorCacheLayer) else _of_tensors(layer) for layer in cache.layers
    )


def _of_tensors(layer: Any) -> int:
    return sum(part.untyped_storage().nbytes() for part in vars(layer).values() if isinstance(part, Tensor))
