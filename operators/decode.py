"""Long convolutions one position at a time, exactly: what past inputs add to outputs to come is added up ahead.

Direct decoding sums over the whole history at every step. Here a window of outputs to come holds what the history
before it contributes, by one FFT ("fold"); inside the window, after position n of it, the last U inputs, U the largest
power of two that divides n, are added to the next U outputs ("tile"). Every input meets every later output once:
O(L log^2 L) in all, and O(1) operations at most steps. It is the tiling of van der Hoeven's relaxed multiplication (see
Flash Inference, Oncescu et al. 2024, and FutureFill, Agarwal et al. 2024). Windows double, so there are few folds.

Shapes: B batch, C filters, D channels of one convolution, T positions seen, W width of the window, U of a tile.
"""

from typing import Any

import torch
from torch import Tensor

from operators.convolution import fft_size

FIRST_WINDOW = 64
LARGEST_MATRIX = 32  # tiles up to this size are matrix products, larger ones FFTs


class Filters:
    """Long filters (C, L) as they are at this moment, without gradients, and what decoding derives from them."""

    def __init__(self, h_CL: Tensor) -> None:
        self.h_CL = h_CL
        self._reversed_CL: Tensor | None = None
        self._tiles: dict[tuple[int, int], Tensor] = {}
        self._spectrum: tuple[int, Tensor] | None = None  # of the last length asked for
        self._folds: dict[int, tuple[int, Tensor]] = {}  # by first channel, of the last size of FFT
        self.native: dict[int | str, Any] = {}  # what the compiled core keeps

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
