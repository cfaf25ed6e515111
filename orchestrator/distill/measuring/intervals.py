"""How sure a measured ratio is: an interval around the median of its turns, by the bootstrap.

Place in the flow: `throughput` measures in turns and keeps them; records put those of several measurements together.
Invariant: draws are seeded, so that the same turns have the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARE = 0.95  # of intervals that should hold the true median
ENOUGH = 9  # turns from which on the bootstrap's share is true: of nine, the second and the eighth hold 96 %
DRAWS = 2_000
SEED = 0

Bounds = tuple[float, float]


def median_interval(measurements: Sequence[Sequence[float]]) -> Bounds | None:
    """Bounds of the median of turns; None of a single turn.

    Turns of one measurement are drawn anew (Efron and Tibshirani 1993, chapter 13). Those of several share what their
    process had in common, so measurements are drawn first, and turns of each (Davison and Hinkley 1997, 3.8). Fewer
    turns than `ENOUGH` in all are told by the lowest and the highest.
    """
    turns = [np.asarray(each, dtype=float) for each in measurements if len(each)]
    count = sum(map(len, turns))
    if count < 2:
        return None
    if count < ENOUGH:
        return float(min(map(np.min, turns))), float(max(map(np.max, turns)))
    generator = np.random.default_rng(SEED)
    most = max(map(len, turns))
    table = np.stack([np.pad(each, (0, most - len(each))) for each in turns])  # measurement by turn
    lengths = np.array([len(each) for each in turns])
    which = generator.integers(len(turns), size=(DRAWS, len(turns), 1))
    places = (generator.random((DRAWS, len(turns), most)) * lengths[which]).astype(int)
    medians = np.median(table[which, places], axis=(1, 2))
    low, high = np.quantile(medians, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def narrow(turns: Sequence[float], share: float) -> bool:
    """Whether enough turns agree: their interval reaches at most this share of the median to either side."""
    bounds = median_interval([turns])
    if bounds is None or len(turns) < ENOUGH:
        return False
    middle = float(np.median(turns))
    return max(bounds[1] - middle, middle - bounds[0]) <= share * middle
