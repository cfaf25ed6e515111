"""Long convolutions one position at a time, exactly: what past inputs add to outputs to come is added up ahead.

Direct decoding sums over the whole history at every step. Here a window of outputs to come holds what the history
before it contributes, by one FFT ("fold"); inside the window, after position n of it, the last U inputs, U the largest
power of two that divides n, are added to the next U outputs ("tile"). Every input meets every later output once:
O(L log^2 L) in all, and O(1) operations at most steps. It is the tiling of van der Hoeven's relaxed multiplication (see
Flash Inference, Oncescu et al. 2024, and FutureFill, Agarwal et al. 2024). Windows double, so there are few folds.

Shapes: B batch, C filters, D channels of one convolution, T positions seen, W width of the window, U of a tile.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from operators.convolution import fft_size
from operators.fit import fit_modes
from operators.modes import Modes
from operators.recurrence import Recurrence

FIRST_WINDOW = 64
FITTED_MODES = 16  # where filters are no sums of modes
FEW_TAPS = 64  # without gradients up to so many are faster than FFTs
LARGEST_MATRIX = 32  # tiles up to this size are matrix products, larger ones FFTs


class Filters:
    """Long filters (C, L) as they are at this moment, without gradients, and what decoding derives from them.

    Args:
        h_CL: the filters, with the direct term of a convolution at lag 0.
        modes: what they are sums of beside the direct term, where they are.
        direct_C: that term.
        taps: lags from which on they are zero; None where they are not.
    """

    def __init__(
        self, h_CL: Tensor, modes: Modes | None = None, direct_C: Tensor | None = None, taps: int | None = None
    ) -> None:
        self.h_CL, self.modes, self.taps = h_CL, modes, h_CL.shape[1] if taps is None else taps
        self.direct_C = torch.zeros_like(h_CL[:, 0]) if direct_C is None else direct_C.to(h_CL.dtype)
        self._reversed_CL: Tensor | None = None
        self._tiles: dict[tuple[int, int], Tensor] = {}
        self._spectrum: tuple[int, Tensor] | None = None  # of the last length asked for
        self._folds: dict[int, tuple[int, Tensor]] = {}  # by first channel, of the last size of FFT

    def reversed(self, length: int) -> Tensor:
        """The first `length` lags with time reversed, (C, length), the last entry at lag 0."""
        if self._reversed_CL is None:
            self._reversed_CL = self.h_CL.flip(-1)
        return self._reversed_CL.narrow(1, self.h_CL.shape[1] - length, length)

    def spectrum(self, length: int) -> Tensor:
        """The spectrum of the first `length` lags for convolutions of that length, (C, frequencies)."""
        if self._spectrum is None or self._spectrum[0] != length:
            self._spectrum = (length, torch.fft.rfft(self.h_CL[:, :length], fft_size(2 * length - 1)))
        return self._spectrum[1]

    def convolution(self, length: int) -> Callable[[Tensor, slice], Tensor]:
        """The convolution of whole sequences (B, D, length) with some of the filters, fastest form; no gradients."""
        if self.taps <= FEW_TAPS and self.h_CL.device.type == "cpu":  # elsewhere conv1d may round to 10 bits
            taps_CK = self.reversed(min(self.taps, length)).contiguous()
            return lambda z_BDL, filters: _tapped(z_BDL, taps_CK[filters])
        size, spectrum_CF = fft_size(2 * length - 1), self.spectrum(length)

        def convolve(z_BDL: Tensor, filters: slice) -> Tensor:
            spectrum = torch.fft.rfft(z_BDL, size)
            spectrum *= spectrum_CF[filters]
            y_BDL: Tensor = torch.fft.irfft(spectrum, size)[..., :length]
            return y_BDL

        return convolve

    @cached_property
    def recurrence(self) -> Recurrence:
        """The modes as a recurrence, fitted ones where the filters have none."""
        return Recurrence(self.fitted[0] if self.modes is None else self.modes, self.direct_C)

    @cached_property
    def fitted(self) -> tuple[Modes, Tensor]:
        """Modes near to the filters, and their relative errors (C,), see `fit_modes`."""
        h_CL = self.h_CL.clone()
        h_CL[:, 0] -= self.direct_C
        return fit_modes(h_CL, FITTED_MODES)

    def fold(self, channels: slice, past_BDT: Tensor, window: int) -> Tensor:
        """What the past adds to each of the next `window` outputs, (B, D, W)."""
        seen = past_BDT.shape[-1]
        size = fft_size(seen + window)
        if self._folds.get(channels.start, (0,))[0] != size:
            self._folds[channels.start] = (size, torch.fft.rfft(self.h_CL[channels, :size], size))
        spectrum = torch.fft.rfft(past_BDT, size) * self._folds[channels.start][1]
        ahead_BDW: Tensor = torch.fft.irfft(spectrum, size)[..., seen : seen + window].contiguous()
        return ahead_BDW

    def now(self, channels: slice) -> Tensor:
        """What an input does to the output of its own position, (D, 1)."""
        return self._tile(channels, 0)

    def add_tile(self, channels: slice, past_BDT: Tensor, ahead_BDW: Tensor, place: int) -> None:
        """After the window's position `place` - 1: add what the newest inputs do to the outputs from `place` on."""
        width = place & -place
        into_BDU = ahead_BDW.narrow(2, place, min(width, ahead_BDW.shape[2] - place))
        recent_BDU = past_BDT.narrow(2, past_BDT.shape[2] - width, width)
        tile = self._tile(channels, width)
        if width == 1:
            into_BDU.addcmul_(recent_BDU, tile)
        elif width <= LARGEST_MATRIX:
            into_BDU += (recent_BDU.transpose(0, 1) @ tile).transpose(0, 1)[..., : into_BDU.shape[-1]]
        else:
            added = torch.fft.irfft(torch.fft.rfft(recent_BDU, 2 * width) * tile, 2 * width)
            into_BDU += added[..., width : width + into_BDU.shape[-1]]

    def _tile(self, channels: slice, width: int) -> Tensor:
        """(D, 1), or (D, U, U) from inputs to outputs, or the spectrum (D, U + 1): of lags 1 to 2 U - 1; 0: lag 0."""
        name = (channels.start, width)
        if name not in self._tiles:
            missing = max(0, 2 * width - self.h_CL.shape[1])
            h_DU = torch.nn.functional.pad(self.h_CL[channels, : 2 * width], (0, missing))
            if width <= 1:
                tile = self.h_CL[channels, width : width + 1].contiguous()
            elif width <= LARGEST_MATRIX:
                step = torch.arange(width, device=h_DU.device)
                tile = h_DU[:, width + step - step[:, None]]
            else:
                tile = torch.fft.rfft(h_DU, 2 * width)
            self._tiles[name] = tile
        return self._tiles[name]


def _tapped(z_BDL: Tensor, taps_DK: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(z_BDL, (taps_DK.shape[1] - 1, 0))
    return torch.nn.functional.conv1d(padded, taps_DK[:, None], groups=taps_DK.shape[0])
