"""The report of a store with known numbers: each table, the picture's points, the files and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from orchestrator.record.answer import report
from orchestrator.record.answer.report import answer, draw_pareto, markdown, resources, table, verdict, write_report
from orchestrator.record.answer.speed_table import crossovers, measured_rows, speed_table
from orchestrator.record.records import Record, make_records
from tests.record.handmade import Hand

RUN = {"seconds": 90.0, "trained": ["a", "b"], "reused": 3, "peak_rss_mb": 1_536.0, "disk_mb": 768.0}
HEAD = "row swapped tokens perplexity ratio agree hit miss copied greedy sampled prefill decode"
CELLS = {  # of the table, by the row's name: 8, 1.5 and 2.5 times the ratio, 0.75 and 0.5 over it, 4 and 12 times it
    "teacher": "0/2 0 8.00 1.000 0.750 1.500 2.500 0.50 4.00 12.00 1.00x 0.98x",
    "scratch hyena-2": "2/2 640 32.00 4.000 0.188 6.000 10.000 0.12 16.00 48.00 1.50x 2.00x",
    "skip 0": "1/2 0 12.00 1.500 0.500 2.250 3.750 0.33 6.00 18.00 1.20x 1.25x",
    "skip 1": "1/2 0 10.00 1.250 0.600 1.875 3.125 0.40 5.00 15.00 1.20x 1.25x",
    "skip all": "2/2 0 64.00 8.000 0.094 12.000 20.000 0.06 32.00 96.00 2.00x 2.50x",
    "trial-00 stage 1": "1/2 160 8.40 1.050 0.714 1.575 2.625 0.48 4.20 12.60 1.10x 1.20x",
    "trial-00 stage 2": "2/2 320 10.00 1.250 0.600 1.875 3.125 0.40 5.00 15.00 1.50x 2.00x",
    "trial-00 joint": "2/2 640 8.80 1.100 0.682 1.650 2.750 0.45 4.40 13.20 1.50x 2.00x",
    "trial-01 joint": "2/2 640 9.20 1.150 0.652 1.725 2.875 0.43 4.60 13.80 1.50x 2.00x",
    "trial-02 stage 1": "1/2 160 9.60 1.200 0.625 1.800 3.000 0.42 4.80 14.40 1.30x 1.30x",
    "trial-02 stage 2": "2/2 320 10.40 1.300 0.577 1.950 3.250 0.38 5.20 15.60 1.60x 1.90x",
    "trial-02 joint": "2/2 640 8.96 1.120 0.670 1.680 2.800 0.45 4.48 13.44 1.60x 1.90x",
}
CELLS |= {f"trial-01 stage {n}": CELLS[f"trial-00 stage {n}"] for n in (1, 2)}
VERDICT = (
    "The best student swaps 2 of 2 layers at 1.100 times the teacher's perplexity after 640 tokens (trial-00, "
    "hyena-2). Trained from scratch the same operator reaches 4.000. Layers by what leaving their attention out costs, "
    "cheapest first (perplexity ratio): 1 (1.25), 0 (1.50)."
)
COST = "cost: 1.5 min, 2 stages trained, 3 reused, peak memory of all processes 1.50 GB, disk 0.75 GB"
CONTROLS = ["teacher", "scratch hyena-2", "skip 0", "skip 1", "skip all"]
PATH = ["trial-00 stage 1", "trial-00 stage 2", "trial-00 joint"]
ENDS = {  # best first
    "trial-00 losses=kl:1.0": "trial-00 joint",
    "trial-02 operator=hyena-2h": "trial-02 joint",
    "trial-01 losses=kl:1.0,ce:0.5": "trial-01 joint",
}


def lines(names: list[str] | dict[str, str]) -> list[list[str]]:
    """Head and rows of a table, cell by cell."""
    rows = names.items() if isinstance(names, dict) else zip(names, names, strict=True)
    return [HEAD.split(), *([shown, *CELLS[name].split()] for shown, name in rows)]


def piped(names: list[str] | dict[str, str]) -> str:
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines(names)]
    return "\n".join([head, "|---|" + "---:|" * 12, *rows])


def aligned(names: list[str] | dict[str, str]) -> str:
    """Two spaces between columns, the first flush left, the numbers flush right, and a rule as wide as the head."""
    found = lines(names)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    told = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in found
    ]
    return "\n".join([told[0], "-" * (sum(widths) + 24), *told[1:]])


def records_of(hand: Hand) -> list[Record]:
    return make_records(hand.plan, hand.store, hand.speeds, {hand.key("two 0")}, lambda _: "run")


@pytest.fixture
def rows(hand: Hand) -> list[Record]:
    hand.all_done()
    return records_of(hand)


def test_the_table_is_the_measured_numbers(rows: list[Record]) -> None:
    frame = table(rows, "32")
    stages = [f"trial-0{trial} {stage}" for trial in range(3) for stage in ("stage 1", "stage 2", "joint")]
    assert [list(frame.columns), *frame.to_numpy().tolist()] == lines([*CONTROLS, *stages])
    assert table(rows, "16")["prefill"][0] == "0.50x"  # of another length


def test_what_was_not_measured_is_a_dash(hand: Hand) -> None:
    hand.finish("heads 0")
    [row] = records_of(hand)
    for name in ("hit_nll", "miss_nll", *(name for name in row["metrics"] if "generation_" in name)):
        del row["metrics"][name]
    assert table([row], "32").to_numpy().tolist() == [
        ["trial-02 stage 1", "1/2", "160", "9.60", "1.200", "0.625", *["-"] * 7]
    ]


def test_thousands_of_tokens_are_set_apart(rows: list[Record]) -> None:
    rows[0]["metrics"]["student_tokens"] = 1_234_567
    assert table(rows[:1], "32")["tokens"][0] == "1,234,567"


def test_the_page_word_by_word(hand: Hand, rows: list[Record]) -> None:
    stages = [f"trial-0{trial} {stage}" for trial in range(3) for stage in ("stage 1", "stage 2", "joint")]
    legend = report.LEGEND.format(length="32", core="")
    assert "at 32 tokens, one sequence; the teacher's own row" in legend
    assert markdown(hand.plan, rows, RUN).split("\n\n") == [
        "# handmade",
        "Which of two operators costs less?",
        "## Verdict",
        VERDICT,
        "## Teacher and controls",
        piped(CONTROLS),
        "## Best path: trial-00",
        "`losses=kl:1.0`",
        piped(PATH),
        "## Every trial at its last stage",
        piped(ENDS),
        "## Quality against speed",
        "![Pareto picture](pareto.png)",
        piped(["trial-00 stage 1", "trial-00 joint", "trial-02 joint"]),
        "## Every stage",
        piped(stages),
        legend,
        "## Speed and memory by length",
        report.pipe_table(speed_table(measured_rows(rows))),  # see test_told_speeds
        report.SPEED_LEGEND,
        crossovers(measured_rows(rows)),
        "![Speed and memory by length](speed.png)",
        "## Cost",
        COST + "\n",
    ]


def test_the_answer_word_by_word(hand: Hand, rows: list[Record]) -> None:
    told = answer(hand.plan, rows, RUN, ["report:   there", "browse:   here"])
    best = {"trial-00 losses=kl:1.0": measured_rows(rows)["trial-00 losses=kl:1.0"]}
    assert told.split("\n\n") == [
        "Which of two operators costs less?",
        aligned(CONTROLS),
        "best path: trial-00 losses=kl:1.0\n" + aligned(PATH),
        aligned(ENDS),
        f"{report.text_table(speed_table(best))}\n{report.SPEED_LEGEND}\n{crossovers(best)}",
        report.LEGEND.format(length="32", core=""),
        COST,
        "report:   there\nbrowse:   here",
    ]


def test_a_beginning_is_told_without_what_is_not_there(hand: Hand) -> None:
    hand.finish("teacher", "heads 0")
    records = records_of(hand)
    page = markdown(hand.plan, records, {})
    assert "## Verdict\n\nNo student is finished yet.\n\n" in page
    assert "## Best path" not in page and "cost:" not in page
    told = answer(hand.plan, records, {}, [])
    assert "best path" not in told and "trial-02" not in told  # one trial alone is no comparison
    assert told.count("teacher  ") == 1


def test_the_compiled_core_is_named_where_it_was_used(hand: Hand) -> None:
    hand.finish("two 0")
    hand.measure("two 0", core="native")
    assert "one sequence, students by the compiled core; the teacher's" in answer(hand.plan, records_of(hand), {}, [])


def test_a_study_without_a_question_is_told_by_its_name(tmp_path: Path) -> None:
    assert answer(Hand(tmp_path, 'question=""').plan, [], {}, []).startswith("handmade\n\n")


def test_the_verdict_says_what_is_known(rows: list[Record]) -> None:
    assert verdict(rows) == VERDICT
    students = [row for row in rows if row["kind"] == "stage"]
    first = VERDICT.split(" Trained")[0]
    assert verdict(students) == first
    other = [row | {"operator": "hyena-9"} if row["name"].startswith("scratch") else row for row in rows[:2]]
    assert verdict([*other, *students]) == first  # another operator's control says nothing about this one
    assert verdict(rows[:5]) == "No student is finished yet."


def test_what_a_run_cost_as_far_as_it_is_known() -> None:
    assert resources(RUN) == COST
    assert resources({"seconds": 30.0}) == "cost: 0.5 min"
    assert resources({"trained": [], "reused": 7, "peak_rss_mb": 0.0}) == "cost: 0 stages trained, 7 reused"
    assert resources({}) == ""


def test_files_have_every_number(hand: Hand, rows: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    paths = write_report(hand.plan, rows, RUN, folder)
    assert paths == {
        name: folder / name for name in ("report.md", "records.json", "records.csv", "pareto.png", "speed.png")
    }
    assert json.loads(paths["records.json"].read_text()) == {"study": "handmade", "run": RUN, "records": rows}
    assert paths["report.md"].read_text() == markdown(hand.plan, rows, RUN)
    frame = pd.read_csv(paths["records.csv"])
    assert list(frame.columns) == [
        "kind", "name", "trial", "stage_index", "stage_count", "operator", "swapped_layers", "total_layers", "words",
        "stage_key", "run_id", "reused", "metrics.accuracy", "metrics.agreement", "metrics.generation_agreement",
        "metrics.greedy_generation_perplexity", "metrics.hit_nll", "metrics.kl", "metrics.miss_nll",
        "metrics.parameters", "metrics.perplexity", "metrics.perplexity_ratio",
        "metrics.sampled_generation_perplexity", "metrics.student_tokens", "metrics.core", "metrics.decode_ratio.16",
        "metrics.decode_ratio.32", "metrics.prefill_ratio.16", "metrics.prefill_ratio.32", "metrics.train_ratio",
        "metrics.stage_tokens_per_s", "metrics.stage_seconds", "metrics.teacher_tokens", "joint",
        "values.recipe.joint.0.losses.kl", "values.recipe.joint.0.losses.ce", "values.operator.kind",
        "values.operator.heads",
    ]  # fmt: skip
    [last] = frame[frame["name"] == "trial-01 joint"].to_dict("records")
    known = {column: value for column, value in last.items() if value == value}  # what is not NaN
    assert known == pytest.approx({
        "kind": "stage", "name": "trial-01 joint", "trial": "trial-01", "stage_index": 2.0, "stage_count": 3.0,
        "operator": "hyena-2", "swapped_layers": "[0, 1]", "total_layers": 2, "words": "losses=kl:1.0,ce:0.5",
        "stage_key": hand.key("two mixed"), "run_id": "run", "reused": True, "metrics.accuracy": 0.375,
        "metrics.agreement": 0.75 / 1.15, "metrics.generation_agreement": 0.5 / 1.15, "metrics.hit_nll": 1.725,
        "metrics.greedy_generation_perplexity": 4.6, "metrics.sampled_generation_perplexity": 13.8,
        "metrics.kl": 0.15, "metrics.miss_nll": 2.875, "metrics.parameters": 6_000, "metrics.perplexity": 9.2,
        "metrics.perplexity_ratio": 1.15, "metrics.student_tokens": 640, "metrics.core": "torch",
        "metrics.decode_ratio.16": 1.0, "metrics.decode_ratio.32": 2.0, "metrics.prefill_ratio.16": 0.75,
        "metrics.prefill_ratio.32": 1.5, "metrics.train_ratio": 0.8, "metrics.stage_tokens_per_s": 40.0,
        "metrics.stage_seconds": 8.0, "joint": True, "values.recipe.joint.0.losses.kl": 1.0,
        "values.recipe.joint.0.losses.ce": 0.5,
    })  # fmt: skip


def test_a_report_without_speeds_has_no_picture(hand: Hand, tmp_path: Path) -> None:
    hand.finish("two 0")
    assert sorted(write_report(hand.plan, records_of(hand), {}, tmp_path)) == [
        "records.csv", "records.json", "report.md"
    ]  # fmt: skip
    assert not (tmp_path / "pareto.png").exists()


def points(artist: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in artist.get_offsets()]


def test_the_picture_has_every_student_at_its_speed_and_its_quality(
    hand: Hand, rows: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    close = report.plt.close
    monkeypatch.setattr(report.plt, "close", figures.append)
    assert draw_pareto(hand.plan, rows, tmp_path / "pareto.png")
    [figure] = figures
    close(figure)
    prefill, decode = figure.axes
    two, heads, scratch, teacher = prefill.collections
    first = [(1.1, 1.05), (1.5, 1.25)]
    assert points(two) == [*first, (1.5, 1.1), *first, (1.5, 1.15)]
    assert list(two.get_sizes()) == [43, 61, 61] * 2  # 25 and 18 more for a swapped layer
    assert points(heads) == [(1.3, 1.2), (1.6, 1.3), (1.6, 1.12)]
    assert points(scratch) == [(1.5, 4.0)]
    assert points(teacher) == [(1.0, 1.0)]
    labels = [artist.get_label() for artist in prefill.collections]
    assert labels == ["hyena-2", "hyena-2h", "from scratch", "teacher"]
    front, middle = prefill.lines
    assert front.get_xydata().tolist() == [[1.1, 1.05], [1.5, 1.1], [1.6, 1.12]]
    assert front.get_label() == "Pareto front"
    assert list(middle.get_xdata()) == [1, 1]
    assert [(text.get_text(), text.xy) for text in prefill.texts] == [
        ("1 swapped", (1.1, 1.05)), ("2 swapped", (1.5, 1.1))
    ]  # fmt: skip
    two, heads, scratch, _ = decode.collections
    assert points(two)[:3] == [(1.2, 1.05), (2.0, 1.25), (2.0, 1.1)]
    assert points(heads) == [(1.3, 1.2), (1.9, 1.3), (1.9, 1.12)]
    assert points(scratch) == [(2.0, 4.0)]
    assert decode.lines[0].get_xydata().tolist() == [[1.2, 1.05], [2.0, 1.1]]
    for axis, name in ((prefill, "prefill"), (decode, "decode")):
        assert axis.get_xlabel() == f"{name} speed over the teacher's at 32 tokens (right is faster)"
        assert axis.get_yscale() == "log"
        assert {f(1.256) for f in (axis.yaxis.get_major_formatter(), axis.yaxis.get_minor_formatter())} == {"1.26"}
    assert prefill.get_ylabel() == "perplexity over the teacher's (down is better)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "hyena-2", "hyena-2h", "Pareto front", "from scratch", "teacher"
    ]  # fmt: skip
    title = "handmade: every stage of every trial; larger dots swap more of 2 layers"
    assert figure.get_suptitle() == title
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
