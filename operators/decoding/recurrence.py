"""Modal filters as recurrences: what a convolution remembers is one number a mode, however long the past.

    x_t = exp(log_pole) x_{t-1} + residue z_t,    y_t = Re sum_s x_t + direct z_t

Whole stretches of inputs are taken in by matrix products of `PIECE` lags. A step adds x (exp(log_pole) - 1) to x: for
slow modes that factor has more digits than a pole near 1.

Shapes: B batch, C filters, D channels of one convolution, S modes, L new positions, P lags of a piece, N pieces.
"""

import torch
from torch import Tensor

from operators.filters.modes import Modes

PIECE = 128


def first_lags(modes: Modes, length: int) -> Tensor:
    """The filters (C, length) as `Modes.at` of the lags from 0, but exponentials are taken of two short grids only: lag
    a P + b is a product of both, and the sum over modes a product of matrices. Differentiable."""
    lags_P = torch.arange(PIECE, device=modes.log_poles_CS.device)
    starts_N = PIECE * torch.arange(-(-length // PIECE), device=lags_P.device)
    starts_CNS = modes.residues_CS[:, None] * torch.exp(modes.log_poles_CS[:, None] * starts_N[:, None])
    inside_CPS = torch.exp(modes.log_poles_CS[:, None] * lags_P[:, None])
    return torch.bmm(_pairs(starts_CNS), _pairs(_conjugate(inside_CPS)).transpose(1, 2)).flatten(1)[:, :length]


class Recurrence:
    """Filters (C, S) as they are at this moment, without gradients, and what decoding derives from them.

    A convolution's state is (B, S, D), complex where the modes are.
    """

    def __init__(self, modes: Modes, direct_C: Tensor) -> None:
        self.modes, self.direct_C = modes, direct_C
        self._steps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by first channel
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, channels: slice, z_B1D: Tensor, x_BSD: Tensor) -> Tensor:
        """The output (B, 1, D) at one position; the state moves on in place."""
        change_SD, residue_SD, direct_D = self._step_tables(channels)
        x_BSD += torch.addcmul(residue_SD * z_B1D, x_BSD, change_SD)
        y_B1D = x_BSD.sum(1, keepdim=True)
        return torch.addcmul(y_B1D.real if y_B1D.is_complex() else y_B1D, z_B1D, direct_D)

    def take(self, channels: slice, z_BDL: Tensor, x_BSD: Tensor | None) -> Tensor:
        """The state after L more inputs; None is the state of no past."""
        batch, length = z_BDL.shape[0], z_BDL.shape[-1]
        pieces = -(-length // PIECE)
        padded = torch.nn.functional.pad(z_BDL, (pieces * PIECE - length, 0))
        z_DNP = padded.unflatten(2, (pieces, PIECE)).transpose(0, 1).flatten(1, 2)
        into_DPS, _ = self._piece_tables(channels)
        sums = _paired(torch.bmm(z_DNP, into_DPS), self._complex).unflatten(1, (batch, pieces))
        log_poles_DS, residues_DS = self.modes.log_poles_CS[channels], self.modes.residues_CS[channels]
        lags_N1 = PIECE * torch.arange(pieces - 1, -1, -1, device=z_BDL.device)[:, None]
        x_DBS = (sums * torch.exp(log_poles_DS[:, None] * lags_N1)[:, None]).sum(2) * residues_DS[:, None]
        taken_BSD: Tensor = x_DBS.permute(1, 2, 0).contiguous()
        return taken_BSD if x_BSD is None else taken_BSD + x_BSD * torch.exp(log_poles_DS.t() * length)

    def ahead(self, channels: slice, x_BSD: Tensor, length: int) -> Tensor:
        """What the past adds to each of the next `length` outputs, (B, D, length)."""
        _, out_DSP = self._piece_tables(channels)
        piece_SD = torch.exp(self.modes.log_poles_CS[channels].t() * PIECE)
        found = []
        for _ in range(0, length, PIECE):
            found.append(torch.bmm(_pairs(x_BSD.permute(2, 0, 1)), out_DSP))
            x_BSD = x_BSD * piece_SD
        return torch.cat(found, dim=2)[..., :length].transpose(0, 1)

    @property
    def _complex(self) -> bool:
        return self.modes.log_poles_CS.is_complex()

    def _step_tables(self, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Pole - 1 and residue (S, D), and the weight of an input in its own output (D,)."""
        if channels.start not in self._steps:
            change_SD = torch.expm1(self.modes.log_poles_CS[channels]).t().contiguous()
            residue_SD = self.modes.residues_CS[channels].t().contiguous()
            self._steps[channels.start] = (change_SD, residue_SD, self.direct_C[channels])
        return self._steps[channels.start]

    def _piece_tables(self, channels: slice) -> tuple[Tensor, Tensor]:
        """From the inputs of a piece to the modes at its end, (D, P, S or 2 S), and from modes to the outputs of the
        piece behind them, (D, S or 2 S, P); real and imaginary parts side by side."""
        if channels.start not in self._pieces:
            log_poles_D1S = self.modes.log_poles_CS[channels, None]
            lags_P1 = torch.arange(PIECE, device=log_poles_D1S.device)[:, None]
            into_DPS = _pairs(torch.exp(log_poles_D1S * lags_P1.flip(0)))
            out_DPS = _pairs(_conjugate(torch.exp(log_poles_D1S * (lags_P1 + 1))))
            self._pieces[channels.start] = (into_DPS, out_DPS.transpose(1, 2).contiguous())
        return self._pieces[channels.start]


def _conjugate(numbers: Tensor) -> Tensor:
    return numbers.conj().resolve_conj() if numbers.is_complex() else numbers


def _pairs(numbers: Tensor) -> Tensor:
    """The last dimension, if complex, as twice as many real numbers."""
    return torch.view_as_real(numbers.contiguous()).flatten(-2) if numbers.is_complex() else numbers


def _paired(numbers: Tensor, are_complex: bool) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.view_as_complex(numbers.unflatten(-1, (-1, 2))) if are_complex else numbers
