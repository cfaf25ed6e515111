"""What heads read from the rows of their projections: queries and keys after the feature map, and weighed values.

    q, k <- softmax of [M q, -M q] and of [M k, -M k]     where they are mapped (`hedgehog`, M trained)
    q, k <- 1, x_i, and c_ij x_i x_j for i <= j           where they are squared: f(q) . f(k) = (1 + q . k / 2)^2
    v    <- exp(gate) v                                   where a gate weighs every position
    v    <- [v, exp(gate) or 1]                           where outputs are divided by the sum of the weights

Other powers of products are no features here: what mixes raises them.

Shapes: B batch, E rows, H heads (all of them or some), K width of query and key, V of values, L positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        gated, normalised, mapped, squared: what is done with them, see the module's head.
        degree: of the power that products are raised to, None for none.
    """

    heads: int
    key_width: int
    value_width: int
    gated: bool = False
    normalised: bool = False
    mapped: bool = False
    squared: bool = False
    degree: int | None = None

    @property
    def rows(self) -> list[int]:
        """Rows of a head in each part."""
        return [self.key_width, self.key_width, self.value_width, *([1] if self.gated else [])]

    @property
    def mixed(self) -> tuple[int, int]:
        """Widths of keys and of values as they are mixed."""
        if self.squared:
            return squares_of(self.key_width), self.value_width + self.normalised
        return self.key_width * (2 if self.mapped else 1), self.value_width + self.normalised

    @property
    def plain(self) -> bool:
        """Whether what is mixed are the rows as they are."""
        return not (self.gated or self.normalised or self.mapped or self.squared)

    def unsquared(self) -> "Layout":
        """The same without features of squares, whose products are to be raised."""
        return replace(self, squared=False)

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
    parts: Sequence[Tensor], layout: Layout, map_HKK: Tensor | None, mask_BL: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they are mixed, in their own precision; a padded position counts nothing."""
    q_BHKL, k_BHKL, v_BHVL, *gates = parts
    if layout.squared:
        q_BHKL, k_BHKL = squares(q_BHKL), squares(k_BHKL)
    if map_HKK is not None:
        q_BHKL, k_BHKL = _hedgehog(q_BHKL, map_HKK), _hedgehog(k_BHKL, map_HKK)
    if not (gates or layout.normalised):
        return q_BHKL, k_BHKL, v_BHVL
    dtype, weighed = compute_dtype(v_BHVL.dtype), v_BHVL
    ones = (*v_BHVL.shape[:2], 1, v_BHVL.shape[3])
    counted_BH1L = counted(gates[0]) if gates else v_BHVL.new_ones(ones, dtype=dtype)
    if mask_BL is not None:
        counted_BH1L = counted_BH1L * mask_BL[:, None, None].to(dtype)
    if gates:
        weighed = v_BHVL * counted_BH1L
    if layout.normalised:
        weighed = torch.cat([weighed, counted_BH1L], dim=2)
    return q_BHKL, k_BHKL, weighed.to(v_BHVL.dtype)


def counted(gate_BH1L: Tensor) -> Tensor:
    """What positions count by their gates."""
    return gate_BH1L.to(compute_dtype(gate_BH1L.dtype)).clamp(max=LARGEST_GATE).exp()


def divided(y_BHVL: Tensor) -> Tensor:
    """Mixed values by the sum of their weights, which is the last row."""
    values = y_BHVL.shape[2] - 1
    return y_BHVL.narrow(2, 0, values) / (y_BHVL.narrow(2, values, 1) + SMALLEST_SUM)


def squares_of(width: int) -> int:
    """Features of as many channels."""
    return 1 + width + width * (width + 1) // 2


def squares(x_BHKL: Tensor) -> Tensor:
    """Features whose products are (1 + q . k / 2)^2, (B, H, 1 + K + K (K + 1) / 2, L)."""
    width = x_BHKL.shape[2]
    scaled_BHKL, ones_BH1L = x_BHKL * 0.5**0.5, torch.ones_like(x_BHKL[:, :, :1])
    off = [x_BHKL[:, :, i : i + 1] * scaled_BHKL[:, :, i + 1 :] for i in range(width - 1)]
    return torch.cat([ones_BH1L, x_BHKL, x_BHKL.square() * 0.5, *off], dim=2)


def _hedgehog(x_BHKL: Tensor, map_HKK: Tensor) -> Tensor:
    mapped = map_HKK.to(x_BHKL.dtype) @ x_BHKL
    return torch.cat([mapped, -mapped], dim=2).softmax(2)
