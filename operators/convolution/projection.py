"""Linear layers over channels-first sequences, without transposed copies.

Weights are cast to half precision at every call: nothing cheap tells for sure whether they are what they were (fused
optimizers, FSDP and `p.data` change them without moving their version), and a cast is a few hundredths of a prefill,
of a short one more. Whoever says that they do not change (`frozen_filters`) hands in what was cast once.

Shapes: B batch, I features in, E out, L positions.
"""

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as hooks_of_all

FEW_POSITIONS = 8
SEQUENCES = 8  # at a time, on a GPU


class _Project(torch.autograd.Function):
    """In half precision one matrix product a sequence: on CPUs the batched one copies its weight for every sequence."""

    @staticmethod
    def forward(ctx: Any, x_BIL: Tensor, weight_EI: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_BIL, weight_EI)
        weight, bias = weight_EI.to(x_BIL.dtype), bias_E.to(x_BIL.dtype)
        if x_BIL.is_cuda:
            return torch.baddbmm(bias[:, None], weight.expand(len(x_BIL), -1, -1), x_BIL)
        y_BEL = x_BIL.new_empty(x_BIL.shape[0], weight.shape[0], x_BIL.shape[2])
        for x_IL, y_EL in zip(x_BIL, y_BEL, strict=True):
            torch.addmm(bias[:, None], weight, x_IL, out=y_EL)
        return y_BEL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BEL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BIL, weight_EI = ctx.saved_tensors
        weight = weight_EI.to(x_BIL.dtype)
        if x_BIL.is_cuda:
            return _batched_backward(grad_BEL, x_BIL, weight)
        dweight_EI, dx_BIL = torch.zeros_like(weight_EI), torch.empty_like(x_BIL)  # laid out as x is
        with torch.autocast(grad_BEL.device.type, enabled=False):
            for x_IL, grad_EL, dx_IL in zip(x_BIL, grad_BEL, dx_BIL, strict=True):
                if dx_IL.is_contiguous():
                    torch.mm(weight.t(), grad_EL, out=dx_IL)
                else:
                    torch.mm(grad_EL.t(), weight, out=dx_IL.t())
                dweight_EI += grad_EL @ x_IL.t()
            dbias_E = grad_BEL.sum(2).sum(0, dtype=dweight_EI.dtype)
        return dx_BIL, dweight_EI, dbias_E


def _batched_backward(grad_BEL: Tensor, x_BIL: Tensor, weight_EI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On a GPU: products of a batch at once, of `SEQUENCES` for the weights, whose sums are float32."""
    weights_BEI = weight_EI.expand(len(x_BIL), -1, -1)
    dweight_EI = torch.zeros_like(weight_EI, dtype=torch.float32)
    with torch.autocast(grad_BEL.device.type, enabled=False):
        if x_BIL.is_contiguous():
            dx_BIL = torch.bmm(weights_BEI.transpose(1, 2), grad_BEL)
        else:
            dx_BIL = torch.bmm(grad_BEL.transpose(1, 2), weights_BEI).transpose(1, 2)
        for grad, x in zip(grad_BEL.split(SEQUENCES), x_BIL.split(SEQUENCES), strict=True):
            dweight_EI += torch.bmm(grad, x.transpose(1, 2), out_dtype=torch.float32).sum(0)
    return dx_BIL, dweight_EI, grad_BEL.sum((0, 2), dtype=torch.float32)


def plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer whose weights are all there is to it, so that they may be used without it.

    Hooks, parametrisations, adapters around or in it (LoRA), weights of a class of their own (quantised, sharded) and a
    replaced `forward` want the module itself to be called.
    """
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    if hooks or hooks_of_all._has_any_global_hook():
        return False
    return all(part is None or type(part) in (nn.Parameter, Tensor) for part in (linear.weight, linear.bias))


def project(linear: nn.Module, x_BIL: Tensor, narrow: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`linear` at every position, (B, E, L), in the ambient precision; by its weight and bias in that of autocast where
    they are given."""
    if narrow is not None:
        if x_BIL.shape[-1] <= FEW_POSITIONS:
            return torch.nn.functional.linear(x_BIL.transpose(1, 2), *narrow).transpose(1, 2)
        with torch.autocast(x_BIL.device.type, enabled=False):
            return cast(Tensor, _Project.apply(x_BIL.to(narrow[0].dtype), *narrow))  # type: ignore[no-untyped-call]
    if x_BIL.shape[-1] <= FEW_POSITIONS or not plain(linear) or linear.bias is None:
        return cast(Tensor, linear(x_BIL.transpose(1, 2))).transpose(1, 2)
    device = x_BIL.device.type
    if not torch.is_autocast_enabled(device) or x_BIL.dtype == torch.float64:  # which autocast leaves alone
        return torch.baddbmm(linear.bias[:, None], linear.weight.expand(x_BIL.shape[0], -1, -1), x_BIL)
    narrow_BIL = x_BIL.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _Project.apply(narrow_BIL, linear.weight, linear.bias))  # type: ignore[no-untyped-call]
