"""Ways of choosing layers held against the best set of as many layers: regret, by sets that were all distilled.

Place in the flow: trials of one study say which sets a way comes to, trials of another, the truth, how good sets are.
Pure arithmetic. Invariant: only what the truth measured is told, and a way is charged for choosing, not for training.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.record.choices import Cost

Layers = tuple[int, ...]  # ascending
Values = Mapping[Layers, Mapping[int, float]]  # by set and seed
Error = tuple[float, float | None]  # a mean and its standard error; None of a single seed
ERRORS = 2.0  # standard errors that a regret must reach to be told from none
DRAWS = 5  # random orders


@dataclasses.dataclass(frozen=True)
class Truth:
    """Perplexity ratios and hit losses of sets of layers, by seed."""

    ratios: Values
    hits: Values

    @property
    def layers(self) -> Layers:
        """All that any set has."""
        return tuple(sorted({layer for layers in self.ratios for layer in layers}))

    def sets(self, count: int) -> list[Layers]:
        """Those of so many layers."""
        return sorted(layers for layers in self.ratios if len(layers) == count)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of choosing: by number of layers the set it comes to, or several that stand side by side."""

    name: str
    sets: Mapping[int, tuple[Layers, ...]]
    tau: tuple[float, float, float] | None = None  # of its first choice: mean, low, high
    cost: Cost | None = None  # None: it asks nothing


@dataclasses.dataclass(frozen=True)
class Row:
    """A way at one number of layers.

    Attributes:
        ratio: of its set, over seeds.
        regret: ratio less the lowest mean ratio of all sets of as many layers; its error is paired over seeds.
        held_out: the same for each seed against the set that is best on the others: nothing is picked on what it is
            judged by. None of a single seed.
        hits: regret in nats per token on tokens that can be copied.
        tie: the regret is less than two errors.
        rank: among all sets of as many layers, 1 the best; a mean where there are several sets.
    """

    count: int
    sets: tuple[Layers, ...]
    ratio: Error
    regret: Error
    held_out: Error | None
    hits: Error
    tie: bool
    rank: float
    among: int


@dataclasses.dataclass(frozen=True)
class Judged:
    """A way with its rows, and means over all numbers of layers but the last, where there is one set alone."""

    way: Way
    rows: tuple[Row, ...]
    regret: Error | None
    held_out: Error | None
    hits: Error | None
    missing: tuple[Layers, ...]


def judge(way: Way, truth: Truth) -> Judged:
    """What the truth says of a way; the sets that it lacks are `missing`."""
    there = {count: tuple(each for each in sets if each in truth.ratios) for count, sets in way.sets.items()}
    missing = [each for sets in way.sets.values() for each in sets if each not in truth.ratios]
    counts = sorted(count for count, sets in there.items() if sets)
    rows = tuple(_row(count, there[count], truth) for count in counts)
    open_ = [count for count in counts if len(truth.sets(count)) > 1]

    def mean(apart: Mapping[int, Mapping[int, float]], values: Iterable[float]) -> Error | None:
        if not open_:
            return None
        seeds = set.intersection(*(set(apart[count]) for count in open_))
        error = mean_error([statistics.fmean(apart[count][seed] for count in open_) for seed in sorted(seeds)])[1]
        return statistics.fmean(values), error

    judged = [row for row in rows if row.count in open_]
    held = [row.held_out[0] for row in judged if row.held_out is not None]
    return Judged(
        way,
        rows,
        mean({k: differences(truth.ratios, there[k], best(truth.ratios, k)) for k in open_}, _means(judged, "regret")),
        mean({k: held_out(truth.ratios, there[k], k) for k in open_}, held) if len(held) == len(judged) else None,
        mean({k: differences(truth.hits, there[k], best(truth.hits, k)) for k in open_}, _means(judged, "hits")),
        tuple(dict.fromkeys(missing)),
    )


def _means(rows: Sequence[Row], name: str) -> list[float]:
    return [getattr(row, name)[0] for row in rows]


