"""Hits: predicted tokens that complete a trigram which already stands in their window, so that copying would find them.

Shapes: B windows, L tokens of each, the last L - 1 of which are predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trigram_hits(ids_BL: Tensor) -> Tensor:
    """Which predicted tokens complete a trigram already seen in their window, (B, L - 1) bool."""
    return trigram_gaps(ids_BL) > 0


def trigram_gaps(ids_BL: Tensor) -> Tensor:
    """How many tokens back the trigram that a predicted token completes was seen last in its window, (B, L - 1) int64;
    0: never."""
    gaps_BP = torch.zeros_like(ids_BL[:, 1:], dtype=torch.int64)
    ids_BL = ids_BL.long()
    entries = ids_BL.max() + 1
    trigrams_BN = (ids_BL[:, :-2] * entries + ids_BL[:, 1:-1]) * entries + ids_BL[:, 2:]
    order_BN = trigrams_BN.argsort(dim=1, stable=True)  # equal ones side by side, in the order of the text
    sorted_BN = trigrams_BN.gather(1, order_BN)
    seen_BN = sorted_BN[:, 1:] == sorted_BN[:, :-1]
    return gaps_BP.scatter(1, order_BN[:, 1:] + 1, order_BN.diff(dim=1) * seen_BN)
