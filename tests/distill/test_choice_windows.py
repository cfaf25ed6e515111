"""The text that layers are chosen by is none that evaluations read."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.distill.data import choice_windows, spread_windows

TEXT = np.arange(103, dtype=np.uint16)  # 12 windows of 8, and a rest


def starts(found: object) -> list[int]:
    return [row[0] for row in np.asarray(found).tolist()]


@pytest.mark.parametrize(
    ("reported", "budget", "wanted"),
    [
        (1, 16, [8, 88]),  # the first window is read; of the other eleven the ends
        (17, 24, [8, 40, 80]),  # first and last are read; the middle of ten, at 4.5, is the fourth by rounding to even
        (17, 31, [8, 40, 80]),
        (80, 16, [24, 64]),  # ten of twelve are read
        (17, 80, list(range(8, 88, 8))),
    ],
)
def test_they_are_spread_over_what_is_left(reported: int, budget: int, wanted: list[int]) -> None:
    found = choice_windows(TEXT, 8, reported, budget)
    assert found.tolist() == [list(range(start, start + 8)) for start in wanted]


@pytest.mark.parametrize("reported", [1, 8, 16, 30, 64, 80])
@pytest.mark.parametrize("budget", [16, 20])
def test_none_of_them_is_evaluated(reported: int, budget: int) -> None:
    chosen, read = (
        set(starts(found)) for found in (choice_windows(TEXT, 8, reported, budget), spread_windows(TEXT, 8, reported))
    )
    assert len(chosen) == 2
    assert chosen.isdisjoint(read)


def test_too_few_of_them_are_told_with_what_to_do() -> None:
    told = (
        r"schedule\.choice\.texts of 50 tokens is 6 windows of 8, but of the 12 windows of held-out text evaluations "
        r"read 7 and 5 are left: lower it to 40, lower evaluation\.tokens, or hold out more text"
    )
    with pytest.raises(ValueError, match=told):
        choice_windows(TEXT, 8, 56, 50)
    assert len(choice_windows(TEXT, 8, 56, 40)) == 5


@pytest.mark.parametrize("budget", [1, 8, 15])
def test_a_single_window_does_not_say_how_sure_its_mean_is(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"{budget} tokens is {budget // 8} windows of 8, .* at least 2: raise it to"):
        choice_windows(TEXT, 8, 8, budget)
