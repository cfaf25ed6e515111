"""Projections over channels-first sequences for the core: weights cast once, and a cheap backward.

What autocast would do, but for two things: a weight that is used for every sequence of a batch is cast alone and once
until it changes, and the gradient of the bias sums positions first, which torch does thirty times as fast in bfloat16.

Shapes: B batch, D inputs, E outputs, L positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

_casts: Any = WeakIdKeyDictionary()  # parameter to what it was and the tensor


def project(linear: nn.Linear, x_BDL: Tensor) -> Tensor:
    """`linear` of every position, (B, E, L), in autocast's precision where that is on."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else linear.weight.dtype
    return cast(Tensor, _Project.apply(x_BDL, linear.weight, linear.bias, dtype))  # type: ignore[no-untyped-call]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BDL: Tensor, weight_ED: Tensor, bias_E: Tensor, dtype: torch.dtype) -> Tensor:
        x_BDL, weight = x_BDL.to(dtype), _as(weight_ED, dtype)
        ctx.save_for_backward(x_BDL, weight)
        with torch.autocast("cpu", enabled=False):
            return torch.baddbmm(_as(bias_E, dtype)[:, None], weight.expand(x_BDL.shape[0], -1, -1), x_BDL)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BEL: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_BDL, weight_ED = ctx.saved_tensors
        dx_BDL = dweight_ED = dbias_E = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                dx_BDL = torch.bmm(weight_ED.t().expand(x_BDL.shape[0], -1, -1), grad_BEL)
            if ctx.needs_input_grad[1]:
                dweight_ED = torch.bmm(grad_BEL, x_BDL.transpose(1, 2)).sum(0, dtype=_wide(x_BDL.dtype))
            if ctx.needs_input_grad[2]:
                first = grad_BEL.sum(2) if grad_BEL.stride(2) == 1 else grad_BEL.sum((0, 2))[None]
                dbias_E = first.sum(0, dtype=_wide(x_BDL.dtype))
        return dx_BDL, dweight_ED, dbias_E, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter's value in another dtype, cast again when it has changed."""
    value = parameter.detach()
    if value.dtype == dtype:
        return value
    stamp = (value.data_ptr(), 0 if parameter.is_inference() else parameter._version, dtype)
    if parameter not in _casts or _casts[parameter][0] != stamp:
        with torch.inference_mode(False):
            _casts[parameter] = (stamp, value.to(dtype))
    return cast(Tensor, _casts[parameter][1])
