"""Bytes of the tensors that this process holds, what lies in one place counted once."""

from __future__ import annotations

import gc

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor


def held_bytes() -> int:
    """Of every tensor that Python knows, its gradient too; what only an unfinished backward pass holds is not seen.

    Tensors of no memory, on the meta device or as the compiler traces them, hold nothing; of those that are spread over
    ranks, what this one has counts. What was there when the collector was last told to pass over it (`gc.freeze`: at
    the end of the collection of tests, and at the first stage that `compute` computes) is not seen either.
    """
    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and not isinstance(each, FakeTensor | FunctionalTensor):
            for one in (each, each.grad if each.is_leaf else None):
                tensor = one.to_local() if isinstance(one, DTensor) else one
                if tensor is not None and tensor.layout == torch.strided and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
