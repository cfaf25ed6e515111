"""Implicit long filters: a sine network of time under a decaying window (Poli et al. 2023, section 3.3).

The grid of time is fixed by `max_length`, never by the sequence at hand: position t has the same filter value
in a short sequence as in a long one. Filters are float32, float64 where the parameters are; nothing but
parameters is kept, so the module survives meta devices and casts.

Shapes: C filters, L positions, F positional features, W width of the network.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from operators.config import FilterConfig
from operators.convolution import compute_dtype

SMALL_OUTPUT = 0.05
FAST_DECAY, SLOW_DECAY, DECAY_TARGET = 0.3, 1.5, 1e-2


def positional_features(length: int, features: int) -> Tensor:
    """Time in [0, 1] and complex exponentials of it, (L, F) float64, as in safari's `PositionalEmbedding`."""
    bands = (features - 1) // 2
    position = torch.arange(length, dtype=torch.float64)[:, None]
    time = position / max(length - 1, 1)
    frequency = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    angle = 2 * math.pi * frequency * position / length
    return torch.cat([time, torch.cos(angle), -torch.sin(angle)], dim=-1)


def log_spaced_timescales(count: int, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decay times in tokens, (count,), geometric from half a token to `longest`; one alone in the middle."""
    shortest, largest = math.log(0.5), math.log(max(longest, 1))
    if count == 1:
        return torch.full((1,), math.exp((shortest + largest) / 2), dtype=dtype, device=device)
    return torch.linspace(shortest, largest, count, dtype=dtype, device=device).exp()


class ImplicitFilter(nn.Module):
    """Filters h(t) = window(t) * (offset + MLP(features(t))).

    Parameters: `features` (max_length, F), frozen unless `train_features`; `frequency` (1, W), shared by all
    sines, frozen unless `train_frequency`; `layers`, 1 + depth linear maps; `readout` (C, W).

    Args:
        config: see `FilterConfig`.
        filters: number of filters C.
        max_length: longest sequence, which fixes the grid of time.
        steps: convolutions that share the C filters; log-spaced windows span their range once per step.
    """

    def __init__(self, config: FilterConfig, filters: int, max_length: int, steps: int = 1) -> None:
        super().__init__()
        self.config, self.filters, self.max_length, self.steps = config, filters, max_length, steps
        self.features = nn.Parameter(torch.zeros(max_length, config.features), requires_grad=config.train_features)
        self.frequency = nn.Parameter(
            torch.full((1, config.width), float(config.sine_frequency)), requires_grad=config.train_frequency
        )
        widths = [config.features] + [config.width] * (config.depth + 1)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.readout = nn.Linear(config.width, filters, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights (uniform, 1 / sqrt(fan in)); with an offset the last layer is small."""
        self.features.copy_(positional_features(self.max_length, self.config.features))
        self.frequency.fill_(self.config.sine_frequency)
        for layer in self.layers:
            draw_linear(layer, generator)
        draw_linear(self.readout, generator)
        if self.config.offset != 0.0:
            self.readout.weight *= SMALL_OUTPUT

    def forward(self, length: int) -> Tensor:
        """Filters (C, length), float32 or float64. ValueError if `length` exceeds `max_length`."""
        if length > self.max_length:
            raise ValueError(
                f"length must not exceed max_length {self.max_length} but is {length}: "
                "build the operator with a larger max_length, or shorten the input."
            )
        dtype = compute_dtype(self.readout.weight.dtype)
        with torch.autocast(self.readout.weight.device.type, enabled=False):
            hidden_LW = self.features[:length].to(dtype)
            frequency = self.frequency.to(dtype)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                weight_WW, bias_W = layer.weight.to(dtype), layer.bias.to(dtype)
                hidden_LW = torch.sin(frequency * nn.functional.linear(hidden_LW, weight_WW, bias_W))
            network_CL = self.readout.weight.to(dtype) @ hidden_LW.t()
            return self.window(length) * (network_CL + self.config.offset)

    def window(self, length: int) -> Tensor:
        """The decaying window alone, (C, length).

        Time and rates of the linear window are float32 numbers at any precision, as in the reference code.
        """
        weight = self.readout.weight
        dtype, device = compute_dtype(weight.dtype), weight.device
        if self.config.window == "linear":
            decay = -math.log(DECAY_TARGET)
            slow, fast = decay / SLOW_DECAY, decay / FAST_DECAY
            rate = torch.linspace(slow, fast, self.filters, dtype=torch.float32, device=device).to(dtype)
            time = torch.linspace(0, 1, self.max_length, dtype=torch.float32, device=device).to(dtype)
            return torch.exp(-rate[:, None] * time[:length])
        tau = log_spaced_timescales(self.filters // self.steps, self.max_length, dtype, device)
        tau, position = tau.repeat(self.steps), torch.arange(length, dtype=dtype, device=device)
        return torch.exp(-position / tau[:, None]) * -torch.expm1(-1 / tau)[:, None]


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
