"""Channel-wise Hyena between its projections in one call of the core, with and without gradients.

Backward computes everything again from the projections, in their own dtype: nothing else of the size of the sequences
is kept.

Shapes: B batch, D model width, E projections' rows, K taps, C filters (of all convolutions), L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.decoding.frozen import Filters


def convolve(
    p_BEL: Tensor,
    mask_BL: Tensor | None,
    weight_EK: Tensor,
    bias_E: Tensor,
    filters: Filters,
    buffers: Sequence[Tensor],
    ahead: Tensor | None = None,
) -> Tensor:
    """What `ChannelHyena.whole` does, without gradients, by the frozen filters.

    Args:
        p_BEL: projections, float32 or bfloat16, already masked.
        mask_BL: as in `Hyena.forward`.
        weight_EK, bias_E: short convolution.
        filters: with the direct term at lag 0.
        buffers: float32 (B, D, L), one for each convolution or none: filled with what goes into it.
        ahead: filled with what comes out of each convolution at the positions behind, see `decode`.

    Returns:
        (B, D, L) in the dtype of the projections.
    """
    length = p_BEL.shape[-1]
    width = _width(p_BEL, filters.covering(length))
    spectra = spectra_of(filters, width, length + (0 if ahead is None else ahead.shape[2]))
    inputs = (_dense(p_BEL), _floats(mask_BL), weight_EK.float(), bias_E.float())
    return cast(Tensor, torch.ops.layerswap.convolve(*inputs, spectra, width, buffers, ahead))


def spectra_of(filters: Filters, width: int, length: int) -> Tensor:
    """Spectra of frozen filters for convolutions over `length` positions, kept there for every power of two."""
    size = transform_size(length)
    if size not in filters.core_spectra:
        h_CL = filters.covering(min(size, filters.longest))
        filters.core_spectra[size] = torch.ops.layerswap.spectrum(h_CL, None, width, size)
    return filters.core_spectra[size]


def transform_size(length: int) -> int:
    """The power of two that a convolution over `length` positions computes with."""
    return max(16, 1 << (length - 1).bit_length())


def convolve_trained(
    p_BEL: Tensor,
    mask_BL: Tensor | None,
    weight_EK: Tensor,
    bias_E: Tensor,
    h_CL: Tensor,
    direct_C: Tensor,
) -> Tensor:
    """`convolve` with gradients of the projections, the short convolution, the filters and the direct term."""
    inputs = (p_BEL, mask_BL, weight_EK.float(), bias_E.float(), h_CL, direct_C.float())
    return cast(Tensor, _Convolve.apply(*inputs))  # type: ignore[no-untyped-call]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p_BEL: Tensor,
        mask_BL: Tensor | None,
        weight_EK: Tensor,
        bias_E: Tensor,
        h_CL: Tensor,
        direct_C: Tensor,
    ) -> Tensor:
        p_BEL, mask_BL, h_CL = _dense(p_BEL), _floats(mask_BL), h_CL.contiguous()
        ctx.save_for_backward(p_BEL, mask_BL, weight_EK, bias_E, h_CL, direct_C)
        width = _width(p_BEL, h_CL)
        spectra = torch.ops.layerswap.spectrum(h_CL, direct_C, width, p_BEL.shape[-1])
        return cast(Tensor, torch.ops.layerswap.convolve(p_BEL, mask_BL, weight_EK, bias_E, spectra, width, [], None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Tensor | None, ...]:
        dp, dweight, dbias, dh, ddirect = torch.ops.layerswap.convolve_backward(_dense(grad_BDL), *ctx.saved_tensors)
        return dp, None, dweight, dbias, dh, ddirect


def _width(p_BEL: Tensor, h_CL: Tensor) -> int:
    """D, of which p has order + 1 and h order - 1."""
    return (p_BEL.shape[1] - h_CL.shape[0]) // 2


def _dense(x_BEL: Tensor) -> Tensor:
    """In a layout that the core reads: the positions of a channel touch, or the channels of a position."""
    dense = x_BEL.is_contiguous() or x_BEL.transpose(1, 2).is_contiguous()
    return x_BEL if dense else x_BEL.contiguous()


def _floats(mask_BL: Tensor | None) -> Tensor | None:
    return None if mask_BL is None else mask_BL.float().contiguous()
