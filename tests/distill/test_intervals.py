"""Intervals of medians: their bounds by definition, how often they hold the truth, and when turns are enough."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.distill.measuring.intervals import ENOUGH, median_interval, narrow


def test_one_turn_has_no_interval_and_few_have_their_range() -> None:
    assert median_interval([]) is None and median_interval([[]]) is None
    assert median_interval([[1.5]]) is None
    assert median_interval([[1.5, 1.2, 1.9]]) == (1.2, 1.9)
    assert median_interval([[1.5], [1.1]]) == (1.1, 1.5)  # measurements of a turn each


def test_of_nine_turns_the_second_and_the_eighth_bound_the_median() -> None:
    """The median of nine draws is the lowest with 0.13 %, one of the two lowest with 3 %: 2.5 % lie between."""
    assert median_interval([[9.0, 1.0, 5.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]]) == (2.0, 8.0)


def test_the_same_turns_have_the_same_interval() -> None:
    turns = np.random.default_rng(1).normal(1.6, 0.05, 15).tolist()
    assert median_interval([turns]) == median_interval([turns])


def test_an_interval_holds_the_true_median_nineteen_times_of_twenty() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        low, high = median_interval([generator.normal(1.6, 0.05, 15).tolist()])  # type: ignore[misc]
        held += low <= 1.6 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_what_measurements_differ_by_widens_the_interval() -> None:
    generator = np.random.default_rng(3)
    alike = [generator.normal(1.5, 0.01, 9).tolist() for _ in range(3)]
    apart = [[turn + shift for turn in turns] for turns, shift in zip(alike, (-0.1, 0.0, 0.1), strict=True)]
    (low, high), (least, most) = median_interval(alike), median_interval(apart)  # type: ignore[misc]
    assert high - low < 0.03 and 0.15 < most - least < 0.25


def test_measurements_weigh_alike_however_many_turns_they_have() -> None:
    low, high = median_interval([[1.0] * 40, [2.0] * 5])  # type: ignore[misc]
    assert (low, high) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("turns", "enough"),
    [
        ([1.0] * (ENOUGH - 1), False),
        ([1.0] * ENOUGH, True),
        ([1.0, 1.02] * 5, True),  # half of them two per cent off: 1 % of the median to either side
        ([1.0, 1.2] * 5, False),
    ],
)
def test_turns_are_enough_where_their_interval_is_narrow(turns: list[float], enough: bool) -> None:
    assert narrow(turns, 0.02) is enough
