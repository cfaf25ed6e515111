"""Tensors that are computed again for backward instead of kept, wherever autograd meets them."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(x: Tensor, compute: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Inside, autograd keeps of `x` and of its views nothing but their geometry; backward calls `compute` once.

    What `compute` needs must be kept elsewhere, and its result must be `x` bit for bit, laid out as `x` is. `x` must
    live as long as the context.
    """
    address = x.untyped_storage().data_ptr()
    again: list[Tensor] = []

    def pack(kept: Tensor) -> Tensor | tuple[Any, ...]:
        if kept.untyped_storage().data_ptr() != address:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(kept: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if not again:
            with torch.no_grad():
                again.append(compute())
        return again[0].as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
