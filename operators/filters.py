"""What all long filters share, and the implicit ones: a sine network of time under a decaying window.

The grid of time is fixed by `max_length`, never by the sequence at hand: position t has the same filter value
in a short sequence as in a long one. Filters are float32, float64 where the parameters are; nothing but
parameters is saved, so the modules survive meta devices and casts.

Shapes: C filters, L positions, F positional features, W width of the network.
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from operators.config import ImplicitFilterConfig
from operators.convolution import compute_dtype
from operators.decode import Filters
from operators.gpu import accelerated
from operators.gpu.network import WIDEST, sine_network
from operators.modes import Modes

SMALL_OUTPUT = 0.05
RIDGE = 1e-3
RECOMPUTED_FROM = 1024  # positions
FAST_DECAY, SLOW_DECAY, DECAY_TARGET = 0.3, 1.5, 1e-2


def positional_features(length: int, features: int, *, logarithmic: bool = False) -> Tensor:
    """Time in [0, 1] and complex exponentials of it, (L, F) float64, as in safari's `PositionalEmbedding`.

    A logarithmic time tells the first lags apart: position t stands where log(1 + t) lies between 0 and log(L).
    """
    bands = (features - 1) // 2
    position = torch.arange(length, dtype=torch.float64)[:, None]
    if logarithmic:
        position = position.log1p() * ((length - 1) / math.log(max(length, 2)))
    fraction = position / max(length - 1, 1)
    frequency = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    angle = 2 * math.pi * frequency * position / length
    return torch.cat([fraction, torch.cos(angle), -torch.sin(angle)], dim=-1)


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


class LongFilter(nn.Module, ABC):
    """C filters over the lags 0 to `max_length` - 1; call `initialise` before use.

    Args:
        filters: number of filters C.
        max_length: longest sequence.

    Attributes:
        step_modes: ways in which channel-wise operators can decode with them (`steps`), the usual one first.
        lags: where they end, None if nowhere.
    """

    step_modes: tuple[str, ...] = ("tiled", "direct")

    def __init__(self, filters: int, max_length: int) -> None:
        super().__init__()
        self.filters, self.max_length = filters, max_length
        self.lags: int | None = None
        self._frozen: tuple[Any, Filters] | None = None

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

    @torch.inference_mode(False)
    @torch.no_grad()
    def frozen(self, direct_C: Tensor | None = None) -> Filters:
        """The filters as they are, computed once until a parameter changes in place, moves or is replaced.

        `direct_C` is added at lag 0.
        """
        watched = [*self.parameters(), *([] if direct_C is None else [direct_C])]
        stamp = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in watched)
        if self._frozen is None or self._frozen[0] != stamp:
            h_CL = self(self.max_length)
            if direct_C is not None:
                h_CL[:, 0] += direct_C
            self._frozen = (stamp, Filters(h_CL, self.modes(), direct_C, self.lags))
        return self._frozen[1]

    def check(self, length: int) -> None:
        """Raise ValueError if `length` exceeds `max_length`."""
        if length > self.max_length:
            raise ValueError(
                f"length must not exceed max_length {self.max_length} but is {length}: "
                "build the operator with a larger max_length, or shorten the input."
            )


class ImplicitFilter(LongFilter):
    """Filters h(t) = window(t) * (offset + MLP(features(t))), Poli et al. 2023, section 3.3.

    Parameters: `features` (max_length, F), frozen unless `train_features`; `frequency` (1, W), shared by all
    sines, frozen unless `train_frequency`; `layers`, 1 + depth linear maps; `readout` (C, W). Positive filters train
    `readout` and their `log_timescale` (C,) only.

    Args:
        config: see `ImplicitFilterConfig`.
        filters: number of filters C.
        max_length: longest sequence, which fixes the grid of time.
        steps: convolutions that share the C filters; log-spaced windows span their range once per step.
    """

    step_modes = ("tiled", "direct", "modal")

    def __init__(self, config: ImplicitFilterConfig, filters: int, max_length: int, steps: int = 1) -> None:
        super().__init__(filters, max_length)
        self.config, self.steps = config, steps
        self.features = nn.Parameter(torch.zeros(max_length, config.features), requires_grad=config.train_features)
        self.frequency = nn.Parameter(
            torch.full((1, config.width), float(config.sine_frequency)), requires_grad=config.train_frequency
        )
        widths = [config.features] + [config.width] * (config.depth + 1)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.log_timescale: nn.Parameter | None = None
        if config.positive:
            self.requires_grad_(False)
            self.log_timescale = nn.Parameter(torch.zeros(filters))
        self.readout = nn.Linear(config.width, filters, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights (uniform, 1 / sqrt(fan in)); where the filter starts at its window the last is small."""
        self.features.copy_(
            positional_features(self.max_length, self.config.features, logarithmic=self.config.positive)
        )
        self.frequency.fill_(self.config.sine_frequency)
        for layer in self.layers:
            draw_linear(layer, generator)
        draw_linear(self.readout, generator)
        if self.config.offset != 0.0 or self.config.positive:
            self.readout.weight *= SMALL_OUTPUT
        if self.log_timescale is not None:
            self.log_timescale.copy_(self._spread(self.log_timescale.dtype, self.log_timescale.device).log())

    @torch.no_grad()
    def follow(self, profile_CT: Tensor) -> None:
        """See `LongFilter.follow`: least squares of the last layer on the logarithm, every octave of lags alike."""
        assert self.log_timescale is not None
        wanted_CL = whole_profile(profile_CT, self.max_length)
        position = torch.arange(self.max_length, dtype=torch.float64, device=profile_CT.device)
        self.log_timescale.fill_(math.log(self.max_length))
        residual_CL = wanted_CL - self.window(self.max_length).double().log()
        weight_L1 = (1.0 + position[:, None]).rsqrt()
        hidden_LW = self._hidden(self.max_length).double() * weight_L1
        gram_WW = hidden_LW.t() @ hidden_LW
        ridge = RIDGE * gram_WW.diagonal().mean() * torch.eye(len(gram_WW), dtype=gram_WW.dtype, device=gram_WW.device)
        fit_WC = torch.linalg.solve(gram_WW + ridge, hidden_LW.t() @ (residual_CL.t() * weight_L1))
        self.readout.weight.copy_(fit_WC.t())

    def forward(self, length: int) -> Tensor:
        """See `LongFilter.forward`."""
        self.check(length)
        weight_CW = self.readout.weight.to(compute_dtype(self.readout.weight.dtype))
        with torch.autocast(weight_CW.device.type, enabled=False):
            network_CL = weight_CW @ self._recomputed_hidden(length).t()
            factor_CL = network_CL.exp() if self.config.positive else network_CL + self.config.offset
            return self.window(length) * factor_CL

    def _recomputed_hidden(self, length: int) -> Tensor:
        """`_hidden`, computed again for backward where it is long and trained: kept it outweighs a head's keys.

        On CPUs: accelerators have batches to keep, of which it is a small part, and each operation costs its launch.
        """
        network = (self.features, self.frequency, *self.layers.parameters())
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network)
        if not trained or length < RECOMPUTED_FROM or self.features.device.type != "cpu":
            return self._hidden(length)
        return cast(Tensor, checkpoint(self._hidden, length, use_reentrant=False, preserve_rng_state=False))

    def _hidden(self, length: int) -> Tensor:
        """What the last layer reads, (L, W)."""
        dtype = compute_dtype(self.readout.weight.dtype)
        hidden_LW, frequency = self.features[:length].to(dtype), self.frequency.to(dtype)
        widest = max(self.config.width, self.config.features)
        if accelerated(hidden_LW) and dtype == torch.float32 and widest <= WIDEST:
            return sine_network(hidden_LW, frequency, [parameter.to(dtype) for parameter in self.layers.parameters()])
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            weight_WW, bias_W = layer.weight.to(dtype), layer.bias.to(dtype)
            hidden_LW = torch.sin(frequency * nn.functional.linear(hidden_LW, weight_WW, bias_W))
        return hidden_LW

    def window(self, length: int) -> Tensor:
        """The decaying window alone, (C, length).

        Time and rates of the linear window are float32 numbers at any precision, as in the reference code.
        """
        weight = self.readout.weight
        dtype, device = compute_dtype(weight.dtype), weight.device
        if self.config.window == "linear" and self.log_timescale is None:
            decay = -math.log(DECAY_TARGET)
            slow, fast = decay / SLOW_DECAY, decay / FAST_DECAY
            rate = torch.linspace(slow, fast, self.filters, dtype=torch.float32, device=device).to(dtype)
            time = torch.linspace(0, 1, self.max_length, dtype=torch.float32, device=device).to(dtype)
            return torch.exp(-rate[:, None] * time[:length])
        tau = self._spread(dtype, device) if self.log_timescale is None else self.log_timescale.to(dtype).exp()
        position = torch.arange(length, dtype=dtype, device=device)
        return torch.exp(-position / tau[:, None]) * -torch.expm1(-1 / tau)[:, None]

    def _spread(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The log-spaced timescales (C,) in tokens."""
        each = log_spaced_timescales(self.filters // self.steps, self.max_length, dtype, device)
        return each.repeat(self.steps)


@torch.no_grad()
def draw_linear(layer: nn.Module, generator: torch.Generator) -> None:
    """Fill weight and bias of an `nn.Linear` uniformly within 1 / sqrt(fan in), as its constructor does."""
    assert isinstance(layer, nn.Linear)
    bound = 1 / math.sqrt(layer.in_features)
    draw_uniform(layer.weight, bound, generator)
    if layer.bias is not None:
        draw_uniform(layer.bias, bound, generator)


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill `parameter` with values in [-bound, bound], drawn on the generator's device."""
    drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
    parameter.copy_((2 * drawn - 1) * bound)
