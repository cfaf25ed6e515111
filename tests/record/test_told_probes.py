"""What is told of probes with known numbers: records, the terminal, MLflow, the table, the picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.answer import probe_table
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.probe_table import LEGEND, draw_probes, probed_rows
from orchestrator.record.answer.report import write_report
from orchestrator.record.answer.text import answer
from orchestrator.record.probe_results import probe_numbers, probe_result
from orchestrator.record.records import Record, make_records
from orchestrator.record.screen.plan_view import status_text
from orchestrator.record.screen.progress import Progress
from orchestrator.record.tracking.runs import Runs
from orchestrator.record.tracking.tracker import Tracker
from tests.record.handmade import Hand, probes, put

PROBED = ["teacher", "skip all", "two 0", "two 1", "two joint", "two mixed", "heads 0", "heads 1", "heads joint"]
REFUSED = {"refused": "teacher at chance"}
ROWS = {  # of the table: the teacher's numbers, then what 7, 0.05, 0.25, 0.1, 0.12 and 0.15 over a ratio of 1 make
    "teacher": "2.000 3.000 2.000 1.000 1.500 4.000 3.000 0.250 0.750",
    "skip all": "+7.000 +3.500 +14.000 +7.000 +7.000 +7.000 +21.000 at_chance 0.094",
    "trial-00 stage 1": "+0.050 +0.025 +0.100 +0.050 +0.050 +0.050 +0.150 at_chance 0.714",
    "trial-00 stage 2": "+0.250 +0.125 +0.500 +0.250 +0.250 +0.250 +0.750 at_chance 0.600",
    "trial-00 joint": "+0.100 +0.050 +0.200 +0.100 +0.100 +0.100 +0.300 at_chance 0.682",
    "trial-02 operator=hyena-2h": "+0.120 +0.060 +0.240 +0.120 +0.120 +0.120 +0.360 at_chance 0.670",
    "trial-01 losses=kl:1.0,ce:0.5": "+0.150 +0.075 +0.300 +0.150 +0.150 +0.150 +0.450 at_chance 0.652",
}
HEAD = ["row", "bits", "from 16", "from 32", "gap 1", "gap 128", "nll 8", "nll 64", "needle 8", "needle 64"]


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    """A study that asks for probes, in a home without a stage."""
    return Hand(tmp_path, "evaluation.probes={}")


def records_of(hand: Hand) -> list[Record]:
    return make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: "run")


@pytest.fixture
def rows(hand: Hand) -> list[Record]:
    hand.all_done()
    hand.probe(*PROBED)
    return records_of(hand)


def test_records_have_a_models_numbers_beside_its_teachers(rows: list[Record]) -> None:
    found = {row["name"]: row["probes"] for row in rows}
    assert found["teacher"] == probes(1.0)
    own = probes(1.15)
    assert found["trial-01 joint"] == {
        **own, "needle": {"8": REFUSED, "64": own["needle"]["64"]}, "teacher": probes(1.0),
    }  # fmt: skip
    assert [name for name, probed in found.items() if not probed] == ["scratch hyena-2", "skip 0", "skip 1"]


@pytest.mark.parametrize(
    ("accuracy", "error", "told"), [(0.25, 0.0625, False), (0.25, 0.062, True), (0.0, 0.0, False), (0.2, 0.0, True)]
)
def test_keys_are_not_told_within_two_errors_of_chance(hand: Hand, accuracy: float, error: float, told: bool) -> None:
    result = probes(1.0)
    result["needle"] = {"64": {**result["needle"]["64"], "accuracy": accuracy, "stderr": error}}
    step = hand.steps["two 0"]
    teacher, own = step.probed
    hand.write(teacher, result)
    hand.write(own, {**probes(1.05), "needle": {"64": probes(1.05)["needle"]["64"]}})
    found = probe_result(hand.store, step)["needle"]["64"]
    assert found == (probes(1.05)["needle"]["64"] if told else REFUSED)
    assert probe_result(hand.store, hand.steps["teacher"])["needle"]["64"]["accuracy"] == accuracy


def test_nothing_is_told_before_both_are_there_nor_of_what_is_damaged(hand: Hand) -> None:
    hand.probe("two 0")
    assert probe_result(hand.store, hand.steps["two 0"]) == {}
    hand.probe("teacher")
    assert probe_result(hand.store, hand.steps["two 0"])["bits_per_byte"] == pytest.approx(2.05)
    put(hand.store.folder(hand.steps["two 0"].probed[1].key) / "DONE.json", {"result": {}})
    assert probe_result(hand.store, hand.steps["two 0"]) == {}
    assert probe_numbers({}) == {}


def test_the_table_is_student_minus_teacher(rows: list[Record]) -> None:
    frame = probe_table.probe_table(probed_rows(rows))
    cells = [[name, *(cell.replace("_", " ") for cell in line.split())] for name, line in ROWS.items()]
    assert [list(frame.columns), *frame.to_numpy().tolist()] == [HEAD, *cells]


def test_what_one_row_lacks_is_a_dash(rows: list[Record]) -> None:
    del rows[-1]["probes"]["hit_nll"]["128"]
    frame = probe_table.probe_table({"one": rows[0]["probes"], "other": rows[-1]["probes"]})
    assert list(frame["gap 128"]) == ["1.500", "-"]


def test_report_and_terminal_have_the_table_where_there_is_one(hand: Hand, rows: list[Record], tmp_path: Path) -> None:
    page, told = markdown(hand.plan, rows, {}, ["probes.png"]), answer(hand.plan, rows, {}, [])
    row = "| trial-00 joint | +0.100 | +0.050 | +0.200 | +0.100 | +0.100 | +0.100 | +0.300 | at chance | 0.682 |"
    begin = page.index("## What perplexity hides\n\n| row | bits |")
    assert page.index("## Every stage") < begin < page.index(row) < page.index(LEGEND) < page.index("](probes.png)")
    assert told.count(LEGEND) == 1 and "at chance      0.682" in told
    assert sorted(write_report(hand.plan, hand.store, rows, {}, tmp_path / "report")) == [
        "curves.png", "pareto.png", "probes.png", "records.csv", "records.json", "report.html", "report.md",
        "speed.png",
    ]  # fmt: skip
    assert "trial-02 operator=hyena-2h  " not in told.split(" bits ")[1]  # of the best path alone
    without = [row | {"probes": {}} for row in rows]
    assert "perplexity hides" not in markdown(hand.plan, without, {})
    assert LEGEND not in answer(hand.plan, without, {}, [])
    alone = [row | {"probes": row["probes"] if row["kind"] == "teacher" else {}} for row in rows]
    assert "probes.png" not in markdown(hand.plan, alone, {}, ["probes.png"])
    assert not draw_probes("alone", probed_rows(alone), tmp_path / "probes.png")


def test_the_picture_is_apart_by_position_and_in_full_by_length(
    rows: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    close = probe_table.plt.close
    monkeypatch.setattr(probe_table.plt, "close", figures.append)
    assert draw_probes("handmade", probed_rows(rows), tmp_path / "probes.png")
    [figure] = figures
    close(figure)
    left, right = figure.axes
    names = list(ROWS)[2:]
    assert [line.get_label() for line in left.lines[:-1]] == names
    assert [line.get_label() for line in right.lines] == [*names, "teacher"]
    points = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    for found, wanted in zip(points["trial-00 joint"], [[1, 0.1], [16, 0.05], [32, 0.2]], strict=True):
        assert found == pytest.approx(wanted)
    points = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert points["teacher"] == [[8, 4.0], [64, 3.0]]
    for found, wanted in zip(points["trial-00 joint"], [[8, 4.1], [64, 3.3]], strict=True):
        assert found == pytest.approx(wanted)
    assert figure.get_suptitle() == "handmade: loss by position and by length"
    assert (tmp_path / "probes.png").read_bytes()[:4] == b"\x89PNG"


def test_mlflow_has_the_numbers_as_metrics_of_the_stages_run(hand: Hand, empty_database: Path) -> None:
    hand.all_done()
    hand.probe(*PROBED)
    shutil.copy(empty_database, hand.home.root / "mlflow.db")
    Tracker(hand.home, hand.plan, hand.speeds).finish({}, {}, {})
    runs = Runs(hand.home, "handmade", live=False)

    def metrics(name: str) -> dict[str, float]:
        found = runs.client.get_run(runs.ids[f"stage:{hand.key(name)}"]).data.metrics
        return {metric: value for metric, value in found.items() if metric.startswith("probes/")}

    assert metrics("two 1") == pytest.approx({
        "probes/bits_per_byte": 2.25, "probes/loss/position_1": 5.25, "probes/loss/position_16": 3.125,
        "probes/loss/position_32": 2.5, "probes/hit_nll/gap_1": 1.25, "probes/hit_nll/gap_128": 1.75,
        "probes/nll/8": 4.25, "probes/nll/64": 3.75, "probes/needle/64": 0.6, "probes/needle_margin/64": 1.75,
        "probes/needle_depth_0.1/64": 0.4, "probes/needle_depth_0.9/64": 0.8,
    })  # fmt: skip
    assert metrics("teacher")["probes/needle/8"] == 0.25  # its own is told
    assert metrics("skip 0") == {}
    status = {name: runs.status[run] for name, run in runs.ids.items()}
    assert set(status.values()) == {"FINISHED"}


@pytest.mark.parametrize("failed", [True, False])
def test_a_study_that_lacks_probes_is_not_finished(hand: Hand, empty_database: Path, failed: bool) -> None:
    hand.all_done()
    hand.probe(*PROBED[:-1])
    shutil.copy(empty_database, hand.home.root / "mlflow.db")
    if failed:
        _fail(hand, "heads joint")
    Tracker(hand.home, hand.plan, hand.speeds).finish({}, {}, {})
    runs = Runs(hand.home, "handmade", live=False)
    lacking = {"FAILED" if failed else "KILLED"}
    last = next(identity for identity in runs.ids if identity.startswith(f"trial:{hand.key('heads joint')}"))
    assert {runs.status[runs.ids[identity]] for identity in ("study", last)} == lacking


def _fail(hand: Hand, name: str) -> None:
    probed = hand.steps[name].probes
    assert probed is not None
    put(hand.store.folder(probed.key) / "failure.json", {"error": "ArithmeticError: probes gave no finite nll 64"})


def test_status_says_that_probes_failed(hand: Hand) -> None:
    hand.finish("skip all")
    _fail(hand, "skip all")
    line = next(line for line in status_text(hand.plan, hand.store).splitlines() if "control skip all" in line)
    assert line.endswith("ratio 8.000; probes failed: ArithmeticError: probes gave no finite nll 64")


def test_the_terminal_counts_models_that_are_probed(
    hand: Hand, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand.all_done()
    hand.probe("teacher")
    progress = Progress(hand.plan, hand.store, hand.speeds, 1)
    hand.probe("two 0", "two 1")
    progress.tick()
    told = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert told == ["probes 2 of 9 models", "probes 3 of 9 models"]
    assert progress._time_left(0.0) == "about 20 s left"  # six of three seconds