def _row(count: int, sets: tuple[Layers, ...], truth: Truth) -> Row:
    every = truth.sets(count)
    means = {layers: statistics.fmean(truth.ratios[layers].values()) for layers in every}
    regret = _regret(truth.ratios, sets, count)
    held = held_out(truth.ratios, sets, count)
    return Row(
        count=count,
        sets=sets,
        ratio=(
            statistics.fmean(means[each] for each in sets),
            mean_error(list(_together(truth.ratios, sets).values()))[1],
        ),
        regret=regret,
        held_out=mean_error(list(held.values())) if len(held) > 1 else None,
        hits=_regret(truth.hits, sets, count),
        tie=regret[1] is not None and 0 < regret[0] < ERRORS * regret[1],
        rank=statistics.fmean(1 + sum(means[other] < means[each] for other in every) for each in sets),
        among=len(every),
    )


def best(values: Values, count: int) -> Layers:
    """The set of so many layers that has the lowest mean over its seeds."""
    every = sorted(layers for layers in values if len(layers) == count)
    return min(every, key=lambda layers: statistics.fmean(values[layers].values()))


def differences(values: Values, sets: Sequence[Layers], other: Layers) -> dict[int, float]:
    """By seed that all have, what the mean of sets is more than another set."""
    return {seed: mean - values[other][seed] for seed, mean in _together(values, sets).items() if seed in values[other]}


def held_out(values: Values, sets: Sequence[Layers], count: int) -> dict[int, float]:
    """By seed, what the mean of sets is more than the set that is best on all other seeds."""
    found = {}
    every = sorted(layers for layers in values if len(layers) == count)
    for seed, mean in _together(values, sets).items():
        others = {
            layers: statistics.fmean(value for own, value in values[layers].items() if own != seed)
            for layers in every
            if seed in values[layers] and len(values[layers]) > 1
        }
        if others:
            found[seed] = mean - values[min(others, key=others.__getitem__)][seed]
    return found


def mean_error(values: Sequence[float]) -> Error:
    """The mean and its standard error over seeds."""
    if len(values) < 2:
        return (values[0] if values else math.nan), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _regret(values: Values, sets: Sequence[Layers], count: int) -> Error:
    lowest = best(values, count)
    regret = statistics.fmean(statistics.fmean(values[each].values()) for each in sets)
    regret -= statistics.fmean(values[lowest].values())
    return regret, mean_error(list(differences(values, sets, lowest).values()))[1]


def _together(values: Values, sets: Sequence[Layers]) -> dict[int, float]:
    """By seed that all sets have, their mean."""
    seeds = set.intersection(*(set(values[each]) for each in sets))
    return {seed: statistics.fmean(values[each][seed] for each in sets) for seed in sorted(seeds)}


def usual_ways(layers: Layers, costs: Mapping[int, float] | None = None) -> list[Way]:
    """Ways that need no stages: evenly spread, from either end, at random; by `costs` of single layers where given.

    uniform: of k equal stretches of all n layers the middle one, rounded down: layer (2i + 1) n // 2k for i below k;
    no set needs to hold the one before it. random: prefixes of five orders, whose means are told. exact: the k layers
    whose costs have the lowest sum, the best set where costs add up.
    """
    n = len(layers)
    ways = [
        Way("uniform", {k: (tuple(layers[(2 * i + 1) * n // (2 * k)] for i in range(k)),) for k in range(1, n + 1)}),
        Way("bottom_up", {k: (layers[:k],) for k in range(1, n + 1)}),
        Way("top_down", {k: (layers[n - k :],) for k in range(1, n + 1)}),
    ]
    orders = [random.Random(seed).sample(layers, n) for seed in range(DRAWS)]
    drawn = {k: tuple(tuple(sorted(order[:k])) for order in orders) for k in range(1, n + 1)}
    ways.append(Way(f"random x{DRAWS}", drawn))
    if costs is not None:
        cheap = sorted(costs, key=lambda layer: (costs[layer], layer))
        ways.append(Way("exact", {k: (tuple(sorted(cheap[:k])),) for k in range(1, len(cheap) + 1)}))
    return ways
