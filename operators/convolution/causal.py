"""Causal convolutions, long (by FFT) and short (depthwise), each beside its readable reference.

Long ones with gradients are part of `gated`; the short one is an autograd node that keeps its inputs and nothing else.
Channels go block by block, so that a block stays in the cache. They compute in float32, or in float64 where the inputs
are float64. Every reduction has a fixed order, so results repeat bit for bit at a fixed number of threads. First
derivatives only.

Shapes: B batch, D channels, E channels of all projections, L positions, K taps.
"""

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.gpu import accelerated
from operators.gpu.gates import MOST_TAPS as MOST_TAPS_OF_KERNELS
from operators.gpu.gates import Operand, adjoint, short
from operators.native import serves

MOST_TAPS = 64  # of the compiled core
BLOCK = 2**17  # numbers: 0.5 MB of float32, and a few times that with spectra
BLOCK_ELSEWHERE = 2**25  # on accelerators, which want much to do at once


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision that filters and mixing compute in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks_of(rows: int, row_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows, each of as many numbers as a core's cache keeps at hand while they are worked on."""
    width = max(1, (BLOCK if device.type == "cpu" else BLOCK_ELSEWHERE) // max(1, row_size))
    for start in range(0, rows, width):
        yield slice(start, min(start + width, rows))


@functools.lru_cache(4096)
def fft_size(minimum: int) -> int:
    """A size not below `minimum` that is transformed fast: a power of two where that is at most a quarter more, else
    the smallest 2^a 3^b 5^c with a >= 4. Other sizes cost twice as much and more."""
    power: int = max(2, 1 << (minimum - 1).bit_length())
    if 4 * power <= 5 * minimum or power <= 64:
        return power
    odd_parts: Iterator[int] = (3**b * 5**c for b in range(24) for c in range(16) if 3**b * 5**c * 16 < power)
    return min([power, *(odd << max(4, (-(-minimum // odd) - 1).bit_length()) for odd in odd_parts)])


def long_conv(z_BDL: Tensor, h_DL: Tensor) -> Tensor:
    """Causal convolution of every channel with its own filter, y_t = sum_{s <= t} h_{t-s} z_s; without gradients.

    O(L log L) by FFT. The error grows with the largest magnitude in a sequence, before or after the position looked at:
    test causality with a tolerance that scales with it.
    """
    length, y_BDL = z_BDL.shape[-1], torch.empty_like(z_BDL, memory_format=torch.contiguous_format)
    size = fft_size(2 * length - 1)
    for channels in blocks_of(z_BDL.shape[1], z_BDL.shape[0] * length, z_BDL.device):
        spectrum = torch.fft.rfft(z_BDL[:, channels], size)
        spectrum *= torch.fft.rfft(h_DL[channels], size)
        y_BDL[:, channels] = torch.fft.irfft(spectrum, size)[..., :length]
    return y_BDL


def long_conv_reference(z_BDL: Tensor, h_DL: Tensor, direct_D: Tensor) -> Tensor:
    """The same from its definition, O(L^2), and direct z_t, the input weighed; differentiable by autograd."""
    length = z_BDL.shape[-1]
    steps = []
    for t in range(length):
        past_BD = (z_BDL[..., : t + 1] * h_DL[:, : t + 1].flip(-1)).sum(-1)
        steps.append(past_BD + direct_D * z_BDL[..., t])
    return torch.stack(steps, dim=-1)


def add_taps(u: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """`short_conv` of inputs (.., L), taps (.., K) and biases (..) of any leading dimensions, without its dtypes."""
    y = torch.addcmul(bias[..., None], u, weight[..., -1:], out=out)
    for lag in range(1, min(weight.shape[-1], u.shape[-1])):
        y[..., lag:].addcmul_(u[..., :-lag], weight[..., -1 - lag, None])
    return y


def add_taps_adjoint(grad: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_taps` by inputs, taps and biases; what the inputs have in front of the taps' dimensions is
    summed over."""
    axes = (*range(grad.dim() - weight.dim()), -1)
    du, dweight = grad * weight[..., -1:], torch.zeros_like(weight)
    dweight[..., -1] = (grad * u).sum(axes)
    for lag in range(1, min(weight.shape[-1], u.shape[-1])):
        du[..., :-lag].addcmul_(grad[..., lag:], weight[..., -1 - lag, None])
        dweight[..., -1 - lag] = (grad[..., lag:] * u[..., :-lag]).sum(axes)
    return du, dweight, grad.sum(axes)


def convolve_taps(u_BEL: Tensor, weight_EK: Tensor, bias_E: Tensor) -> Tensor:
    """`short_conv` in u's precision without gradients; bfloat16 is widened block by block, while it is in the cache."""
    if _core_convolves(u_BEL, weight_EK):
        return cast(Tensor, torch.ops.layerswap.short_conv(u_BEL, weight_EK.contiguous(), bias_E.contiguous()))
    if _kernels_convolve(u_BEL, weight_EK):
        return short(Operand(u_BEL, weight_EK, bias_E), u_BEL.dtype)
    y_BEL, dtype = torch.empty_like(u_BEL, memory_format=torch.contiguous_format), weight_EK.dtype
    for rows in blocks_of(u_BEL.shape[1], u_BEL.shape[0] * u_BEL.shape[-1], u_BEL.device):
        if u_BEL.dtype == dtype:
            add_taps(u_BEL[:, rows], weight_EK[rows], bias_E[rows], y_BEL[:, rows])
        else:
            y_BEL[:, rows] = add_taps(u_BEL[:, rows].to(dtype), weight_EK[rows], bias_E[rows])
    return y_BEL


def convolve_taps_backward(grad_BEL: Tensor, u_BEL: Tensor, weight_EK: Tensor, du_BEL: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weights and biases of `convolve_taps`; that of u goes to `du`, of its shape."""
    dtype = weight_EK.dtype
    if _core_convolves(u_BEL, weight_EK) and du_BEL.stride(-1) == 1:
        inputs = (grad_BEL.contiguous(), u_BEL, weight_EK.contiguous(), du_BEL)
        return cast(tuple[Tensor, Tensor], torch.ops.layerswap.short_conv_backward(*inputs))
    if _kernels_convolve(u_BEL, weight_EK) and du_BEL.stride(-1) == 1:
        return adjoint(grad_BEL, None, None, Operand(u_BEL, weight_EK), du_BEL)
    dweight_EK, dbias_E = torch.empty_like(weight_EK), torch.empty_like(weight_EK[:, 0])
    for rows in blocks_of(u_BEL.shape[1], u_BEL.shape[0] * u_BEL.shape[-1], u_BEL.device):
        du_BEL[:, rows], dweight_EK[rows], dbias_E[rows] = add_taps_adjoint(
            grad_BEL[:, rows].to(dtype), u_BEL[:, rows].to(dtype), weight_EK[rows]
        )
    return dweight_EK, dbias_E


def _core_convolves(u_BEL: Tensor, weight_EK: Tensor) -> bool:
    touching = u_BEL.shape[-1] == 1 or u_BEL.stride(-1) == 1
    return serves(u_BEL) and touching and weight_EK.dtype == torch.float32 and weight_EK.shape[-1] <= MOST_TAPS


def _kernels_convolve(u_BEL: Tensor, weight_EK: Tensor) -> bool:
    few = weight_EK.shape[1] <= MOST_TAPS_OF_KERNELS
    return accelerated(u_BEL) and weight_EK.dtype == torch.float32 and few


class _ShortConv(torch.autograd.Function):
    """Shift, scale and add: for a few taps faster than a grouped conv1d, and so is its backward."""

    @staticmethod
    def forward(ctx: Any, u_BEL: Tensor, weight_EK: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(u_BEL, weight_EK)
        return convolve_taps(u_BEL, weight_EK, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BEL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u_BEL, weight_EK = ctx.saved_tensors
        du_BEL = torch.empty_like(u_BEL, memory_format=torch.contiguous_format)
        return du_BEL, *convolve_taps_backward(grad_BEL, u_BEL, weight_EK, du_BEL)


def short_conv(u_BEL: Tensor, weight_EK: Tensor, bias_E: Tensor, *, narrow: bool = False) -> Tensor:
    """Depthwise causal convolution; the last tap weighs the present, as in a left-padded `conv1d`.

    Args:
        u_BEL: input.
        weight_EK: taps, oldest first.
        bias_E: added at every position.
        narrow: keep what is in half precision so; sums are in float32 all the same.

    Returns:
        (B, E, L) in float32, or float64 for float64 input, or in the input's precision.
    """
    dtype = compute_dtype(u_BEL.dtype)
    inputs = (u_BEL if narrow else u_BEL.to(dtype), weight_EK.to(dtype), bias_E.to(dtype))
    return cast(Tensor, _ShortConv.apply(*inputs))  # type: ignore[no-untyped-call]


def short_conv_reference(u_BEL: Tensor, weight_EK: Tensor, bias_E: Tensor) -> Tensor:
    """`short_conv` by torch's grouped convolution."""
    taps = weight_EK.shape[1]
    padded = torch.nn.functional.pad(u_BEL, (taps - 1, 0))
    return torch.nn.functional.conv1d(padded, weight_EK[:, None], bias_E, groups=weight_EK.shape[0])
