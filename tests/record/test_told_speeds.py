"""Speeds by length, told from the handmade store: table, crossovers and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from orchestrator.record.answer import speed_table
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.report import write_report
from orchestrator.record.answer.text import answer
from orchestrator.record.records import Record, make_records
from tests.record.handmade import Hand

TWO, HEADS = "trial-00 losses=kl:1.0", "trial-02 operator=hyena-2h"
LINES = [
    [TWO, "16", "0.75x", "1.00x", "-", "-", "-"],
    [TWO, "32", "1.50x", "2.00x", "-", "-", "-"],
    [HEADS, "16", "0.80x", "0.95x", "0.50x", "3.0", "+0.250"],
    [HEADS, "32", "1.60x", "1.90x", "0.25x", "3.0", "-"],
]


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    made = Hand(tmp_path)
    made.all_done()
    return made


@pytest.fixture
def rows(hand: Hand) -> list[Record]:
    found = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    [heads] = [row for row in found if row["name"] == "trial-02 joint"]
    heads["metrics"] |= {"cache_mb": {"16": 3.0, "32": 3.0}, "teacher_cache_mb": {"16": 6.0, "32": 12.0}}
    return found


def test_every_architecture_has_a_line_a_length(rows: list[Record]) -> None:
    measured = speed_table.measured_rows(rows)
    measured[HEADS]["probes"] = {"nll": {"16": 2.5}, "teacher": {"nll": {"16": 2.25}}}
    assert list(measured) == [TWO, HEADS, "skip 0, 1", "skip all"]  # trial-01 has the layers of trial-00
    frame = speed_table.speed_table({name: measured[name] for name in (TWO, HEADS)})
    assert list(frame.columns) == ["row", "tokens", "prefill", "decode", "cache", "cache MB", "apart"]
    assert frame.to_numpy().tolist() == LINES


def test_controls_of_one_measurement_are_one_line(rows: list[Record]) -> None:
    assert list(speed_table.measured_rows(rows)) == [TWO, HEADS, "skip 0, 1", "skip all"]
    [one] = [row for row in rows if row["name"] == "skip 1"]
    one["metrics"]["decode_ratio"] = {**one["metrics"]["decode_ratio"], "32": 3.0}
    assert list(speed_table.measured_rows(rows)) == [TWO, HEADS, "skip 0", "skip 1", "skip all"]


def test_one_length_is_no_table(rows: list[Record], tmp_path: Path) -> None:
    for row in rows:
        row["metrics"].get("prefill_ratio", {}).pop("16", None)
    assert speed_table.measured_rows(rows) == {}
    assert not speed_table.draw_speed("none", {}, tmp_path / "speed.png")


@pytest.mark.parametrize(
    ("ratios", "start"),
    [
        ({"256": 0.5, "1024": 0.99, "8192": 2.0}, 8192),
        ({"256": 1.0, "1024": 1.5, "8192": 2.0}, 256),
        ({"256": 2.0, "1024": 0.9, "8192": 1.2}, 8192),  # faster again
        ({"256": 2.0, "8192": 0.9}, None),
        ({}, None),
    ],
)
def test_it_pays_from_where_no_longer_text_is_slower(ratios: dict[str, float], start: int | None) -> None:
    assert speed_table.pays_from({"decode_ratio": ratios}, "decode") == start
    assert speed_table.pays_from({}, "decode") is None


def test_what_is_as_fast_within_its_interval_pays() -> None:
    ratios, bounds = {"256": 0.9, "512": 0.97, "1024": 1.3}, {"256": [0.85, 0.95], "512": [0.94, 1.0]}
    assert speed_table.pays_from({"prefill_ratio": ratios, "prefill_interval": bounds}, "prefill") == 512
    assert speed_table.pays_from({"prefill_ratio": ratios}, "prefill") == 1024


def test_crossovers_are_said(rows: list[Record]) -> None:
    measured = speed_table.measured_rows(rows)
    measured[HEADS]["metrics"]["decode_ratio"] = {"16": 1.5, "4096": 0.5}
    assert speed_table.crossovers({name: measured[name] for name in (TWO, HEADS)}).split("\n") == [
        f"{TWO} reads prompts at least as fast as the teacher from 32 tokens on and decodes at least as fast as the "
        "teacher from 16 tokens on.",
        f"{HEADS} reads prompts at least as fast as the teacher from 32 tokens on and decodes more slowly than the "
        "teacher at 4,096 tokens, the longest measured.",
    ]


def test_report_has_all_and_the_terminal_the_best(hand: Hand, rows: list[Record], tmp_path: Path) -> None:
    page, told = markdown(hand.plan, rows, {}, ["speed.png"]), answer(hand.plan, rows, {}, [])
    begin = page.index("## Speed and memory by length\n\n| row | tokens |")
    assert page.index("## Every stage") < begin < page.index(f"| {' | '.join(LINES[1])} |") < page.index("](speed.png)")
    assert speed_table.LEGEND in page and speed_table.LEGEND in told
    assert f"\n{TWO}      16" in told and f"\n{HEADS} " not in told.split(speed_table.LEGEND)[0].split("cache MB")[1]
    assert write_report(hand.plan, hand.store, rows, {}, tmp_path / "report")["speed.png"].is_file()


def test_the_picture_has_ratios_and_memory_by_length(
    rows: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    measured = speed_table.measured_rows(rows)
    assert speed_table.draw_speed("study", {HEADS: measured[HEADS]}, tmp_path / "speed.png")
    prefill, decode, cache = figures[0].axes
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in (prefill, decode, cache)]
    assert drawn == [
        {HEADS: [[16, 0.8], [32, 1.6]], "teacher": [[16, 1], [32, 1]]},
        {HEADS: [[16, 0.95], [32, 1.9]], "teacher": [[16, 1], [32, 1]]},
        {HEADS: [[16, 3], [32, 3]], "teacher": [[16, 6], [32, 12]]},
    ]
    for axis in (prefill, decode, cache):  # a logarithmic axis has powers of ten at its few ticks otherwise
        assert axis.yaxis.get_major_formatter()(0.5, 0) == "0.5" and len(axis.yaxis.get_minorticklocs()) == 0
    assert speed_table.draw_speed("study", {TWO: measured[TWO]}, tmp_path / "speed.png")
    assert len(figures[1].axes) == 2  # memory was not measured
    monkeypatch.undo()
    plt.close("all")
