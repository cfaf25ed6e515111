"""Scores of a task from what its items gave, their standard errors, and a student's beside its teacher's.

Pure arithmetic. Every score here is a function of a ratio of sums over items, so that all errors come from one rule,
the delta method: an item's share in the error is what is left of its sum after the ratio times its weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.files import read_json, write_json

ITEMS = "items.json"
Form = Literal["mean", "perplexity", "bits"]
CHANCE_ERRORS = 2.0  # standard errors that a teacher must be above chance


@dataclasses.dataclass(frozen=True)
class Items:
    """What the items of a task gave for one metric.

    Attributes:
        form: mean, the sums over the weights; perplexity, exp of minus that; bits, minus that in bits.
        sums: by item its score, or the log-likelihood of its text.
        weights: by item 1, or the words or bytes of its text.
        chance: by item the score of a guess; None for a metric that has none.
    """

    form: Form
    sums: tuple[float, ...]
    weights: tuple[float, ...]
    chance: tuple[float, ...] | None = None

    @property
    def value(self) -> float:
        """The score."""
        ratio = sum(self.sums) / sum(self.weights)
        if self.form == "mean":
            return ratio
        return _exp(-ratio) if self.form == "perplexity" else -ratio / math.log(2)

    @property
    def stderr(self) -> float | None:
        """The standard error of the score; None of a single item."""
        error = ratio_error(self.sums, self.weights)
        slope = {"mean": 1.0, "perplexity": self.value, "bits": 1 / math.log(2)}[self.form]
        return None if error is None else slope * error

    @property
    def guess(self) -> float | None:
        """The mean score of a guess."""
        return None if self.chance is None else sum(self.chance) / len(self.chance)


def write_items(folder: Path, found: Mapping[str, Items]) -> None:
    """Keep what items gave, by metric."""
    write_json(folder / ITEMS, {name: dataclasses.asdict(items) for name, items in found.items()})


def read_items(folder: Path) -> dict[str, Items]:
    """What `write_items` kept, by metric; scores that are no means of items have none."""
    return {name: Items(**_tuples(told)) for name, told in read_json(folder / ITEMS).items()}


def _tuples(told: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def ratio_error(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """The standard error of sum(sums) / sum(weights) over items; with weights of 1 that of their mean.

    None of a single item, or where the weights sum to nothing.
    """
    count, total = len(sums), sum(weights)
    if count < 2 or total == 0:
        return None
    ratio = sum(sums) / total
    left = sum((value - ratio * weight) ** 2 for value, weight in zip(sums, weights, strict=True))
    return math.sqrt(left * count / (count - 1)) / abs(total)


def compare(student: Items, teacher: Items) -> dict[str, Any]:
    """A student's score beside its teacher's on the same items, by what the metric allows.

    Returns:
        For metrics with a chance level `relative`, (s - r) / (t - r) for student s, teacher t and chance r, and
        `relative_stderr`; or `refused`, the reason why there is none. For perplexities `ratio`, student over teacher,
        and `ratio_stderr`. Errors take into account that both were asked the same items (paired differences, by the
        delta method: the relative score is a ratio of sums of s - r and t - r over items). Nothing for other metrics.
    """
    if student.form == "perplexity" == teacher.form:
        apart = [theirs - own for own, theirs in zip(student.sums, teacher.sums, strict=True)]
        ratio, error = _exp(sum(apart) / sum(teacher.weights)), ratio_error(apart, teacher.weights)
        return {"ratio": ratio, "ratio_stderr": None if error is None else ratio * error}
    if student.chance is None or teacher.chance is None:
        return {}
    own, theirs = (
        [value - guess for value, guess in zip(each.sums, teacher.chance, strict=True)] for each in (student, teacher)
    )
    above = sum(theirs) / len(theirs)
    if teacher.stderr is None:
        return {"refused": "one item has no error"}
    if above <= CHANCE_ERRORS * teacher.stderr:
        return {"refused": "teacher at chance"}
    return {"relative": sum(own) / sum(theirs), "relative_stderr": ratio_error(own, theirs)}


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # above 709 nats
        return math.inf
