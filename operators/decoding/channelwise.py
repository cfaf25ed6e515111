"""How channel-wise operators go on from what they have seen, a class a mode.

    tiled    all inputs; what they do to later outputs is added up ahead (`ahead`); exact
    direct   all inputs; every step sums over them; exact, the reference
    modal    one number a mode (`recurrence`); exact for modal filters, as near as `fit` comes for implicit ones
    window   the inputs that short filters still see; exact for them

The first two have a history, the others a memory of a constant size. Which of them a filter has is its `step_modes`.

Shapes: B batch, N convolutions, D channels of one of them, S modes, K taps, L or n new positions, W outputs to come.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.convolution.causal import long_conv
from operators.decoding.ahead import Ahead, window
from operators.decoding.frozen import Derived, Filters
from operators.decoding.history import History
from operators.decoding.state import HyenaState, Kept, MemoryState


class ChannelState(HyenaState, ABC):
    """A state of N convolutions, which are named by their index and have filters of their own, `channels`.

    A prefill writes what each convolution reads into one of `buffers` and calls `filled`.
    """

    def beyond(self, length: int) -> int:
        """How many outputs after a prefill of `length` positions `filled` wants to know its part of."""
        return 0

    def buffers(self, like_BDL: Tensor, convolutions: int) -> Sequence[Tensor]:
        """Where the inputs of every convolution in a prefill are to be written, (B, D, L) as `like`."""
        return [torch.empty_like(like_BDL, memory_format=torch.contiguous_format) for _ in range(convolutions)]

    @abstractmethod
    def filled(self, index: int, channels: slice, z_BDL: Tensor, pending_BDW: Tensor | None) -> None:
        """Remember the inputs of a prefill, which are in its buffer now; `pending` is what they add to the outputs
        that `beyond` asks for, None where nobody computed it."""

    @abstractmethod
    def chunk(self, index: int, channels: slice, z_BDn: Tensor) -> Tensor:
        """The outputs (B, D, n) at n new positions after the state's, which it remembers too."""

    @abstractmethod
    def step(self, index: int, channels: slice, z_B1D: Tensor) -> Tensor:
        """`chunk` of one position, (B, 1, D)."""

    def _frozen(self) -> Filters:
        assert self.filters is not None
        return self.filters

    def _convolved(self, channels: slice, z_BDL: Tensor) -> Tensor:
        return long_conv(z_BDL, self._frozen().first(z_BDL.shape[-1])[channels])


class Direct(ChannelState):
    """Sums over all inputs at every step. `gated` has those of every convolution, (B, D, T)."""

    mode = "direct"

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.gated: list[History] = []

    def buffers(self, like_BDL: Tensor, convolutions: int) -> Sequence[Tensor]:
        """See `ChannelState.buffers`: part of the histories."""
        self.gated = self.gated or [History(self.max_length) for _ in range(convolutions)]
        return [history.reserve(self.length, like_BDL) for history in self.gated]

    def filled(self, index: int, channels: slice, z_BDL: Tensor, pending_BDW: Tensor | None) -> None:
        """See `ChannelState.filled`: nothing is left to do."""

    def chunk(self, index: int, channels: slice, z_BDn: Tensor) -> Tensor:
        past_BDT = self.gated[index].append(self.length, z_BDn)
        return self._convolved(channels, past_BDT)[..., -z_BDn.shape[-1] :]

    def step(self, index: int, channels: slice, z_B1D: Tensor) -> Tensor:
        past_BDT = self.gated[index].append(self.length, z_B1D.transpose(1, 2))
        return (past_BDT * self._frozen().reversed(past_BDT.shape[-1])[channels]).sum(-1)[:, None]

    def _select(self, kept: Kept) -> None:
        super()._select(kept)
        for history in self.gated:
            history.select(kept, self.length)


@dataclass
class CoreWindow:
    """Sums of the outputs from `first` on, batch first, that hold all of the past when `position` is next."""

    sums: Tensor
    first: int
    position: int


class CoreTables(Derived):
    """What the compiled core derives from the filters `h_CL`: the first lags, spectra of longer ones, and which of
    these are there. It writes to them, so a copy makes its own."""

    def __init__(self, h_CL: Tensor, near: Tensor, spectra: Tensor, ready: Tensor) -> None:
        self.h_CL, self.near, self.spectra, self.ready = h_CL, near, spectra, ready

    def __deepcopy__(self, memo: object) -> None:  # type: ignore[override]
        return None


