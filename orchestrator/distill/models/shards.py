"""Tensors of a model that is spread over the ranks of a stage (`training.sharding`): each has its rows of them.

A tensor that is not spread is whole on every rank, and is handed on as it is. Invariant: all ranks call these together,
in one order.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor, the same on every rank, what this rank has of it where it is spread as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()
