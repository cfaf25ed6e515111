"""Which student the options of `layerswap export` mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.choice import exported_stage, knee
from orchestrator.record.records import make_records
from tests.record.handmade import Hand


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    return Hand(tmp_path)


def meant(hand: Hand, *, trial: str | None = None, stage: str | None = None, best: str | None = None) -> str:
    records = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    return exported_stage(hand.plan, hand.store, records, trial, stage, best)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "two joint"),  # of those that swap both layers the one of lowest ratio
        ({"best": "quality"}, "two 0"),
        ({"best": "speed"}, "heads joint"),
        ({"best": "knee"}, "two joint"),  # ratios 1.05, 1.1, 1.12 at speeds 1.1, 1.5, 1.6
        ({"trial": "trial-01"}, "two mixed"),
        ({"trial": "trial-02", "best": "quality"}, "heads joint"),
        ({"trial": "trial-02", "best": "knee"}, "heads joint"),  # faster than its first stage, and better
        ({"trial": "trial-02", "stage": "1"}, "heads 0"),
        ({"trial": "trial-02", "stage": "2"}, "heads 1"),
        ({"trial": "trial-02", "stage": "3"}, "heads joint"),
        ({"trial": "trial-02", "stage": "joint"}, "heads joint"),
    ],
)
def test_the_student_that_is_meant(hand: Hand, options: dict[str, Any], name: str) -> None:
    hand.all_done()
    assert meant(hand, **options) == hand.key(name)


def test_a_student_is_named_by_the_start_of_its_key(hand: Hand) -> None:
    hand.all_done()
    key = hand.key("heads 0")
    assert meant(hand, stage=key[:12]) == meant(hand, trial="trial-02", stage=key[:12]) == key
    for words, told in (
        ({"stage": "zz"}, "--stage zz: 0 finished students begin so; layerswap status lists them"),
        ({"stage": ""}, "--stage : 7 finished students begin so"),
        ({"trial": "trial-00", "stage": key[:12]}, "0 finished students"),
        ({"trial": "trial-02", "stage": "4"}, r"^--stage 4: trial-02 has the stages 1 to 3, the last of them joint$"),
        ({"trial": "trial-07"}, r"^--trial trial-07: the study has trial-00 to trial-02$"),
        ({"trial": "trial-07", "stage": "1"}, r"^--trial trial-07: the study has trial-00 to trial-02$"),
        ({"stage": "ab", "best": "knee"}, r"^--stage ab and --best knee name a student each: give one of the two$"),
    ):
        with pytest.raises(ValueError, match=told):
            meant(hand, **words)
    (hand.store.folder(key) / "DONE.json").unlink()
    with pytest.raises(ValueError, match="0 finished students"):
        meant(hand, stage=key)
    with pytest.raises(ValueError, match=r"^--stage 1: this stage of trial-02 is not finished yet: run the study "):
        meant(hand, trial="trial-02", stage="1")


def test_what_is_not_there_yet_is_told(hand: Hand) -> None:
    for options, told in (
        ({}, r"^no student is finished yet: run the study first$"),
        ({"best": "speed"}, r"^no student is finished yet: run the study first$"),
        ({"trial": "trial-01"}, r"^no student of trial-01 is finished yet: run the study first$"),
    ):
        with pytest.raises(ValueError, match=told):
            meant(hand, **options)
    hand.finish("teacher", "two 0")
    assert meant(hand, trial="trial-01") == meant(hand, best="quality") == hand.key("two 0")
    with pytest.raises(ValueError, match=r"^--best knee: no student's speed is measured yet: run the study to its end"):
        meant(hand, best="knee")


@pytest.mark.parametrize(
    ("points", "index"),
    [
        ([], None),
        ([(1.0, 1.0)], 0),
        ([(1.0, 1.0), (2.0, 4.0)], 0),
        ([(1.0, 1.0), (1.5, 2.0), (2.0, 4.0)], 0),  # on the line
        ([(1.0, 1.0), (1.5, 1.9), (2.0, 4.0)], 1),
        ([(1.0, 1.0), (1.5, 3.0), (2.0, 4.0)], 0),  # above it: a mixture of the ends would be better
        ([(1.0, 1.0), (1.2, 1.05), (1.8, 1.9), (2.0, 4.0)], 2),
        ([(1.0, 1.0), (1.4, 1.05), (1.8, 2.9), (2.0, 4.0)], 1),
    ],
)
def test_the_knee_is_farthest_below_the_line_between_the_ends(
    points: list[tuple[float, float]], index: int | None
) -> None:
    front: list[dict[str, Any]] = [
        {"metrics": {"prefill_ratio": {"8": speed}, "perplexity_ratio": ratio}} for speed, ratio in points
    ]
    assert knee(front, "8") == ([] if index is None else [front[index]])
    if index:
        (x, y), (x_0, y_0), (x_1, y_1) = ((points[i][0], math.log(points[i][1])) for i in (index, 0, -1))
        areas = [
            (x_1 - x_0) * (y_0 - math.log(b)) + (y_1 - y_0) * (a - x_0) for a, b in points
        ]  # twice those of the triangles over the line
        assert max(areas) == areas[index] == (x_1 - x_0) * (y_0 - y) + (y_1 - y_0) * (x - x_0)
