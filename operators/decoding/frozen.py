"""Long filters as they are at one moment, and what evaluation and decoding derive from them, computed once.

Shapes: C filters, L lags, D channels of one convolution, F frequencies.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from operators.convolution.causal import fft_size
from operators.decoding.recurrence import Recurrence
from operators.filters.fit import fit_modes
from operators.filters.modes import Modes

FITTED_MODES = 16  # where filters are no sums of modes
FEW_TAPS = 64  # without gradients up to so many are faster than FFTs


class Filters:
    """Long filters (C, L), without gradients.

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
        self._spectrum: tuple[tuple[int, int], Tensor] | None = None  # of the last length asked for
        self._first_lags: dict[tuple[int, int], Tensor] = {}
        self._segments: dict[tuple[int, int, int, int], Tensor] = {}
        self.native: dict[int | str, Any] = {}  # what the compiled core keeps

    def reversed(self, length: int) -> Tensor:
        """The first `length` lags with time reversed, (C, length), the last entry at lag 0."""
        if self._reversed_CL is None:
            self._reversed_CL = self.h_CL.flip(-1)
        return self._reversed_CL.narrow(1, self.h_CL.shape[1] - length, length)

    def spectrum(self, length: int, beyond: int = 0) -> Tensor:
        """The spectrum for convolving `length` inputs into as many outputs and `beyond` more, (C, F)."""
        asked = (length, beyond)
        if self._spectrum is None or self._spectrum[0] != asked:
            size = fft_size(2 * length - 1 + beyond)
            self._spectrum = (asked, torch.fft.rfft(self.h_CL[:, : length + beyond], size))
        return self._spectrum[1]

    def convolution(self, length: int, beyond: int = 0) -> Callable[[Tensor, slice], Tensor]:
        """The convolution of sequences (B, D, length) with some of the filters into (B, D, length + beyond), in its
        fastest form; no gradients."""
        if self.taps <= FEW_TAPS and self.h_CL.device.type == "cpu":  # elsewhere conv1d may round to 10 bits
            taps_CK = self.reversed(min(self.taps, length + beyond)).contiguous()
            return lambda z_BDL, filters: _tapped(z_BDL, taps_CK[filters], beyond)
        size, spectrum_CF = fft_size(2 * length - 1 + beyond), self.spectrum(length, beyond)

        def convolve(z_BDL: Tensor, filters: slice) -> Tensor:
            transformed_BDF = torch.fft.rfft(z_BDL, size)
            transformed_BDF *= spectrum_CF[filters]
            y_BDL: Tensor = torch.fft.irfft(transformed_BDF, size)[..., : length + beyond]
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

    def first_lags(self, channels: slice, count: int) -> Tensor:
        """What an input does to its own output and those up to `count` - 1 positions later, (count, D)."""
        asked = (channels.start, count)
        if asked not in self._first_lags:
            h_DL = self.h_CL[channels, :count]
            self._first_lags[asked] = torch.nn.functional.pad(h_DL, (0, count - h_DL.shape[1])).t().contiguous()
        return self._first_lags[asked]

    def segment(self, channels: slice, lags: tuple[int, int], size: int, *, keep: bool) -> Tensor:
        """The spectrum of the lags from the first to before the second, (D, F), of a transform of `size`."""
        asked = (channels.start, channels.stop, *lags)
        if asked in self._segments:
            return self._segments[asked]
        spectrum_DF: Tensor = torch.fft.rfft(self.h_CL[channels, slice(*lags)], size)
        if keep:
            self._segments[asked] = spectrum_DF
        return spectrum_DF


def _tapped(z_BDL: Tensor, taps_DK: Tensor, beyond: int) -> Tensor:
    padded = torch.nn.functional.pad(z_BDL, (taps_DK.shape[1] - 1, beyond))
    return torch.nn.functional.conv1d(padded, taps_DK[:, None], groups=taps_DK.shape[0])
