"""The pictures beside the report: points, errors, front, labels, the broken axis, training curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from orchestrator.record.answer import pictures
from orchestrator.record.answer.pictures import draw_curves, draw_pareto, place_labels, ticks
from orchestrator.record.answer.points import (
    MOST_POINTS,
    Curves,
    Point,
    Series,
    broken_at,
    curves_of,
    front_of,
    panels,
    parted,
    series_of,
)
from orchestrator.record.records import Record, make_records
from tests.record.handmade import Hand, speed

FIRST = [(1.1, 1.05), (1.5, 1.25)]


@pytest.fixture
def rows(hand: Hand) -> list[Record]:
    hand.all_done()
    return make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: "run")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was drawn, kept open."""
    found: list[Any] = []
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    plt.close("all")


def places(series: Series) -> list[tuple[float, float]]:
    return [(point.x, point.y) for point in series.points]


def test_every_student_stands_once_at_its_speed_and_its_quality(rows: list[Record]) -> None:
    two, heads, scratch, skip, teacher = series_of(rows, "prefill", "32")
    assert (two.name, two.kind) == ("hyena-2", "student")
    assert sorted(places(two)) == [*FIRST[:1], (1.5, 1.1), (1.5, 1.15), *FIRST[1:]]  # stages that trials share once
    assert sorted(places(heads)) == [(1.3, 1.2), (1.6, 1.12), (1.6, 1.3)]
    assert (scratch.kind, places(scratch)) == ("scratch", [(1.5, 4.0)])
    assert (skip.kind, places(skip)) == ("skip", [(1.2, 1.5), (1.2, 1.25), (2.0, 8.0)])
    assert places(teacher) == [(1.0, 1.0)]
    assert sorted(places(series_of(rows, "decode", "32")[1])) == [(1.3, 1.2), (1.9, 1.12), (1.9, 1.3)]
    assert sorted(places(series_of(rows, "decode", "16")[1])) == [(0.65, 1.2), (0.95, 1.12), (0.95, 1.3)]


def test_operators_stand_beside_each_other_over_their_number_of_layers(rows: list[Record]) -> None:
    two, heads, *_, teacher = series_of(rows, "layers", "32")
    assert sorted(places(two)) == [(0.875, 1.05), (1.875, 1.1), (1.875, 1.15), (1.875, 1.25)]
    assert sorted(places(heads)) == [(1.125, 1.2), (2.125, 1.12), (2.125, 1.3)]
    assert places(teacher) == [(0.0, 1.0)]
    assert [(p.x, p.y) for p in front_of(rows, "layers", "32")] == [(0.875, 1.05), (1.875, 1.1)]


def test_the_front_is_that_of_the_tables(rows: list[Record]) -> None:
    assert [(p.x, p.y) for p in front_of(rows, "prefill", "32")] == [(1.1, 1.05), (1.5, 1.1), (1.6, 1.12)]
    assert [(p.x, p.y) for p in front_of(rows, "decode", "32")] == [(1.2, 1.05), (2.0, 1.1)]


def test_panels_are_what_was_measured(hand: Hand, rows: list[Record]) -> None:
    assert panels(rows, "32") == ["prefill", "decode", "layers"]
    assert panels(rows, "64") == ["layers"]
    assert panels(rows[:5], "32") == []


def test_errors_are_those_of_speed_and_of_seeds(hand: Hand) -> None:
    hand.all_done()
    bounds = {"prefill_interval": {"32": [1.4, 1.7]}}
    hand.write(hand.speeds[hand.key("two 1")], {**speed(1.5, 2.0), **bounds})
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: "run")
    two = series_of(rows, "prefill", "32")[0].points
    assert {(p.x, p.x_low, p.x_high) for p in two} == {(1.1, 1.1, 1.1), (1.5, 1.4, 1.7)}
    seeds = [row | {"group": "trial-00", "stage_key": str(i)} for i, row in enumerate(rows[7:11:3])]
    [point] = series_of(seeds, "prefill", "32")[0].points
    assert point.y == pytest.approx(1.125) and point.y_error == pytest.approx(math.sqrt(2) * 0.025)


