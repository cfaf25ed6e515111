"""Long filters as they are at one moment, and what evaluation and decoding derive from them.

Made by a named call (`Hyena.freeze`), kept by a decoding state or by `frozen_filters`, and gone with it. Nothing here
has gradients, and nothing is kept that grows with the number of calls.

Shapes: C filters, L lags, D channels of one convolution, F frequencies.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor

from operators.convolution.causal import fft_size
from operators.decoding.recurrence import Recurrence
from operators.filters.fit import fit_modes
from operators.filters.modes import Modes
from operators.mixing.head_states import Recurrence as HeadRecurrence
from operators.mixing.head_states import freeze

FITTED_MODES = 16  # where filters are no sums of modes
FEW_TAPS = 64  # without gradients up to so many are faster than FFTs


class Derived:
    """What weights make: a copy of its owner shares it, and where the owner is pickled None takes its place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Filters(Derived):
    """Long filters (C, L), without gradients, computed as far as they are asked for. Threads may share them.

    Args:
        compute: gives the first lags, (C, L).
        longest: lags that it gives at most.
        modes: gives what they are sums of beside the direct term, or None.
        direct_C: the direct term of a convolution, which is added at lag 0.
        taps: lags from which on they are zero; None where they are not.
    """

    def __init__(
        self,
        compute: Callable[[int], Tensor],
        longest: int,
        modes: Callable[[], Modes | None] = lambda: None,
        direct_C: Tensor | None = None,
        taps: int | None = None,
    ) -> None:
        self.longest, self.taps = longest, longest if taps is None else taps
        self.direct_C = None if direct_C is None else direct_C.detach().clone()
        self._compute, self._modes = compute, modes
        self._h_CL: Tensor | None = None
        self._reversed_CL: Tensor | None = None
        self._spectrum: tuple[tuple[int, int], Tensor] | None = None  # of the last length asked for
        self._first_lags: dict[tuple[int, int], Tensor] = {}
        self._segments: dict[tuple[int, int], tuple[Tensor, bytearray]] = {}  # spectra, and which filters have theirs
        self.core_spectra: dict[int, Tensor] = {}  # of the compiled core, by size

    def covering(self, length: int) -> Tensor:
        """The first `length` lags and perhaps more, (C, L), contiguous."""
        h_CL = self._h_CL
        if h_CL is None or h_CL.shape[1] < length:
            least = 0 if h_CL is None else min(self.longest, 2 * h_CL.shape[1])
            h_CL = self._h_CL = self._computed(max(length, least))
        return h_CL

    def first(self, length: int) -> Tensor:
        """The first `length` lags, (C, length)."""
        return self.covering(length)[:, :length]

    def reversed(self, length: int) -> Tensor:
        """The first `length` lags with time reversed, (C, length), the last entry at lag 0."""
        reversed_CL = self._reversed_CL
        if reversed_CL is None or reversed_CL.shape[1] < length:
            reversed_CL = self._reversed_CL = self.covering(length).flip(-1)
        return reversed_CL.narrow(1, reversed_CL.shape[1] - length, length)

    def convolution(self, length: int, beyond: int = 0) -> Callable[[Tensor, slice], Tensor]:
        """The convolution of sequences (B, D, length) with some of the filters into (B, D, length + beyond), in its
        fastest form; no gradients."""
        if self.taps <= FEW_TAPS and self.covering(1).device.type == "cpu":  # elsewhere conv1d may round to 10 bits
            taps_CK = self.reversed(min(self.taps, length + beyond)).contiguous()
            return lambda z_BDL, filters: _tapped(z_BDL, taps_CK[filters], beyond)
        size, spectrum_CF = fft_size(2 * length - 1 + beyond), self._spectrum_of(length, beyond)

        def convolve(z_BDL: Tensor, filters: slice) -> Tensor:
            transformed_BDF = torch.fft.rfft(z_BDL, size)
            transformed_BDF *= spectrum_CF[filters]
            y_BDL: Tensor = torch.fft.irfft(transformed_BDF, size)[..., : length + beyond]
            return y_BDL

        return convolve

    @cached_property
    @torch.no_grad()
    def modes(self) -> Modes | None:
        """What the filters are sums of beside the direct term, where they are."""
        modes = self._modes()
        return None if modes is None else Modes(*(part.detach().clone() for part in modes))

    @cached_property
    def recurrence(self) -> Recurrence:
        """The modes as a recurrence, fitted ones where the filters have none."""
        modes = self.fitted[0] if self.modes is None else self.modes
        direct_C = modes.log_poles_CS.real.new_zeros(len(modes.log_poles_CS))
        return Recurrence(modes, direct_C if self.direct_C is None else self.direct_C.to(direct_C.dtype))

    @cached_property
    def head_recurrence(self) -> HeadRecurrence:
        """The modes as heads go on with them."""
        assert self.modes is not None
        return freeze(self.modes)

    @cached_property
    def fitted(self) -> tuple[Modes, Tensor]:
        """Modes near to the filters, and their relative errors (C,), see `fit_modes`; seconds."""
        with torch.no_grad():
            return fit_modes(self._compute(self.longest), FITTED_MODES)

    def first_lags(self, channels: slice, count: int) -> Tensor:
        """What an input does to its own output and those up to `count` - 1 positions later, (count, D)."""
        found = self._first_lags.get((channels.start, count))
        if found is None:
            h_DL = self.first(min(count, self.longest))[channels]
            found = torch.nn.functional.pad(h_DL, (0, count - h_DL.shape[1])).t().contiguous()
            self._first_lags[channels.start, count] = found
        return found

    def segment(self, channels: slice, lags: tuple[int, int], size: int, *, keep: bool) -> Tensor:
        """The spectrum of the lags from the first to before the second, (D, F), of a transform of `size`; kept, where
        asked for, in one table for all filters."""
        h_CL = self.covering(lags[1])
        if not keep:
            return cast(Tensor, torch.fft.rfft(h_CL[channels, slice(*lags)], size))
        if lags not in self._segments:
            with torch.inference_mode(False):  # so that it can be written to inside and outside
                empty_CF = torch.empty(len(h_CL), size // 2 + 1, dtype=h_CL.dtype.to_complex(), device=h_CL.device)
            self._segments[lags] = (empty_CF, bytearray(len(h_CL)))
        spectrum_CF, ready = self._segments[lags]
        if 0 in ready[channels]:
            spectrum_CF[channels] = torch.fft.rfft(h_CL[channels, slice(*lags)], size)
            ready[channels] = b"\1" * (channels.stop - channels.start)
        return spectrum_CF[channels]

    @torch.no_grad()
    def _computed(self, length: int) -> Tensor:
        h_CL = self._compute(length).contiguous()
        if self.direct_C is not None:
            h_CL[:, 0] += self.direct_C
        return h_CL

    def _spectrum_of(self, length: int, beyond: int) -> Tensor:
        """The spectrum for convolving `length` inputs into as many outputs and `beyond` more, (C, F)."""
        kept = self._spectrum
        if kept is None or kept[0] != (length, beyond):
            h_CL = self.first(length + beyond)
            kept = self._spectrum = ((length, beyond), torch.fft.rfft(h_CL, fft_size(2 * length - 1 + beyond)))
        return kept[1]


def _tapped(z_BDL: Tensor, taps_DK: Tensor, beyond: int) -> Tensor:
    padded = torch.nn.functional.pad(z_BDL, (taps_DK.shape[1] - 1, beyond))
    return torch.nn.functional.conv1d(padded, taps_DK[:, None], groups=taps_DK.shape[0])
