"""Filters that are sums of decaying exponentials, the form in which a convolution is a recurrence.

    h(t) = Re sum_s residue_s exp(log_pole_s t),  Re log_pole_s < 0

A convolution with such a filter keeps one number a mode of all it has seen: x_t = exp(log_pole) x_{t-1} + z_t,
y_t = Re sum_s residue_s x_t. Real modes decay; complex ones oscillate too, and count as two real numbers.

Shapes: C filters, S modes, L lags.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Modes(NamedTuple):
    """Logarithms of poles and residues, both (C, S), both real or both complex."""

    log_poles_CS: Tensor
    residues_CS: Tensor

    def at(self, lags_L: Tensor) -> Tensor:
        """The filters at some lags, (C, L), real; differentiable."""
        terms_CSL = self.residues_CS[..., None] * torch.exp(self.log_poles_CS[..., None] * lags_L)
        summed_CL = terms_CSL.sum(1)
        return summed_CL.real if summed_CL.is_complex() else summed_CL
