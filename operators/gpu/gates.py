"""Products of short convolutions in one pass over what they read, and the way back.

An operand is a tensor as it is, or the short convolution of one: u_t = bias + sum_k taps[K - 1 - k] p_{t-k}.

Shapes: B batch, D channels, L positions, K taps. Positions of a channel touch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from operators.gpu import Kernel, jit, next_power, tl, touching

BLOCK = 1024  # positions of a program
MOST_TAPS = 8  # of a short convolution: backward reads each input once for every pair of taps


class Operand(NamedTuple):
    """A tensor (B, D, L), and the short convolution of it where there is one: (D, K), (D,)."""

    x_BDL: Tensor
    taps_DK: Tensor | None = None
    bias_D: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        """As kernels take them: pointers, strides of sequences and channels, number of taps."""
        x_BDL = touching(self.x_BDL)
        place = (x_BDL, x_BDL.stride(0), x_BDL.stride(1))
        if self.taps_DK is None or self.bias_D is None:
            return *place, x_BDL, x_BDL, 0
        return *place, self.taps_DK.contiguous(), self.bias_D.contiguous(), self.taps_DK.shape[1]


@jit
def _values(x, row, t, taps, bias, channel, length, K: tl.constexpr):
    """An operand at positions `t` of a row, float32, zero outside of the sequence."""
    inside = (t >= 0) & (t < length)
    if K == 0:
        return tl.load(x + row + t, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(bias + channel).to(tl.float32) + tl.zeros_like(t).to(tl.float32)
    for k in tl.static_range(K):
        tap = tl.load(taps + channel * K + K - 1 - k).to(tl.float32)
        u += tap * tl.load(x + row + t - k, mask=inside & (t >= k), other=0.0).to(tl.float32)
    return tl.where(inside, u, 0.0)


@Kernel
def _product(
    a, a_batch, a_row, a_taps, a_bias, A: tl.constexpr,
    b, b_batch, b_row, b_taps, b_bias, B: tl.constexpr,
    mask, out, channels, length, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, channel = (row // channels).to(tl.int64), row % channels
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = _values(a, batch * a_batch + channel * a_row, t, a_taps, a_bias, channel, length, A)
    product *= _values(b, batch * b_batch + channel * b_row, t, b_taps, b_bias, channel, length, B)
    if MASKED:
        product *= tl.load(mask + batch * length + t, mask=t < length, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * length + t, product.to(out.dtype.element_ty), mask=t < length)


@Kernel
def _short(
    x, x_batch, x_row, taps, bias, K: tl.constexpr,
    out, channels, length, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, channel = (row // channels).to(tl.int64), row % channels
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = _values(x, batch * x_batch + channel * x_row, t, taps, bias, channel, length, K)
    tl.store(out + row.to(tl.int64) * length + t, u.to(out.dtype.element_ty), mask=t < length)


@jit
def _gradient(
    a, a_row, b, b_batch, b_stride, b_taps, b_bias, mask,
    batch, channel, t, length, MULTIPLIED: tl.constexpr, B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of a short convolution's output at positions `t`."""
    grad = _values(a, a_row, t, b_taps, b_bias, channel, length, 0)
    if MULTIPLIED:
        grad *= _values(b, batch * b_batch + channel * b_stride, t, b_taps, b_bias, channel, length, B)
    if MASKED:
        grad *= tl.load(mask + batch * length + t, mask=(t >= 0) & (t < length), other=0.0).to(tl.float32)
    return grad


@Kernel
def _adjoint(
    a, a_batch, a_stride,
    b, b_batch, b_stride, b_taps, b_bias, MULTIPLIED: tl.constexpr, B: tl.constexpr,
    mask, MASKED: tl.constexpr,
    x, x_batch, x_stride, taps, dx, dx_batch, dx_stride,
    sums, channels, length, K: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, channel = (row // channels).to(tl.int64), row % channels
    a_row = batch * a_batch + channel * a_stride
    place = tl.arange(0, PLACES)
    total = tl.zeros((PLACES,), tl.float32)  # of the taps by lag, then of the bias
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        x_t = tl.load(x + batch * x_batch + channel * x_stride + t, mask=t < length, other=0.0).to(tl.float32)
        dx_t = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            grad = _gradient(
                a, a_row, b, b_batch, b_stride, b_taps, b_bias, mask, batch, channel, t + k, length,
                MULTIPLIED, B, MASKED,
            )  # fmt: skip
            dx_t += tl.load(taps + channel * K + K - 1 - k).to(tl.float32) * grad
            total += tl.where(place == K - 1 - k, tl.sum(grad * x_t), 0.0)
            if k == 0:
                total += tl.where(place == K, tl.sum(grad), 0.0)
        tl.store(dx + batch * dx_batch + channel * dx_stride + t, dx_t.to(dx.dtype.element_ty), mask=t < length)
    tl.store(sums + row.to(tl.int64) * PLACES + place, total)


def product(a: Operand, b: Operand, mask_BL: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a b, and zero where the mask is; (B, D, L) in `dtype`."""
    batch, channels, length = a.x_BDL.shape
    out_BDL = a.x_BDL.new_empty(batch, channels, length, dtype=dtype)
    grid, block = _grid(out_BDL)
    masked = out_BDL if mask_BL is None else mask_BL
    _product[grid](
        *a.arguments(), *b.arguments(), masked, out_BDL, channels, length, MASKED=mask_BL is not None, BLOCK=block
    )
    return out_BDL


def short(x: Operand, dtype: torch.dtype) -> Tensor:
    """The short convolution of an operand, (B, D, L) in `dtype`."""
    out_BDL = x.x_BDL.new_empty(x.x_BDL.shape, dtype=dtype)
    grid, block = _grid(out_BDL)
    _short[grid](*x.arguments(), out_BDL, *out_BDL.shape[1:], BLOCK=block)
    return out_BDL


def adjoint(
    grad_BDL: Tensor, factor: Operand | None, mask_BL: Tensor | None, x: Operand, dx_BDL: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient of (short convolution of x) times `factor`, those of taps and bias, float32; that of x goes to
    `dx`."""
    assert x.taps_DK is not None
    batch, channels, length = grad_BDL.shape
    taps = x.taps_DK.shape[1]
    places = next_power(taps + 1)
    sums_BDP = grad_BDL.new_empty(batch, channels, places, dtype=torch.float32)
    grad = Operand(touching(grad_BDL))
    *other, other_taps = (grad if factor is None else factor).arguments()
    assert dx_BDL.stride(2) == 1
    x_BDL, x_batch, x_row = x.arguments()[:3]
    _adjoint[(batch * channels,)](
        *grad.arguments()[:3], *other, MULTIPLIED=factor is not None, B=other_taps,
        mask=grad_BDL if mask_BL is None else mask_BL, MASKED=mask_BL is not None,
        x=x_BDL, x_batch=x_batch, x_stride=x_row, taps=x.taps_DK.contiguous(),
        dx=dx_BDL, dx_batch=dx_BDL.stride(0), dx_stride=dx_BDL.stride(1), sums=sums_BDP, channels=channels,
        length=length, K=taps, PLACES=places, BLOCK=min(BLOCK, next_power(length, 16)),
    )  # fmt: skip
    sums_DP = sums_BDP.sum(0)
    return sums_DP[:, :taps], sums_DP[:, taps]


def _grid(out_BDL: Tensor) -> tuple[tuple[int, int], int]:
    batch, channels, length = out_BDL.shape
    block = min(BLOCK, next_power(length, 16))
    return (batch * channels, -(-length // block)), block