def series(kind: str, *heights: float) -> Series:
    return Series(kind, kind, tuple(Point({}, 1.0, y, 1.0, 1.0, 0.0) for y in heights))


@pytest.mark.parametrize(
    ("students", "controls", "gap"),
    [
        ((1.0, 1.1, 1.2, 1.3), (), None),
        ((1.0, 1.1, 1.2, 1.3), (8.0,), (1.3, 8.0)),
        ((1.0, 1.1, 1.2, 1.3), (1.9, 8.0), (1.3, 1.9)),
        ((1.0, 1.1, 1.2, 1.3), (1.55, 1.6, 1.9, 8.0), (1.9, 8.0)),  # each within 1.25 times the one below
        ((1.0, 1.1, 1.2, 1.3, 9.0), (8.5,), (1.3, 8.5)),  # a student may be one
        ((1.0, 1.1, 1.2), (8.0,), None),  # too few to say
    ],
)
def test_the_axis_breaks_above_what_is_near_the_students(
    students: tuple[float, ...], controls: tuple[float, ...], gap: tuple[float, float] | None
) -> None:
    assert broken_at([series("student", *students), series("skip", *controls)]) == gap


def test_points_stand_on_one_side_of_a_gap() -> None:
    points = series("student", 1.0, 1.3, 8.0).points
    assert [p.y for p in parted(points, (1.3, 8.0), above=False)] == [1.0, 1.3]
    assert [p.y for p in parted(points, (1.3, 8.0), above=True)] == [8.0]
    assert parted(points, None, above=False) == points


def test_the_picture_has_three_panels_each_broken_for_outliers(
    hand: Hand, rows: list[Record], tmp_path: Path, figures: list[Any]
) -> None:
    assert draw_pareto(hand.plan, rows, tmp_path / "pareto.png")
    [figure] = figures
    upper, lower = figure.axes[:3], figure.axes[3:]
    assert [axis.get_xlabel() for axis in lower] == [
        "prefill speed over the teacher's at 32 tokens (right is faster)",
        "decode speed over the teacher's at 32 tokens (right is faster)",
        "swapped layers of 2",
    ]
    assert lower[0].get_ylabel() == "perplexity over the teacher's (down is better)"
    for axis in figure.axes:
        assert axis.get_yscale() == "log"
    assert lower[0].get_ylim()[1] < 2 < upper[0].get_ylim()[0] < 4 < 8 < upper[0].get_ylim()[1]

    def shown(axis: Any) -> dict[str, list[tuple[float, float]]]:
        return {
            c.get_label(): [(float(x), float(y)) for x, y in c.get_offsets()]
            for c in axis.collections
            if len(c.get_offsets())
        }

    below, above = shown(lower[0]), shown(upper[0])
    assert sorted(below["hyena-2"]) == [*FIRST[:1], (1.5, 1.1), (1.5, 1.15), *FIRST[1:]]
    assert above["from scratch"] == [(1.5, 4.0)] and above["attention left out"] == [(2.0, 8.0)]
    assert "from scratch" not in below and "hyena-2" not in above
    front = next(line for line in lower[0].lines if line.get_label() == "best")
    assert front.get_xydata().tolist() == [[1.1, 1.05], [1.5, 1.1], [1.6, 1.12]]
    assert [text.get_text() for text in lower[0].texts] == ["1 swapped: trial-00", "2 swapped: trial-00"]
    assert [text.get_text() for text in lower[2].texts] == ["1.050", "1.100"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "hyena-2", "hyena-2h", "from scratch", "attention left out", "teacher", "best"
    }  # fmt: skip
    assert figure.get_suptitle() == "handmade: every stage of every trial; larger dots swap more layers"
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_without_outliers_the_axis_is_whole(hand: Hand, rows: list[Record], tmp_path: Path, figures: list[Any]) -> None:
    students = [row for row in rows if row["kind"] == "stage"]
    assert draw_pareto(hand.plan, students, tmp_path / "pareto.png")
    assert len(figures[0].axes) == 3
    assert not draw_pareto(hand.plan, rows[:5], tmp_path / "none.png")


