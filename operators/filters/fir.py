"""Short filters: a trained weight for each of the first lags, zero beyond.

Shapes: B batch, C filters, D channels, K taps, L positions, T lags of a profile.
"""

import torch
from torch import Tensor, nn

from operators.config import FirFilterConfig
from operators.convolution.causal import compute_dtype
from operators.decoding.frozen import FEW_TAPS
from operators.filters.base import LongFilter, log_spaced_timescales, whole_profile


class FirFilter(LongFilter):
    """Filters of K taps.

    Parameters: `taps` (C, K), by lag; logarithms of the weights where they are positive. Their size does not depend
    on `max_length`, so they fit an operator that is built for longer sequences; asked for more, this one raises.

    Args:
        config: see `FirFilterConfig`.
        filters: number of filters C.
        max_length: longest sequence.
        steps: convolutions that share the C filters.

    Raises:
        ValueError: more taps than `max_length`.
    """

    def __init__(self, config: FirFilterConfig, filters: int, max_length: int, steps: int = 1) -> None:
        super().__init__(filters, max_length)
        if config.taps > max_length:
            raise ValueError(
                f"taps must not exceed max_length {max_length} but is {config.taps}: lower it, or build the operator "
                "with a larger max_length."
            )
        self.config, self.steps = config, steps
        self.taps, self.lags = nn.Parameter(torch.zeros(filters, config.taps)), config.taps
        if config.taps <= FEW_TAPS:
            self.step_modes = ("window", *self.step_modes)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Decaying exponentials that sum to 1, with decay times log-spaced over the filters from half a token to K."""
        each, taps, device = self.filters // self.steps, self.config.taps, self.taps.device
        tau_C = log_spaced_timescales(each, taps, torch.float64, device).repeat(self.steps)
        self._set_logarithms(-torch.arange(taps, dtype=torch.float64, device=device) / tau_C[:, None])

    @torch.no_grad()
    def follow(self, profile_CT: Tensor) -> None:
        """See `LongFilter.follow`: the profile itself, cut at K lags."""
        assert self.config.positive
        self._set_logarithms(whole_profile(profile_CT, self.config.taps))

    def forward(self, length: int) -> Tensor:
        self.check(length)
        taps_CK = self.taps.to(compute_dtype(self.taps.dtype))[:, :length]
        weight_CK = taps_CK.exp() if self.config.positive else taps_CK
        return nn.functional.pad(weight_CK, (0, length - weight_CK.shape[1]))

    def _set_logarithms(self, weight_CK: Tensor) -> None:
        log_CK = weight_CK - weight_CK.logsumexp(1, keepdim=True)
        self.taps.copy_(log_CK if self.config.positive else log_CK.exp())
