"""How a channel-wise convolution goes on from its state: what it remembers of its inputs, and the outputs to come.

    tiled    all inputs; what they do to later outputs is added up ahead (`ahead`); exact
    direct   all inputs; every step sums over them; exact, the reference
    modal    one number a mode (`recurrence`); exact for modal filters, as near as `fit` comes for implicit ones
    window   the inputs that short filters still see; exact for them

The first two have a history in the state, the others a memory of a constant size. A new mode is a class and a line in
`STEP_MODES`; which of them a filter has is its `step_modes`.

Shapes: B batch, D channels of one convolution, S modes, K taps, L or n new positions.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from operators.convolution.causal import long_conv
from operators.decoding.ahead import Ahead, window
from operators.decoding.frozen import Filters
from operators.decoding.state import State


class StepMode(ABC):
    """What the convolution `name` of `channels` does with the state. Gradients flow to the inputs of a call only.

    A prefill writes its gated inputs into `room` and calls `filled`.
    """

    def beyond(self, length: int, longest: int) -> int:
        """How many outputs after a prefill of `length` positions `filled` wants to know its part of."""
        return 0

    @abstractmethod
    def room(self, state: State, name: str, like: Tensor) -> Tensor:
        """Where the gated inputs of a prefill are to be written, (B, D, L) as `like`."""

    @abstractmethod
    def filled(
        self, filters: Filters, state: State, name: str, channels: slice, z_BDL: Tensor, known_BDW: Tensor | None
    ) -> None:
        """Remember the inputs of a prefill, which are what is in `room` now; `known` is what they add to the outputs
        that `beyond` asks for, None where nobody computed it."""

    @abstractmethod
    def chunk(self, filters: Filters, state: State, name: str, channels: slice, z_BDn: Tensor) -> Tensor:
        """The outputs (B, D, n) at n new positions after the state's, which it remembers too."""

    @abstractmethod
    def step(self, filters: Filters, state: State, name: str, channels: slice, z_B1D: Tensor) -> Tensor:
        """`chunk` of one position, (B, 1, D)."""


class Direct(StepMode):
    """See the module's head."""

    def room(self, state: State, name: str, like: Tensor) -> Tensor:
        """See `StepMode.room`."""
        return state.room(name, like)

    def filled(
        self, filters: Filters, state: State, name: str, channels: slice, z_BDL: Tensor, known_BDW: Tensor | None
    ) -> None:
        """The room is part of the history."""

    def chunk(self, filters: Filters, state: State, name: str, channels: slice, z_BDn: Tensor) -> Tensor:
        """See `StepMode.chunk`."""
        past_BDT = state.append(name, z_BDn)
        return _convolved(filters, channels, past_BDT)[..., -z_BDn.shape[-1] :]

    def step(self, filters: Filters, state: State, name: str, channels: slice, z_B1D: Tensor) -> Tensor:
        """See `StepMode.step`."""
        past_BDT = state.append(name, z_B1D.transpose(1, 2))
        return (past_BDT * filters.reversed(past_BDT.shape[-1])[channels]).sum(-1)[:, None]


class Tiled(Direct):
    """See the module's head."""

    def beyond(self, length: int, longest: int) -> int:
        """See `StepMode.beyond`: what comes out of a transform that is a little longer than the prefill's."""
        return window(length, longest)

    def filled(
        self, filters: Filters, state: State, name: str, channels: slice, z_BDL: Tensor, known_BDW: Tensor | None
    ) -> None:
        """See `StepMode.filled`."""
        if known_BDW is not None:
            state.ahead[name] = Ahead(filters, channels, z_BDL, known_BDW)

    def step(self, filters: Filters, state: State, name: str, channels: slice, z_B1D: Tensor) -> Tensor:
        """See `StepMode.step`."""
        past_BDT, ahead = state.write(name, z_B1D.transpose(1, 2)), state.ahead.get(name)
        if ahead is None or ahead.position != state.length:
            ahead = state.ahead[name] = Ahead(filters, channels, past_BDT[..., : state.length])
        return ahead.step(z_B1D, past_BDT)


class Modal(StepMode):
    """See the module's head. The memory is (B, S, D)."""

    def room(self, state: State, name: str, like: Tensor) -> Tensor:
        """See `StepMode.room`."""
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def filled(
        self, filters: Filters, state: State, name: str, channels: slice, z_BDL: Tensor, known_BDW: Tensor | None
    ) -> None:
        """See `StepMode.filled`."""
        state.memory[name] = filters.recurrence.take(channels, z_BDL, None)

    def chunk(self, filters: Filters, state: State, name: str, channels: slice, z_BDn: Tensor) -> Tensor:
        """See `StepMode.chunk`."""
        before_BSD = state.memory[name]
        state.memory[name] = filters.recurrence.take(channels, z_BDn.detach(), before_BSD)
        ahead_BDn = filters.recurrence.ahead(channels, before_BSD, z_BDn.shape[-1])
        return _convolved(filters, channels, z_BDn) + ahead_BDn

    def step(self, filters: Filters, state: State, name: str, channels: slice, z_B1D: Tensor) -> Tensor:
        """See `StepMode.step`."""
        return filters.recurrence.step(channels, z_B1D, state.memory[name])


class Window(StepMode):
    """See the module's head. The memory is (B, D, up to K - 1)."""

    def room(self, state: State, name: str, like: Tensor) -> Tensor:
        """See `StepMode.room`."""
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def filled(
        self, filters: Filters, state: State, name: str, channels: slice, z_BDL: Tensor, known_BDW: Tensor | None
    ) -> None:
        """See `StepMode.filled`."""
        state.memory[name] = z_BDL[..., max(0, z_BDL.shape[-1] - filters.taps + 1) :].clone()

    def chunk(self, filters: Filters, state: State, name: str, channels: slice, z_BDn: Tensor) -> Tensor:
        """See `StepMode.chunk`."""
        seen_BDL = torch.cat([state.memory[name], z_BDn], dim=-1)
        self.filled(filters, state, name, channels, seen_BDL.detach(), None)
        return filters.convolution(seen_BDL.shape[-1])(seen_BDL, channels)[..., -z_BDn.shape[-1] :]

    def step(self, filters: Filters, state: State, name: str, channels: slice, z_B1D: Tensor) -> Tensor:
        """See `StepMode.step`."""
        seen_BDK = torch.cat([state.memory[name], z_B1D.transpose(1, 2)], dim=-1)
        state.memory[name] = seen_BDK[..., max(0, seen_BDK.shape[-1] - filters.taps + 1) :].detach()
        return (seen_BDK * filters.reversed(seen_BDK.shape[-1])[channels]).sum(-1)[:, None]


STEP_MODES: dict[str, StepMode] = {"tiled": Tiled(), "direct": Direct(), "modal": Modal(), "window": Window()}


def _convolved(filters: Filters, channels: slice, z_BDL: Tensor) -> Tensor:
    h_DL = filters.h_CL[channels, : z_BDL.shape[-1]]
    return long_conv(z_BDL, h_DL, torch.zeros_like(h_DL[:, 0]))
