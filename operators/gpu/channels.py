"""Channel-wise Hyena between its projections on an accelerator: every gate is one pass, every convolution one kernel.

    z_0 = u_{P-2} u_{P-1},   z_{n+1} = u_{P-3-n} (h_n * z_n),   y = z_N     with u = short_conv(p), P = N + 2 rows

The output gate is the last of the gates. The autograd node keeps projections and filters; gates and convolutions are
computed again on the way back. bfloat16 up to `LONGEST` positions is convolved on matrix units (`toeplitz`), all
else by FFT in float32.

Shapes: as in `convolution.gated`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import blocks_of, fft_size
from operators.gpu.gates import MOST_TAPS, Operand, adjoint, product
from operators.gpu.toeplitz import convolve, correlate

LONGEST = 4096  # positions from which on FFTs are faster, measured


class _Rows:
    """Short convolutions of the projections, row by row, counted from the last."""

    def __init__(self, p_BPDL: Tensor, taps_PDK: Tensor, bias_PD: Tensor) -> None:
        self.p_BPDL, self.taps_PDK, self.bias_PD = p_BPDL, taps_PDK, bias_PD

    def __getitem__(self, row: int) -> Operand:
        return Operand(self.p_BPDL[:, row], self.taps_PDK[row], self.bias_PD[row])


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p_BPDL: Tensor, mask_BL: Tensor | None, taps_PDK: Tensor, bias_PD: Tensor, h_NDL: Tensor
    ) -> Tensor:
        ctx.save_for_backward(p_BPDL, mask_BL, taps_PDK, bias_PD, h_NDL)
        return _forward(_Rows(p_BPDL, taps_PDK, bias_PD), mask_BL, h_NDL)[0][-1].z_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Tensor | None, ...]:
        p_BPDL, mask_BL, taps_PDK, bias_PD, h_NDL = ctx.saved_tensors
        rows, count = _Rows(p_BPDL, taps_PDK, bias_PD), len(h_NDL)
        dp_BPDL = torch.empty_like(p_BPDL, memory_format=torch.contiguous_format)
        dh_NDL = torch.empty_like(h_NDL) if ctx.needs_input_grad[4] else None
        dtaps_PDK, dbias_PD = torch.empty_like(taps_PDK), torch.empty_like(bias_PD)

        def back(row: int, grad_BDL: Tensor, factor: Operand) -> None:
            gradients = adjoint(grad_BDL, factor, mask_BL, rows[row], dp_BPDL[:, row])
            dtaps_PDK[row], dbias_PD[row] = gradients

        read, convolved_BDL = _forward(rows, mask_BL, h_NDL, last=False)
        for n in reversed(range(count)):
            back(-3 - n, grad_BDL, Operand(convolved_BDL[n]))
            dy_BDL = product(rows[-3 - n], Operand(grad_BDL), mask_BL, p_BPDL.dtype)
            grad_BDL = read[n].backward(dy_BDL, h_NDL[n], None if dh_NDL is None else dh_NDL[n])
        back(-2, grad_BDL, rows[-1])
        back(-1, grad_BDL, rows[-2])
        return dp_BPDL, None, dtaps_PDK, dbias_PD, dh_NDL


def takes(p: Tensor, taps_EK: Tensor) -> bool:
    """Whether the kernels compute what begins with these projections and this short convolution."""
    return p.dtype in (torch.float32, torch.bfloat16) and taps_EK.shape[1] <= MOST_TAPS


def gated(p_BPDL: Tensor, mask_BL: Tensor | None, taps_PDK: Tensor, bias_PD: Tensor, h_NDL: Tensor) -> Tensor:
    """From projections to what the last projection reads, differentiable by all but the mask.

    Args:
        p_BPDL: projections, float32 or bfloat16, already masked.
        mask_BL: as in `Hyena.forward`.
        taps_PDK, bias_PD: short convolution.
        h_NDL: filters with the direct term at lag 0, float32.

    Returns:
        (B, D, L) in the dtype of the projections; run it outside autocast.
    """
    mask_BL = None if mask_BL is None else mask_BL.to(p_BPDL.dtype).expand(len(p_BPDL), -1).contiguous()
    inputs = (p_BPDL, mask_BL, taps_PDK.float(), bias_PD.float(), h_NDL)
    return cast(Tensor, _Gated.apply(*inputs))  # type: ignore[no-untyped-call]


def _forward(
    rows: _Rows, mask_BL: Tensor | None, h_NDL: Tensor, *, last: bool = True
) -> tuple[list[_Input], list[Tensor]]:
    """What each convolution reads, with the output behind them unless not `last`; and what each gives."""
    dtype = rows.p_BPDL.dtype
    read, convolved_BDL = [_Input(product(rows[-2], rows[-1], mask_BL, dtype))], []
    for n, h_DL in enumerate(h_NDL):
        convolved_BDL.append(read[-1].convolved(h_DL))
        if last or n + 1 < len(h_NDL):
            read.append(_Input(product(rows[-3 - n], Operand(convolved_BDL[-1]), mask_BL, dtype)))
    return read, convolved_BDL


class _Input:
    """What a convolution reads; and its spectrum, where it is convolved by that and all channels are one block."""

    def __init__(self, z_BDL: Tensor) -> None:
        self.z_BDL, self.length = z_BDL, z_BDL.shape[-1]
        self.on_matrix_units = z_BDL.dtype == torch.bfloat16 and self.length <= LONGEST
        self.blocks = list(blocks_of(z_BDL.shape[1], len(z_BDL) * self.length, z_BDL.device))
        self.spectrum_BDF: Tensor | None = None

    def convolved(self, h_DL: Tensor) -> Tensor:
        """Convolved with filters, in the same precision."""
        if self.on_matrix_units:
            return convolve(self.z_BDL, h_DL)
        y_BDL = torch.empty_like(self.z_BDL)
        for channels in self.blocks:
            spectrum_BdF = self._transformed(self.z_BDL[:, channels])
            self.spectrum_BDF = spectrum_BdF if len(self.blocks) == 1 else None
            y_BDL[:, channels] = self._inverse(spectrum_BdF * self._transformed(h_DL[channels]))
        return y_BDL

    def backward(self, dy_BDL: Tensor, h_DL: Tensor, dh_DL: Tensor | None) -> Tensor:
        """Gradient of the input; that of the filters goes to `dh`."""
        if self.on_matrix_units:
            if dh_DL is not None:
                dh_DL.copy_(correlate(dy_BDL, self.z_BDL))
            return convolve(dy_BDL, h_DL, causal=False)
        dz_BDL = torch.empty_like(dy_BDL)
        for channels in self.blocks:
            dy_BdF = self._transformed(dy_BDL[:, channels])
            dz_BDL[:, channels] = self._inverse(dy_BdF * self._transformed(h_DL[channels]).conj())
            if dh_DL is not None:
                kept = self.spectrum_BDF
                dy_BdF *= (self._transformed(self.z_BDL[:, channels]) if kept is None else kept).conj()
                dh_DL[channels] = self._inverse(dy_BdF.sum(0))
        return dz_BDL

    def _transformed(self, x: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfft(x.float(), fft_size(2 * self.length - 1))
        return spectrum

    def _inverse(self, spectrum: Tensor) -> Tensor:
        x: Tensor = torch.fft.irfft(spectrum, fft_size(2 * self.length - 1))[..., : self.length]
        return x
