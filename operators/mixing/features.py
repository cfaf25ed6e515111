"""What heads read from the rows of their projections: queries and keys after the feature map, and weighed values.

    q, k <- softmax of [M q, -M q] and of [M k, -M k]     where they are mapped (`hedgehog`, M trained)
    v    <- exp(gate) v                                   where a gate weighs every position
    v    <- [v, exp(gate) or 1]                           where outputs are divided by the sum of the weights

Powers of products are no features here: what mixes raises them.

Shapes: B batch, E rows, H heads (all of them or some), K width of query and key, V of values, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.convolution.causal import compute_dtype

LARGEST_GATE = 10.0  # of the exponent
SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class Layout:
    """How the rows of the projections lie: queries of all heads, then keys, values and, if `gated`, a gate a head.

    Attributes:
        heads: H.
        key_width, value_width: K and V.
        gated, normalised, mapped: what is done with them, see the module's head.
        degree: of the power that products are raised to, None for none.
    """

    heads: int
    key_width: int
    value_width: int
    gated: bool = False
    normalised: bool = False
    mapped: bool = False
    degree: int | None = None

    @property
    def rows(self) -> list[int]:
        """Rows of a head in each part."""
        return [self.key_width, self.key_width, self.value_width, *([1] if self.gated else [])]

    @property
    def mixed(self) -> tuple[int, int]:
        """Widths of keys and of values as they are mixed."""
        return self.key_width * (2 if self.mapped else 1), self.value_width + self.normalised

    @property
    def plain(self) -> bool:
        """Whether what is mixed are the rows as they are."""
        return not (self.gated or self.normalised or self.mapped)

    def rows_of(self, heads: slice) -> list[slice]:
        """Where the parts of some heads are among all rows."""
        first, found = 0, []
        for rows in self.rows:
            found.append(slice(first + heads.start * rows, first + heads.stop * rows))
            first += self.heads * rows
        return found

    def parts(self, u_BEL: Tensor) -> list[Tensor]:
        """Queries, keys, values and gates, (B, H, rows of a head, L) each."""
        batch, _, length = u_BEL.shape
        parts = u_BEL.split_with_sizes([self.heads * rows for rows in self.rows], 1)
        return [part.view(batch, self.heads, -1, length) for part in parts]


def features(
    parts: Sequence[Tensor], map_HKK: Tensor | None, mask_BL: Tensor | None, normalised: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are mixed, in their own precision; a padded position counts nothing."""
    q_BHKL, k_BHKL, v_BHVL, *gates = parts
    if map_HKK is not None:
        q_BHKL, k_BHKL = _hedgehog(q_BHKL, map_HKK), _hedgehog(k_BHKL, map_HKK)
    if not (gates or normalised):
        return q_BHKL, k_BHKL, v_BHVL
    dtype, weighed = compute_dtype(v_BHVL.dtype), v_BHVL
    if gates:
        counted_BH1L = gates[0].to(dtype).clamp(max=LARGEST_GATE).exp()
    else:
        counted_BH1L = v_BHVL.new_ones((*v_BHVL.shape[:2], 1, v_BHVL.shape[3]), dtype=dtype)
    if mask_BL is not None:
        counted_BH1L = counted_BH1L * mask_BL[:, None, None].to(dtype)
    if gates:
        weighed = v_BHVL * counted_BH1L
    if normalised:
        weighed = torch.cat([weighed, counted_BH1L], dim=2)
    return q_BHKL, k_BHKL, weighed.to(v_BHVL.dtype)


def divided(y_BHVL: Tensor) -> Tensor:
    """Mixed values by the sum of their weights, which is the last row."""
    values = y_BHVL.shape[2] - 1
    return y_BHVL.narrow(2, 0, values) / (y_BHVL.narrow(2, values, 1) + SMALLEST_SUM)


def _hedgehog(x_BHKL: Tensor, map_HKK: Tensor) -> Tensor:
    mapped = map_HKK.to(x_BHKL.dtype) @ x_BHKL
    return torch.cat([mapped, -mapped], dim=2).softmax(2)
