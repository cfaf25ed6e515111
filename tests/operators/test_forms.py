"""Compute forms of multi-head mixing against the definition; what is kept for backward.

Shapes: B batch, H heads, K key width, V value width, L positions.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig
from operators.mixing import mix, mix_reference
from tests.benchmarks.contenders import Attention
from tests.operators.cases import close, draw, generator, hyena


def parts(length: int, heads: int = 3, batch: int = 2, width: int = 5) -> list[Tensor]:
    """Queries, keys and values of unequal widths, float64."""
    widths = (width, width, width + 2)
    return [draw(batch, heads, w, length, seed=seed).double() / w**0.5 for seed, w in enumerate(widths)]


def gradients(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    cotangent = draw(*outputs.shape, seed=9).to(outputs.dtype)
    return list(torch.autograd.grad((outputs * cotangent).sum(), inputs))


@pytest.mark.parametrize("degree", [None, 4])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_mixing_in_bfloat16_nears_the_definition(degree: int | None, length: int) -> None:
    inputs = [*parts(length, batch=1 + (length == 100)), 0.9 ** torch.arange(length).expand(3, -1).double()]
    wide, narrow = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = mix_reference(*wide, degree)
    outputs = mix(*(x.to(torch.bfloat16) for x in narrow[:3]), narrow[3].float(), degree)
    assert outputs.dtype == torch.bfloat16
    close(outputs.double(), expected, 0.02)
    for narrow_grad, wide_grad in zip(gradients(outputs, narrow), gradients(expected, wide), strict=True):
        close(narrow_grad, wide_grad, 0.03)


def kept_bytes(module: Any, x_BLD: Tensor) -> int:
    """Of all that autograd keeps of a training pass, parameters and input apart, each storage counted once."""
    storages: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), x_BLD]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        kept = module(x_BLD)
    assert kept.requires_grad
    return sum(storages.values())


def test_training_in_bfloat16_keeps_no_more_than_attention() -> None:
    length, width, heads = 512, 512, 8
    operator = hyena(HyenaConfig(heads=heads, init="random"), width, length)
    operator.initialise(None, generator())
    x_BLD = draw(2, length, width).requires_grad_()  # one filter for all sequences
    assert kept_bytes(operator, x_BLD) <= kept_bytes(Attention(width, heads), x_BLD)
