"""Implicit filters: a sine network of time under a decaying window, Poli et al. 2023, section 3.3.

Shapes: C filters, L positions, F positional features, W width of the network, T lags of a profile.
"""

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from operators.config import ImplicitFilterConfig
from operators.convolution.causal import compute_dtype
from operators.convolution.projection import plain
from operators.filters.base import LongFilter, draw_linear, log_spaced_timescales, whole_profile
from operators.gpu import accelerated
from operators.gpu.network import WIDEST, sine_network

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
        self.check(length)
        with torch.autocast(self.frequency.device.type, enabled=False):
            network_CL = self._read(self._recomputed_hidden(length))
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
        dtype = compute_dtype(self.frequency.dtype)
        hidden_LW, frequency = self.features[:length].to(dtype), self.frequency.to(dtype)
        small = dtype == torch.float32 and max(self.config.width, self.config.features) <= WIDEST
        if small and accelerated(hidden_LW) and all(plain(layer) for layer in self.layers):
            return sine_network(hidden_LW, frequency, [parameter.to(dtype) for parameter in self.layers.parameters()])
        for layer in self.layers:
            hidden_LW = torch.sin(frequency * self._mapped(layer, hidden_LW))
        return hidden_LW

    def _mapped(self, layer: nn.Module, x_LI: Tensor) -> Tensor:
        """`layer` in the precision that filters compute in; one that is not plain, called as it is, in its own."""
        if not plain(layer):
            return cast(Tensor, layer(x_LI.to(self.frequency.dtype))).to(x_LI.dtype)
        bias = None if layer.bias is None else layer.bias.to(x_LI.dtype)
        return nn.functional.linear(x_LI, layer.weight.to(x_LI.dtype), bias)

    def _read(self, hidden_LW: Tensor) -> Tensor:
        """What the last layer gives, (C, L)."""
        if not plain(self.readout):
            return self._mapped(self.readout, hidden_LW).t()
        return self.readout.weight.to(hidden_LW.dtype) @ hidden_LW.t()

    def window(self, length: int) -> Tensor:
        """The decaying window alone, (C, length).

        Time and rates of the linear window are float32 numbers at any precision, as in the reference code.
        """
        dtype, device = compute_dtype(self.frequency.dtype), self.frequency.device
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
