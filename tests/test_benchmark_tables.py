"""What the tables of benchmarks are made of, by hand."""

from __future__ import annotations

import pytest

from tests.benchmarks.left import row, told_in
from tests.benchmarks.searches import Tried, course, hypervolume

LOG = """
[  0:40] 3 of 14 stages done, about 10 min left
[  1:00] 3 of 14 stages done, about 70 s left (not measured yet: probes)
[  1:00]   trial-00: 50% of 2 min left
[ 0:20] a run that goes on: 3 of 14 stages done, at least 2.5 min left
[  1:40] 9 of 14 stages done, at most 90 s left
[200:00] 9 of 14 stages done, about 1.5 h left
[300:00] done
"""


def test_the_last_run_of_a_log_counts() -> None:
    told, end = told_in(LOG)
    assert [(each.at, each.left, each.how) for each in told] == [
        (20, 150, "at least"), (100, 90, "at most"), (12_000, 5_400, "about")
    ]  # fmt: skip
    assert end == 18_000


def test_what_was_told_stands_beside_what_was_left() -> None:
    cells = row("a", LOG).split(" | ")
    assert cells[0:3] == ["| a", "300.0", "≤ 1.5 (298.3)"]  # the nearest to a third, 100 minutes
    assert cells[-1] == "1 of 1 |"  # 90 minutes were told and 100 were left


def test_an_area_is_dominated_once() -> None:
    assert hypervolume([(1.0, 3.0), (2.0, 4.0)], (4.0, 1.0)) == pytest.approx(3 * 2 + 2 * 1)
    assert hypervolume([(1.0, 3.0), (2.0, 2.0), (5.0, 9.0), (0.5, 0.5)], (4.0, 1.0)) == pytest.approx(3 * 2)


def test_shared_stages_cost_once() -> None:
    first = Tried("a", 1.0, 3.0, {"x": 10, "y": 5})
    second = Tried("b", 2.0, 4.0, {"x": 10, "z": 7})
    assert course([first, second], (4.0, 1.0), 8.0) == [(15, pytest.approx(6 / 8)), (22, pytest.approx(1.0))]
