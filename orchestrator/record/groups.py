"""Trials that differ in their seed alone as one student: the mean of what was measured, its spread, and when two are
a tie.

Place in the flow: between records, a row for every stage of every trial, and all that ranks, tells or draws students.
Invariant: of one seed a student is its record, with nothing taken away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
OWN = "the study's own values"  # of a trial that sets none
ERRORS = 2.0  # standard errors that two means differ by unless they are a tie
GIVEN_BACK = "given_back"  # outcome of a stage whose layers are attention again
RATIO = "perplexity_ratio"  # what students are ranked by


def students(records: Iterable[Record]) -> list[Record]:
    """A row for every stage of every group of trials that differ in `seed` alone, in the order of their first.

    Stages that were given back are no students. Seeds that came to different layers are different ones. `metrics` are
    means over seeds; `spread` has their standard deviations, `ratios` the perplexity ratio of every seed, `seeds` and
    `members` say whose they are. All else, speeds, probes and tasks too, is that of the member whose perplexity ratio
    is nearest to the mean, the one that is exported.
    """
    groups: dict[tuple[str, int, tuple[int, ...]], dict[str, Record]] = {}
    for row in records:
        if row["kind"] == "stage" and row["outcome"] != GIVEN_BACK:
            place = (row["group"], row["stage_index"], tuple(row["swapped_layers"]))
            groups.setdefault(place, {}).setdefault(row["stage_key"], row)
    return [_together(list(members.values())) for members in groups.values()]


def _together(members: list[Record]) -> Record:
    ratios = [row["metrics"][RATIO] for row in members]
    middle = statistics.fmean(ratios)
    nearest = min(members, key=lambda row: abs(row["metrics"][RATIO] - middle))
    known = {
        "ratios": ratios,
        "seeds": [row["seed"] for row in members],
        "members": [row["trial"] for row in members],
        "label": nearest["trial"],
        "last": any(row["last"] for row in members),
        "spread": {},
    }
    if len(members) == 1:
        return {**nearest, **known}
    numbers = {
        name: [row["metrics"][name] for row in members]
        for name, value in nearest["metrics"].items()
        if isinstance(value, int | float) and all(name in row["metrics"] for row in members)
    }
    means = {name: each[0] if len(set(each)) == 1 else statistics.fmean(each) for name, each in numbers.items()}
    label = f"{nearest['group']} ×{len(members)}"
    words = joined(word for word in separate(nearest["words"]) if word != f"seed={nearest['seed']}")
    return {
        **nearest,
        **known,
        "label": label,
        "name": f"{label}{nearest['name'].removeprefix(nearest['trial'])}",
        "words": words or OWN,
        "metrics": {**nearest["metrics"], **means},
        "spread": {name: _deviation(each) for name, each in numbers.items()},
    }


def _deviation(numbers: Sequence[float]) -> float:
    """The standard deviation of a sample; `statistics.stdev` is exact, and fifty times slower."""
    middle = statistics.fmean(numbers)
    return math.sqrt(math.fsum((number - middle) ** 2 for number in numbers) / (len(numbers) - 1))


def joined(words: Iterable[str]) -> str:
    """What is told of a trial's values as one text: with semicolons where any is of several words."""
    told = list(words)
    return ("; " if any(" " in word for word in told) else " ").join(told)


def separate(words: str) -> list[str]:
    """What `joined` made one text."""
    return words.split("; ") if "; " in words else words.split(" ")


def ratio_of(row: Record) -> float:
    """The perplexity over the teacher's that a student is ranked by."""
    return float(row["metrics"][RATIO])


def seeds_range(rows: Iterable[Record]) -> float | None:
    """The widest range of perplexity ratios that seeds alone made among students; None where none has two seeds."""
    ranges = [max(row["ratios"]) - min(row["ratios"]) for row in rows if len(row["ratios"]) > 1]
    return max(ranges, default=None)


def noise(one: Record, other: Record, among: Sequence[Record]) -> float | None:
    """The difference of perplexity ratios that two students must reach to be told apart; None where it is not known.

    Two standard errors of it where both have several seeds; else the widest range of seeds `among` students that swap
    as many layers, or among all.
    """
    if len(one["ratios"]) > 1 and len(other["ratios"]) > 1:
        return ERRORS * math.sqrt(sum(row["spread"][RATIO] ** 2 / len(row["ratios"]) for row in (one, other)))
    alike = seeds_range(row for row in among if len(row["swapped_layers"]) == len(one["swapped_layers"]))
    return alike if alike is not None else seeds_range(among)


def ties(best: Record, others: Iterable[Record], among: Sequence[Record]) -> list[Record]:
    """The `others` that cannot be told apart from the best, nearest first; a stage that trials share is one."""
    found: dict[str, Record] = {}
    for row in others:
        least = noise(best, row, among)
        if least is not None and abs(ratio_of(row) - ratio_of(best)) < least:
            found.setdefault(row["stage_key"], row)
    found.pop(best["stage_key"], None)
    return sorted(found.values(), key=ratio_of)


def best_by_layers(rows: Iterable[Record]) -> list[Record]:
    """For every number of swapped layers, fewest first, the student of lowest mean perplexity ratio."""
    best: dict[int, Record] = {}
    for row in rows:
        count = len(row["swapped_layers"])
        if count not in best or ratio_of(row) < ratio_of(best[count]):
            best[count] = row
    return [best[count] for count in sorted(best)]
