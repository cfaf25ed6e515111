"""Sums over windows, and the means that they make: how sure these are, and how sure the difference of two is.

Tokens of a window say much the same, windows of different places do not: they are what is drawn at random. Means are
over tokens, of which windows have unequal counts where only hits are meant, so they are ratios of two sums.

Shapes: W windows, N predicted tokens, S draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.files import read_json, write_json

WINDOWS = "windows.json"
# Means by name: the column of `likelihood` that is summed, and the tokens that are counted.
MEANS = {
    "kl": ("kl", "tokens"),
    "loss": ("nll", "tokens"),
    "hit_loss": ("nll", "hits"),
    "miss_loss": ("nll", "misses"),
    "teacher_loss": ("teacher_nll", "tokens"),
    "teacher_hit_loss": ("teacher_nll", "hits"),
    "teacher_miss_loss": ("teacher_nll", "misses"),
}
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Over the tokens of each window.

    Attributes:
        counts: by "tokens", "hits" and "misses" how many there are, (W,).
        sums: by name of `MEANS` what is summed over them, nats, (W,).
    """

    counts: Mapping[str, Numbers]
    sums: Mapping[str, Numbers]

    def of(self, name: str) -> tuple[Numbers, Numbers]:
        """What is summed for a mean, and over how many tokens, each (W,). ValueError where there are no such tokens."""
        counts = self.counts[MEANS[name][1]]
        if not counts.any():
            raise ValueError(f"the text has no {MEANS[name][1]}, whose mean {name} is: hold out more text")
        return self.sums[name], counts


def window_sums(table: Mapping[str, Any], hits: Any) -> Sums:
    """The sums of columns (N,) of `likelihood`, window by window, given which of the tokens are hits, (W, N / W)."""
    which = {"tokens": np.ones(hits.shape, dtype=bool), "hits": np.asarray(hits), "misses": ~np.asarray(hits)}
    columns = {name: np.asarray(column).reshape(hits.shape) for name, column in table.items()}
    sums = {name: np.where(which[over], columns[column], 0.0).sum(1) for name, (column, over) in MEANS.items()}
    return Sums({over: mask.sum(1).astype(float) for over, mask in which.items()}, sums)


def write_sums(sums: Sums, folder: Path) -> None:
    """Keep them as `windows.json` of a folder."""
    parts = {"counts": sums.counts, "sums": sums.sums}
    write_json(folder / WINDOWS, {part: {n: each.tolist() for n, each in of.items()} for part, of in parts.items()})


def read_sums(folder: Path) -> Sums:
    """Those of a folder, to the bit."""
    parts = {
        part: {name: np.array(each, dtype=float) for name, each in of.items()}
        for part, of in read_json(folder / WINDOWS).items()
    }
    return Sums(parts["counts"], parts["sums"])


def ratio(sums: Numbers, counts: Numbers) -> tuple[float, float]:
    """The mean over all tokens, and its standard error where windows, at least two, are drawn at random.

    As the mean is a ratio of two sums, the error is that of the ratio estimator (Cochran 1977, section 2.11): the
    spread over windows of what is left of a window's sum when its count times the mean is taken off.
    """
    windows, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    left = sums - mean * counts
    return mean, math.sqrt(windows / (windows - 1) * float(left @ left)) / total


def difference(first: Sums, second: Sums, name: str) -> tuple[float, float]:
    """How much higher a mean is in the first, and the standard error of that; both are of the same windows.

    Paired: what makes a window hard for both is in neither.
    """
    sums, counts = first.of(name)
    return ratio(sums - second.of(name)[0], counts)
