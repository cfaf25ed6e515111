"""No long filter, for operators that have none: nothing is far."""

import torch
from torch import Tensor

from operators.filters.base import LongFilter


class NoFilter(LongFilter):
    """Filters over the lags 0 to `max_length` - 1, of which there are none; no parameters."""

    def __init__(self, max_length: int) -> None:
        super().__init__(0, max_length)

    def initialise(self, generator: torch.Generator) -> None:
        """Nothing to initialise."""

    def follow(self, profile_CT: Tensor) -> None:
        """Nothing follows."""

    def forward(self, length: int) -> Tensor:
        """(0, length)."""
        self.check(length)
        return torch.empty(0, length)
