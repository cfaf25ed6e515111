"""Everything that channel-wise Hyena does between its projections, in one pass over blocks of channels.

    u = short_conv(p),   v_0 = value,   v_{n+1} = h_n * (gate_n v_n) + direct_n gate_n v_n,   y = first v_N

A block of channels goes through all of it while it is in the cache, with gradients as without. The autograd node keeps
the projections and nothing else that grows with the batch: short convolution, gates and long convolutions are computed
again on the way back. `direct` is part of the spectra, its gradient that of the filter at lag 0.
Only first derivatives.

Shapes: B batch, N convolutions in order of application, P = N + 2 projections (first, gates, value), D channels,
d channels of a block, L positions, K taps, F frequencies.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import add_taps, add_taps_adjoint, blocks_of, compute_dtype, fft_size

Convolve = Callable[[Tensor, slice], Tensor]  # inputs of some channels and their filters, to outputs


class Inputs(NamedTuple):
    """What is computed from: projections, mask of real positions, and the short convolution's weights."""

    p_BPDL: Tensor
    mask_BL: Tensor | None
    taps_PDK: Tensor
    bias_PD: Tensor


def gated(inputs: Inputs, convolve: Convolve, histories: Sequence[Tensor], beyond: int) -> list[Tensor]:
    """Whole sequences without gradients, (B, D, L) in float32 or float64.

    What each convolution reads is written to `histories`, (B, D, L) each, where there are any; then what it adds to
    the `beyond` outputs after the sequence is returned too, (B, D, beyond) each.
    """
    y_BDL = _output(inputs)
    later = [y_BDL.new_empty((*y_BDL.shape[:2], beyond)) for _ in histories]
    width, length = y_BDL.shape[1:]
    for channels, _, u_BPdL in _blocks(inputs):
        value_BdL = u_BPdL[:, -1]
        for n in range(u_BPdL.shape[1] - 2):
            z_BdL = u_BPdL[:, -2 - n] * value_BdL
            value_BdL = convolve(z_BdL, slice(n * width + channels.start, n * width + channels.stop))
            if histories:
                histories[n][:, channels] = z_BdL
                later[n][:, channels] = value_BdL[..., length:]
                value_BdL = value_BdL[..., :length]
        torch.mul(u_BPdL[:, 0], value_BdL, out=y_BDL[:, channels])
    return [y_BDL, *later]


def gated_trained(inputs: Inputs, h_NDL: Tensor, direct_ND: Tensor) -> Tensor:
    """The same from filters, differentiable by them and by all inputs but the mask."""
    return cast(Tensor, _Gated.apply(*inputs, h_NDL, direct_ND))  # type: ignore[no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *given, h_NDL, direct_ND = arguments
        ctx.save_for_backward(*arguments)
        inputs = Inputs(*given)
        y_BDL = _output(inputs)
        for channels, _, u_BPdL in _blocks(inputs):
            values_BdL, _ = _forward(u_BPdL, _spectrum(h_NDL[:, channels], direct_ND[:, channels]))
            torch.mul(u_BPdL[:, 0], values_BdL[-1], out=y_BDL[:, channels])
        return y_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Tensor | None, ...]:
        *given, h_NDL, direct_ND = ctx.saved_tensors
        inputs = Inputs(*given)
        dp_BPDL, dtaps_PDK, dbias_PD, dh_NDL = (
            torch.empty_like(part) for part in (inputs.p_BPDL, inputs.taps_PDK, inputs.bias_PD, h_NDL)
        )
        for channels, p_BPdL, u_BPdL in _blocks(inputs):
            spectrum_NdF = _spectrum(h_NDL[:, channels], direct_ND[:, channels])
            du_BPdL = _backward(u_BPdL, spectrum_NdF, grad_BDL[:, channels], dh_NDL[:, channels])
            if inputs.mask_BL is not None:
                du_BPdL *= inputs.mask_BL[:, None, None].to(du_BPdL.dtype)
            dp, dtaps, dbias = add_taps_adjoint(du_BPdL, p_BPdL, inputs.taps_PDK[:, channels])
            dp_BPDL[:, :, channels], dtaps_PDK[:, channels], dbias_PD[:, channels] = dp, dtaps, dbias
        return dp_BPDL, None, dtaps_PDK, dbias_PD, dh_NDL, dh_NDL[..., 0]


def _output(inputs: Inputs) -> Tensor:
    batch, _, width, length = inputs.p_BPDL.shape
    return inputs.p_BPDL.new_empty((batch, width, length), dtype=compute_dtype(inputs.p_BPDL.dtype))


def _blocks(inputs: Inputs) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Channels of each block, their projections, and those after the short convolution, zero at padding."""
    batch, _, width, length = inputs.p_BPDL.shape
    dtype = compute_dtype(inputs.p_BPDL.dtype)
    for channels in blocks_of(width, batch * length, inputs.p_BPDL.device):
        p_BPdL = inputs.p_BPDL[:, :, channels].to(dtype)
        u_BPdL = add_taps(p_BPdL, inputs.taps_PDK[:, channels].to(dtype), inputs.bias_PD[:, channels].to(dtype))
        if inputs.mask_BL is not None:
            u_BPdL *= inputs.mask_BL[:, None, None].to(dtype)
        yield channels, p_BPdL, u_BPdL


def _spectrum(h_NdL: Tensor, direct_Nd: Tensor) -> Tensor:
    spectrum_NdF: Tensor = torch.fft.rfft(h_NdL, fft_size(2 * h_NdL.shape[-1] - 1))
    return spectrum_NdF + direct_Nd[..., None]


def _forward(u_BPdL: Tensor, spectrum_NdF: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Values before and after each convolution, and the spectra of what each reads."""
    length = u_BPdL.shape[-1]
    size = fft_size(2 * length - 1)
    values_BdL, spectra_BdF = [u_BPdL[:, -1]], []
    for n, spectrum_dF in enumerate(spectrum_NdF):
        spectra_BdF.append(torch.fft.rfft(u_BPdL[:, -2 - n] * values_BdL[-1], size))
        values_BdL.append(torch.fft.irfft(spectra_BdF[-1] * spectrum_dF, size)[..., :length])
    return values_BdL, spectra_BdF


def _backward(u_BPdL: Tensor, spectrum_NdF: Tensor, grad_BdL: Tensor, dh_NdL: Tensor) -> Tensor:
    """Gradients by `u`; those by filters are written to `dh`."""
    length = u_BPdL.shape[-1]
    size = fft_size(2 * length - 1)
    values_BdL, transformed_BdF = _forward(u_BPdL, spectrum_NdF)
    du_BPdL = torch.empty_like(u_BPdL)
    torch.mul(grad_BdL, values_BdL.pop(), out=du_BPdL[:, 0])
    dvalue_BdL = grad_BdL * u_BPdL[:, 0]
    for n in reversed(range(len(spectrum_NdF))):
        grad_BdF = torch.fft.rfft(dvalue_BdL, size)
        dz_BdL = torch.fft.irfft(grad_BdF * spectrum_NdF[n].conj(), size)[..., :length]
        grad_BdF *= transformed_BdF[n].conj()
        dh_NdL[n] = torch.fft.irfft(grad_BdF.sum(0), size)[..., :length]
        torch.mul(dz_BdL, values_BdL.pop(), out=du_BPdL[:, -2 - n])
        dvalue_BdL = dz_BdL * u_BPdL[:, -2 - n]
    du_BPdL[:, -1] = dvalue_BdL
    return du_BPdL
