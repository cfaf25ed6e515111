"""Records -> answer, tables, picture: what a reader sees, from made-up numbers that are easy to check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orchestrator.record.answer import redrawn, report
from orchestrator.record.answer.frames import lead_table, table
from orchestrator.record.answer.markdown import pipe_table
from orchestrator.record.answer.report import write_report
from orchestrator.record.answer.text import answer, text_table
from orchestrator.record.answer.verdict import verdict
from orchestrator.record.records import best_path, pareto_front
from orchestrator.run.store import Store
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan
from orchestrator.study.reported import Report
from orchestrator.study.sources import resolve

ROOT = Path(__file__).resolve().parents[2]
RUN = {"seconds": 60.0, "trained": ["a"], "reused": 2, "peak_rss_mb": 2048.0, "disk_mb": 512.0}


def row(kind: str, name: str, swapped: int, ratio: float, **more: Any) -> dict[str, Any]:
    """A record with the fields that the report reads."""
    speed = more.pop("speed", None)
    metrics: dict[str, Any] = {
        "perplexity": 20 * ratio, "perplexity_ratio": ratio, "agreement": 0.5, "hit_nll": 1.5, "miss_nll": 3.5,
        "student_tokens": 1000 * swapped, "generation_agreement": 0.25,
    }  # fmt: skip
    if speed is not None:
        metrics |= {"prefill_ratio": {"128": speed}, "decode_ratio": {"128": speed}}
    base = {
        "kind": kind, "name": name, "swapped_layers": list(range(swapped)), "total_layers": 3, "metrics": metrics,
        "values": {}, "words": "", "operator": "hyena-2", "trial": None, "stage_index": None, "stage_count": None,
        "group": None, "seed": None, "stage_key": name, "outcome": None, "last": None,
    }  # fmt: skip
    return base | more


@pytest.fixture(scope="module")
def plan() -> Plan:
    document = read_document(ROOT / "studies" / "smoke.yaml")
    study = validate(document)
    return make_plan(document, study, resolve(study, ROOT / "studies"))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    def stage(trial: str, index: int, swapped: int, ratio: float, speed: float) -> dict[str, Any]:
        place = {"trial": trial, "stage_index": index, "stage_count": 2, "values": {"seed": 1}, "words": "seed=1"}
        place |= {"group": trial, "seed": 1, "outcome": "kept", "last": index == 1}
        return row("stage", f"{trial} stage {index + 1}", swapped, ratio, speed=speed, **place)

    return [
        row("teacher", "teacher", 0, 1.0, speed=1.0),
        row("control", "scratch hyena-2", 3, 4.0, speed=2.0),
        row("control", "skip 0", 1, 1.2),
        row("control", "skip 1", 1, 1.1, swapped_layers=[1]),
        stage("trial-00", 0, 1, 1.05, 1.1),
        stage("trial-00", 1, 3, 1.50, 1.9),
        stage("trial-01", 0, 1, 1.01, 1.2),
        stage("trial-01", 1, 3, 1.40, 1.8),
        stage("trial-02", 0, 2, 1.00, 0.9),
    ]


def test_best_path_swaps_most_layers_at_the_lowest_ratio(rows: list[dict[str, Any]]) -> None:
    assert [found["name"] for found in best_path(rows)] == ["trial-01 stage 1", "trial-01 stage 2"]
    assert best_path([found for found in rows if found["kind"] != "stage"]) == []


def test_pareto_front_holds_what_nothing_beats_in_both(rows: list[dict[str, Any]]) -> None:
    front = pareto_front(rows, "prefill_ratio", "128")
    assert [(f["metrics"]["prefill_ratio"]["128"], f["metrics"]["perplexity_ratio"]) for f in front] == [
        (0.9, 1.00), (1.2, 1.01), (1.8, 1.40), (1.9, 1.50),
    ]  # fmt: skip


def test_verdict_names_the_best_student_its_control_and_the_cheapest_layers(rows: list[dict[str, Any]]) -> None:
    said = verdict(rows)
    assert "swaps 3 of 3 layers at 1.400 times" in said
    assert "from scratch the same operator reaches 4.000" in said
    assert "1 (1.10), 0 (1.20)" in said
    assert verdict([]) == "No student is finished yet."


def test_what_was_not_measured_is_a_dash_and_never_a_number(rows: list[dict[str, Any]]) -> None:
    frame = table(rows, "128")
    skip = frame[frame["row"] == "skip 0"].iloc[0]
    assert (skip["prefill"], skip["decode"]) == ("-", "-")
    lines = text_table(frame).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert pipe_table(frame).startswith("| row | swapped |")


def test_report_files_hold_the_same_numbers(plan: Plan, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = write_report(plan, Store(tmp_path / "store"), rows, RUN, tmp_path)
    assert set(paths) == {"report.html", "report.md", "records.json", "records.csv", "pareto.png"}
    assert json.loads(paths["records.json"].read_text())["records"] == rows
    page = paths["report.md"].read_text()
    assert "1.400" in page and "peak memory of all processes 2.00 GB, disk 0.50 GB" in page
    assert paths["pareto.png"].stat().st_size > 10_000


def test_a_picture_is_drawn_where_the_one_that_is_there_shows_something_else(
    plan: Plan, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    usual = report.draw_pareto

    def told(plan: Plan, records: list[dict[str, Any]], path: Path) -> bool:
        drawn.append(path.suffix)
        return usual(plan, records, path)

    monkeypatch.setattr(report, "draw_pareto", told)

    def again(rows: list[dict[str, Any]]) -> int:
        """How often it was drawn by now."""
        path = write_report(plan, Store(tmp_path / "store"), rows, RUN, tmp_path)["pareto.png"]
        with Image.open(path) as picture:
            picture.load()  # whole, its checksums too
        return len(drawn)

    assert again(rows) == again(rows) == 1
    assert again([{**row, "run_id": "another", "reused": True} for row in rows]) == 1
    better = [{**row, "metrics": {**row["metrics"], "perplexity_ratio": 1.01}} for row in rows]
    assert again(better) == again(better) == 2
    (tmp_path / "pareto.png").write_bytes((tmp_path / "pareto.png").read_bytes()[:50])  # as a full disk may leave it
    assert again(better) == 3
    (tmp_path / "pareto.png").unlink()
    assert again(better) == 4
    monkeypatch.setattr(redrawn, "_drawn_by", lambda: "another version")
    assert again(better) == 5
    assert [path.name for path in tmp_path.glob("*.png")] == ["pareto.png"] and not list(tmp_path.glob(".*"))


def test_answer_ends_with_the_commands_that_come_next(plan: Plan, rows: list[dict[str, Any]]) -> None:
    text = answer(plan, rows, RUN, ["browse:   make ui"])
    assert text.endswith("browse:   make ui")
    assert "best path: trial-01" in text


def test_tables_without_rows_have_their_columns() -> None:
    assert list(table([], "128", columns=("ratio", "hit")).columns) == ["row", "ratio", "hit"]
    assert list(lead_table([], "128", Report(columns=("swapped", "layers", "ratio"))).columns) == [
        "swapped", "layers", "ratio", "stage",
    ]  # fmt: skip
