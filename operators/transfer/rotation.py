"""How an attention turns queries and keys by position.

Shapes: K width of a head's query and key, P pairs of channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of pairs of a head's channels by position times a frequency (Su et al. 2021).

    Attributes:
        frequencies: (P,) radians a position; negative where it turns the other way.
        first, second: (P,) the channels of each pair.
        factor: what the channels that are turned are multiplied by.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor
    factor: float = 1.0

    def in_order(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frequencies (K // 2,), the channels so that i and K // 2 + i are a pair, and each one's factor, (K,).

        Channels that stay make pairs of frequency 0.
        """
        pairs, chosen = width // 2, {*self.first.tolist(), *self.second.tolist()}
        rest = torch.tensor([i for i in range(width) if i not in chosen], dtype=torch.long)
        more = pairs - len(self.frequencies)
        channels = torch.cat([self.first, rest[:more], self.second, rest[more:]])
        factors = torch.ones(width, dtype=torch.float64)
        factors[[*chosen]] = self.factor
        frequencies = torch.cat([self.frequencies.double(), torch.zeros(more, dtype=torch.float64)])
        return frequencies, channels, factors[channels]


NO_ROTATION = Rotation(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
