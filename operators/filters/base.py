"""What all long filters share.

The grid of time is fixed by `max_length`, never by the sequence at hand: position t has the same filter value
in a short sequence as in a long one. Filters are float32, float64 where the parameters are; nothing but
parameters is saved, so the modules survive meta devices and casts.

Parameters of filters stay in float32 where a model is cast to half precision: 8 bits do not tell the 300th position
from the 301st, and what a sine network makes of that is another filter. They are few.

Shapes: C filters, L positions, T lags of a profile.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from operators.decoding.frozen import Filters
from operators.filters.modes import Modes

HALF = (torch.bfloat16, torch.float16)


def log_spaced_timescales(count: int, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decay times in tokens, (count,), geometric from half a token to `longest`; one alone in the middle."""
    shortest, largest = math.log(0.5), math.log(max(longest, 1))
    if count == 1:
        return torch.full((1,), math.exp((shortest + largest) / 2), dtype=dtype, device=device)
    return torch.linspace(shortest, largest, count, dtype=dtype, device=device).exp()


def whole_profile(profile_CT: Tensor, max_length: int) -> Tensor:
    """Logarithms (C, max_length) of weights by lag that sum to 1, float64, from those of the first T lags.

    Beyond its T lags a profile goes on as 1 / lag.
    """
    lags = min(profile_CT.shape[1], max_length)
    position = torch.arange(max_length, dtype=torch.float64, device=profile_CT.device)
    beyond_L = -(position.clamp_min(lags) / lags).log()
    wanted_CL = profile_CT[:, :lags].double()
    end = max(1, lags // 8)
    tail_C1 = wanted_CL[:, -end:].mean(1, keepdim=True)  # single lags far away were seen a few times only
    wanted_CL = torch.cat([wanted_CL, tail_C1 + beyond_L[lags:]], dim=1)
    return wanted_CL - wanted_CL.logsumexp(1, keepdim=True)


class Wide(nn.Module):
    """A module whose parameters stay in single precision where a model is cast to half."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves of `nn.Module`, which ask for half precision in vain, see the module's head."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in HALF and tensor.dtype not in HALF
            return tensor.to(moved.device) if half else moved

        return cast(Self, super()._apply(wide, recurse))  # type: ignore[no-untyped-call]


class LongFilter(Wide, ABC):
    """C filters over the lags 0 to `max_length` - 1; call `initialise` before use.

    Args:
        filters: number of filters C.
        max_length: longest sequence.

    Attributes:
        step_modes: ways in which channel-wise operators can decode with them (`channelwise`), the usual one first.
        lags: where they end, None if nowhere.
    """

    step_modes: tuple[str, ...] = ("tiled", "direct")

    def __init__(self, filters: int, max_length: int) -> None:
        super().__init__()
        self.filters, self.max_length = filters, max_length
        self.lags: int | None = None

    @abstractmethod
    def forward(self, length: int) -> Tensor:
        """Filters (C, length), float32 or float64, differentiable. ValueError if `length` exceeds `max_length`."""

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Set every parameter, deterministically given the generator's state."""

    @abstractmethod
    def follow(self, profile_CT: Tensor) -> None:
        """Let positive filters start at a profile, the logarithm of weights by lag; call `initialise` before.

        The filters sum to 1 over `max_length` but for the error of the fit.
        """

    def modes(self) -> Modes | None:
        """The exponentials that the filters are sums of, differentiable; None where they are none."""
        return None

    def freeze(self, direct_C: Tensor | None = None) -> Filters:
        """The filters as they are now, for whoever asks to keep; `direct_C` is added at lag 0. Lags are computed when
        they are needed first, so the parameters must not change before that."""
        return Filters(self, self.max_length, self.modes, direct_C, self.lags)

    def check(self, length: int) -> None:
        """Raise ValueError if `length` exceeds `max_length`."""
        if length > self.max_length:
            raise ValueError(
                f"length must not exceed max_length {self.max_length} but is {length}: "
                "build the operator with a larger max_length, or shorten the input."
            )


@torch.no_grad()
def draw_linear(layer: nn.Module, generator: torch.Generator) -> None:
    """Fill weight and bias of an `nn.Linear` uniformly within 1 / sqrt(fan in), as its constructor does.

    ValueError for anything else, such as an adapter around one.
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"a layer to initialise must be nn.Linear but is {type(layer).__name__}: initialise, then wrap."
        )
    bound = 1 / math.sqrt(layer.in_features)
    draw_uniform(layer.weight, bound, generator)
    if layer.bias is not None:
        draw_uniform(layer.bias, bound, generator)


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill `parameter` with values in [-bound, bound], drawn on the generator's device."""
    drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
    parameter.copy_((2 * drawn - 1) * bound)