def test_labels_cover_no_other_label() -> None:
    figure, axis = plt.subplots(figsize=(4, 3))
    points = [Point({}, x / 100, 1 + x / 400, 0, 0, 0) for x in range(12)]  # nearly one place
    axis.plot([0, 3], [0.9, 1.3], alpha=0)
    figure.canvas.draw()
    place_labels(axis, [(f"{n} swapped: trial-{n:02d}", point) for n, point in enumerate(points)], points)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert 3 <= len(boxes) <= 12
    assert not [(a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)]
    assert all(axis.get_window_extent().contains(*corner) for box in boxes for corner in box.corners())
    plt.close(figure)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.1), (1.0, 3.9), (2.0, 40.0), (0.001, 5.0)])
def test_an_axis_has_a_few_plain_numbers(low: float, high: float) -> None:
    assert 2 <= len([tick for tick in ticks(low, high) if low <= tick <= high]) <= 8


def test_a_curve_is_a_paths_losses_by_all_its_tokens(hand: Hand, rows: list[Record]) -> None:
    for name in ("two 0", "two 1", "two joint"):
        losses = {"loss/kl": 0.5, "loss/kl/layer_1": 9.0, "loss/total": 9.0, "weighted/kl": 9.0, "tokens_per_s": 9.0}
        more = {"loss/ce": 2.0} if name == "two joint" else {}
        hand.journal(hand.key(name), (5, 80, 1.0, losses), (10, hand.steps[name].own_tokens, 2.0, losses | more))
    first = curves_of(hand.plan, hand.store, rows)[0]
    assert first.title == "trial-00 losses=kl:1.0" and first.stages == (160, 320, 640)
    lines = dict(first.lines)
    assert lines.keys() == {"kl", "ce"} and lines["ce"] == ((640, 2.0),)
    known = [point for point in lines["kl"] if not math.isnan(point[1])]
    assert known == [(80, 0.5), (160, 0.5), (240, 0.5), (320, 0.5), (400, 0.5), (640, 0.5)]
    assert [tokens for tokens, loss in lines["kl"] if math.isnan(loss)] == [160, 320]  # nothing joins two stages
    assert [one.title.split()[0] for one in curves_of(hand.plan, hand.store, rows)] == [
        "trial-00",
        "trial-02",
        "trial-01",
    ]


def test_a_long_curve_is_thinned_and_keeps_its_end(hand: Hand, rows: list[Record]) -> None:
    count = 10 * MOST_POINTS
    hand.journal(hand.key("two joint"), *((n, n, 1.0, {"loss/kl": float(n)}) for n in range(1, count + 1)))
    line = dict(curves_of(hand.plan, hand.store, rows)[0].lines)["kl"]
    assert len(line) < MOST_POINTS and line[-1] == (320 + count, float(count))


def test_a_panel_a_path(tmp_path: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [
        Curves(f"trial-{n:02d}", (("kl", ((10, 0.5), (20, 0.25))), ("ce", ((20, 3.0),))), (10, 20)) for n in range(5)
    ]
    assert draw_curves("study", curves, tmp_path / "curves.png")
    shown = [axis for axis in figures[0].axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"trial-{n:02d}" for n in range(5)]
    assert [line.get_xydata().tolist() for line in shown[0].lines[:2]] == [[[10, 0.5], [20, 0.25]], [[20, 3.0]]]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["kl", "ce"]
    monkeypatch.setattr(pictures, "MOST_CURVES", 2)
    assert draw_curves("study", curves, tmp_path / "curves.png")
    assert figures[1].get_suptitle().endswith("grey lines end stages, the best 2 of 5 paths")
    assert not draw_curves("study", [], tmp_path / "none.png")