class Tiled(Direct):
    """Adds up ahead what inputs do to later outputs.

    Attributes:
        ahead: by convolution, what the positions seen add to outputs to come; of use only at the position it is at.
        core: the same of the compiled core, for all convolutions.
        tables: what the core works with.
    """

    mode = "tiled"

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.ahead: dict[int, Ahead] = {}
        self.core: CoreWindow | None = None
        self.tables: CoreTables | None = None

    def beyond(self, length: int) -> int:
        """See `ChannelState.beyond`: what comes out of a transform that is a little longer than the prefill's."""
        return window(length, self.max_length)

    def filled(self, index: int, channels: slice, z_BDL: Tensor, pending_BDW: Tensor | None) -> None:
        if pending_BDW is not None:
            self.ahead[index] = Ahead(self._frozen(), channels, z_BDL, pending_BDW)

    def step(self, index: int, channels: slice, z_B1D: Tensor) -> Tensor:
        past_BDT, ahead = self.gated[index].write(self.length, z_B1D.transpose(1, 2)), self.ahead.get(index)
        if ahead is None or ahead.position != self.length:
            ahead = self.ahead[index] = Ahead(self._frozen(), channels, past_BDT[..., : self.length])
        return ahead.step(self._frozen(), z_B1D, past_BDT)

    def _crop(self, length: int) -> None:
        super()._crop(length)
        self.core = None
        self.ahead.clear()
        if length == 0:
            self.tables = None

    def _select(self, kept: Kept) -> None:
        super()._select(kept)
        for ahead in self.ahead.values():
            ahead.select(kept)
        if self.core is not None:
            self.core.sums = kept(self.core.sums)


class Modal(MemoryState, ChannelState):
    """One number a mode: the memory of a convolution is (B, S, D)."""

    mode = "modal"

    def filled(self, index: int, channels: slice, z_BDL: Tensor, pending_BDW: Tensor | None) -> None:
        self.memory[index : index + 1] = [self._frozen().recurrence.take(channels, z_BDL, None)]

    def chunk(self, index: int, channels: slice, z_BDn: Tensor) -> Tensor:
        before_BSD, recurrence = self.memory[index], self._frozen().recurrence
        self.memory[index] = recurrence.take(channels, z_BDn, before_BSD)
        return self._convolved(channels, z_BDn) + recurrence.ahead(channels, before_BSD, z_BDn.shape[-1])

    def step(self, index: int, channels: slice, z_B1D: Tensor) -> Tensor:
        return self._frozen().recurrence.step(channels, z_B1D, self.memory[index])


class Window(MemoryState, ChannelState):
    """The inputs that short filters still see: the memory of a convolution is (B, D, up to K - 1)."""

    mode = "window"

    def filled(self, index: int, channels: slice, z_BDL: Tensor, pending_BDW: Tensor | None) -> None:
        self.memory[index : index + 1] = [self._seen_later(z_BDL).clone()]

    def chunk(self, index: int, channels: slice, z_BDn: Tensor) -> Tensor:
        seen_BDL = torch.cat([self.memory[index], z_BDn], dim=-1)
        self.memory[index] = self._seen_later(seen_BDL).clone()
        return self._frozen().convolution(seen_BDL.shape[-1])(seen_BDL, channels)[..., -z_BDn.shape[-1] :]

    def step(self, index: int, channels: slice, z_B1D: Tensor) -> Tensor:
        seen_BDK = torch.cat([self.memory[index], z_B1D.transpose(1, 2)], dim=-1)
        self.memory[index] = self._seen_later(seen_BDK)
        return (seen_BDK * self._frozen().reversed(seen_BDK.shape[-1])[channels]).sum(-1)[:, None]

    def _seen_later(self, z_BDL: Tensor) -> Tensor:
        return z_BDL[..., max(0, z_BDL.shape[-1] - self._frozen().taps + 1) :]


CHANNEL_STATES: dict[str, type[ChannelState]] = {state.mode: state for state in (Tiled, Direct, Modal, Window)}
