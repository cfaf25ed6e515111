"""Modal filters: sums of decaying exponentials, h(t) = Re sum_s residue_s exp(log_pole_s t) (see `modes`).

Whatever is trained, a filter decays, and the size of what is trained does not depend on how long a mode lasts: a pole
is exp(-rate (1 - i oscillation)) with a positive rate, so that an oscillation of 1 turns by one radian in the time in
which the mode decays by e; a residue is (1 - pole) mass, so that a mode's values sum to its mass.

Shapes: C filters, S modes, L positions, T lags of a profile.
"""

import torch
from torch import Tensor, nn

from operators.config import ModalFilterConfig
from operators.convolution.causal import compute_dtype
from operators.decoding.recurrence import first_lags
from operators.filters.base import LongFilter, draw_uniform, log_spaced_timescales, whole_profile
from operators.filters.modes import Modes

OSCILLATION = 1.0  # largest at the start
FIT_STEPS = 500
LEAST_MASS = 1e-6  # of a mode after the fit, so that training can still raise it


class ModalFilter(LongFilter):
    """Filters that are sums of `config.modes` exponentials, complex or, where positive, real with positive residues.

    Parameters, all (C, S) and none of a size that depends on `max_length`: `log_rate`; and `oscillation`, `mass` and
    `imaginary_mass`, or `log_mass` where positive. So the parameters of an operator fit another one that is built for
    longer sequences, where the same filters go on; asked for more than `max_length`, this one raises.

    Args:
        config: see `ModalFilterConfig`.
        filters: number of filters C.
        max_length: longest sequence, which sets the slowest decay at the start.
        steps: convolutions that share the C filters.
    """

    step_modes = ("modal", "tiled", "direct")
    log_rate: nn.Parameter
    oscillation: nn.Parameter
    mass: nn.Parameter
    imaginary_mass: nn.Parameter
    log_mass: nn.Parameter

    def __init__(self, config: ModalFilterConfig, filters: int, max_length: int, steps: int = 1) -> None:
        super().__init__(filters, max_length)
        self.config, self.steps = config, steps
        names = ["log_mass"] if config.positive else ["oscillation", "mass", "imaginary_mass"]
        for name in ("log_rate", *names):
            self.register_parameter(name, nn.Parameter(torch.zeros(filters, config.modes)))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Every filter sums to 1, most of it in the modes whose decay times are near the filter's own, which are
        log-spaced over the filters as those of implicit ones; oscillations are drawn."""
        device = self.log_rate.device
        times_S = log_spaced_timescales(self.config.modes, self.max_length, torch.float64, device).log()
        own = log_spaced_timescales(self.filters // self.steps, self.max_length, torch.float64, device).log()
        own_C = own.repeat(self.steps)
        width = max(1.0, (times_S[-1] - times_S[0]).item() / max(1, self.config.modes - 1))
        share_CS = (-0.5 * ((own_C[:, None] - times_S) / width).square()).softmax(1)
        self.log_rate.copy_(-times_S)
        if self.config.positive:
            self.log_mass.copy_(share_CS.log())
            return
        draw_uniform(self.oscillation, OSCILLATION, generator)
        self.mass.copy_(share_CS)
        self.imaginary_mass.zero_()

    @torch.no_grad()
    def follow(self, profile_CT: Tensor) -> None:
        """See `LongFilter.follow`: at the decay times of the start, the mixture of exponentials that is nearest to the
        weights in Kullback-Leibler divergence, by expectation maximisation. It falls with the lag, so a weight that
        is largest at a later lag is spread over those before."""
        assert self.config.positive
        wanted_CL = whole_profile(profile_CT, self.max_length).exp()
        modes = self.modes()
        lags_L = torch.arange(self.max_length, dtype=torch.float64, device=wanted_CL.device)
        decay_SL = torch.exp(modes.log_poles_CS[0].double()[:, None] * lags_L)
        sums_S = decay_SL.sum(1)
        decay_SL /= sums_S[:, None]
        share_CS = wanted_CL.new_full((self.filters, self.config.modes), 1 / self.config.modes)
        for _ in range(FIT_STEPS):
            share_CS *= (wanted_CL / (share_CS @ decay_SL)) @ decay_SL.t()
        mass_CS = share_CS / (sums_S * -torch.expm1(modes.log_poles_CS[0].double()))
        self.log_mass.copy_(mass_CS.clamp_min(LEAST_MASS).log())

    def forward(self, length: int) -> Tensor:
        self.check(length)
        with torch.autocast(self.log_rate.device.type, enabled=False):
            return first_lags(self.modes(), length)

    def modes(self) -> Modes:
        """Poles and residues (C, S), complex unless positive; float32 or float64 numbers; differentiable."""
        dtype = compute_dtype(self.log_rate.dtype)
        rate_CS = self.log_rate.to(dtype).exp()
        if self.config.positive:
            return Modes(-rate_CS, self.log_mass.to(dtype).exp() * -torch.expm1(-rate_CS))
        log_poles_CS = torch.complex(-rate_CS, rate_CS * self.oscillation.to(dtype))
        mass_CS = torch.complex(self.mass.to(dtype), self.imaginary_mass.to(dtype))
        return Modes(log_poles_CS, mass_CS * -torch.expm1(log_poles_CS))
