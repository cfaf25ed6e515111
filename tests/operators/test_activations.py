"""Gradient checkpointing around an operator frees all that the operator keeps for backward.

Shapes: B batch, L positions, D model width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.operators.cases import D, close, draw, make, rows

B, LENGTH = 2, 300


class Made(TorchDispatchMode):
    """Remembers what operations make, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return made

    def waiting(self, given: list[Tensor]) -> int:
        """Bytes of what is still there and was not there before."""
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        return sum(size for storage, size in self.storages.items() if not storage.expired() and storage not in known)


def gradients(operator: Any, x_BLD: Tensor, dtype: torch.dtype, checkpointed: bool) -> tuple[list[Tensor], int]:
    """Of inputs and parameters, with the output; and the bytes that wait for backward."""
    inputs = x_BLD.clone().requires_grad_()
    with Made() as made, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if checkpointed:
            y_BLD = checkpoint(operator, inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y_BLD = operator(inputs)
    waiting = made.waiting([*operator.parameters(), inputs, y_BLD])
    if not y_BLD.requires_grad:
        return [y_BLD], waiting
    parameters = [p for p in operator.parameters() if p.requires_grad]
    return [y_BLD, *torch.autograd.grad(y_BLD.float().square().sum(), [inputs, *parameters])], waiting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", rows())
def test_checkpointing_keeps_nothing_of_an_operator(case: str, dtype: torch.dtype) -> None:
    operator, x_BLD = make(case, LENGTH), draw(B, LENGTH, D)
    expected, waiting = gradients(operator, x_BLD, dtype, checkpointed=False)
    found, left = gradients(operator, x_BLD, dtype, checkpointed=True)
    assert left == 0 and (waiting > 4 * B * LENGTH * D or case == "skip")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["order 2", "power, full", "hedgehog"])
def test_checkpointing_frees_the_network_of_long_filters_too(case: str) -> None:
    operator, x_BLD = make(case, 1100), draw(1, 1100, D)
    expected, _ = gradients(operator, x_BLD, torch.bfloat16, checkpointed=False)
    found, left = gradients(operator, x_BLD, torch.bfloat16, checkpointed=True)
    assert left == 0
    for ours, theirs in zip(found, expected, strict=True):
        close(ours.float(), theirs.float(), 1e-6)
