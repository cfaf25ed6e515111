"""The report of a store with known numbers: each table, the picture's points, the files and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from orchestrator.record.answer import verdict as sentences
from orchestrator.record.answer.frames import table
from orchestrator.record.answer.markdown import markdown, pipe_table
from orchestrator.record.answer.report import write_report
from orchestrator.record.answer.speed_table import LEGEND as SPEED_LEGEND
from orchestrator.record.answer.speed_table import crossovers, measured_rows, speed_table
from orchestrator.record.answer.text import answer, text_table
from orchestrator.record.answer.verdict import resources, verdict
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
    "hyena-2). How far seeds alone move a number was not measured. Trained from scratch the same operator reaches "
    "4.000. Layers by what leaving their attention out costs, cheapest first (perplexity ratio): 1 (1.25), 0 (1.50)."
)
COST = "cost: 1.5 min, 2 stages trained, 3 reused, peak memory of all processes 1.50 GB, disk 0.75 GB"
CONTROLS = ["teacher", "scratch hyena-2", "skip 0", "skip 1", "skip all"]
PATH = ["trial-00 stage 1", "trial-00 stage 2", "trial-00 joint"]
ENDS = {  # best first
    "trial-00 losses=kl:1.0": "trial-00 joint",
    "trial-02 operator=hyena-2h": "trial-02 joint",
    "trial-01 losses=kl:1.0,ce:0.5": "trial-01 joint",
}


NARROW = (0, 1, 3, 4, 5, 10, 11)  # cells of the terminal's tables
LEAD = [
    ["swapped", "layers", "ratio", "hit", "decode", "prefill", "stage"],
    ["0/2", "-", "1.000", "1.500", "0.98x", "1.00x", "teacher"],
    [*["1/2", "0", "1.050", "1.575", "1.20x", "1.10x"], "trial-00 stage 1 losses=kl:1.0"],
    [*["2/2", "0-1", "1.100", "1.650", "2.00x", "1.50x"], "trial-00 joint losses=kl:1.0"],
]
KNEE = (
    "knee: trial-00 joint losses=kl:1.0: 2 of 2 layers at 1.100 times the teacher's perplexity, prefill 1.50x, decode "
    "2.00x"
)


def lines(names: list[str] | dict[str, str]) -> list[list[str]]:
    """Head and rows of a table, cell by cell."""
    rows = names.items() if isinstance(names, dict) else zip(names, names, strict=True)
    return [HEAD.split(), *([shown, *CELLS[name].split()] for shown, name in rows)]


def piped(names: list[str] | dict[str, str]) -> str:
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines(names)]
    return "\n".join([head, "|---|" + "---:|" * 12, *rows])


def aligned(found: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Two spaces between columns, words flush left, numbers flush right, and a rule as wide as all of it."""
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    told = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in found
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([told[0].rstrip(), rule, *(line.rstrip() for line in told[1:])])


def narrow(names: list[str] | dict[str, str]) -> str:
    """A table of the terminal."""
    return aligned([[line[0], *(line[1:][i] for i in NARROW)] for line in lines(names)])


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
    legend = sentences.LEGEND.format(length="32", core="")
    assert "at 32 tokens, one sequence; the teacher's own row" in legend
    head, *rest = ["| " + " | ".join(line) + " |" for line in LEAD]
    assert markdown(hand.plan, rows, RUN, ["pareto.png", "speed.png", "curves.png"]).split("\n\n") == [
        "# handmade",
        "Which of two operators costs less?",
        "## Verdict",
        VERDICT,
        "## The best student for every number of swapped layers",
        "\n".join([head, "|---|" + "---:|" * 6, *rest]),
        KNEE,
        "## Teacher and controls",
        piped(CONTROLS),
        "## Every trial at its last stage",
        piped(ENDS),
        "## Best path: trial-00",
        "`losses=kl:1.0`",
        piped(PATH),
        "## Quality against speed and layers",
        "![Quality against speed and layers](pareto.png)",
        "Students that no other beats in quality and prefill:",
        piped(["trial-00 stage 1", "trial-00 joint", "trial-02 joint"]),
        "## Every stage",
        piped(stages),
        legend,
        "## Speed and memory by length",
        pipe_table(speed_table(measured_rows(rows))),  # see test_told_speeds
        SPEED_LEGEND,
        crossovers(measured_rows(rows)),
        "![Speed and memory by length](speed.png)",
        "## Training",
        "![Training curves by tokens, a panel a path](curves.png)",
        "## Cost",
        COST + "\n",
    ]


def test_the_answer_word_by_word(hand: Hand, rows: list[Record]) -> None:
    told = answer(hand.plan, rows, RUN, ["report:   there", "browse:   here"])
    best = {"trial-00 losses=kl:1.0": measured_rows(rows)["trial-00 losses=kl:1.0"]}
    assert told.split("\n\n") == [
        "Which of two operators costs less?",
        f"the best student for every number of swapped layers\n{aligned(LEAD, (0, 6))}\n{KNEE}",
        f"teacher and controls\n{narrow(CONTROLS)}",
        f"every trial at its last stage\n{narrow(ENDS)}\nbest path: trial-00 losses=kl:1.0",
        f"{text_table(speed_table(best))}\n{SPEED_LEGEND}\n{crossovers(best)}",
        sentences.LEGEND.format(length="32", core=""),
        COST,
        "report:   there\nbrowse:   here",
    ]


def test_a_study_names_what_matters(tmp_path: Path) -> None:
    """Its columns in its order, and lists by what it sorts by, the better first."""
    hand = Hand(tmp_path, "report={sort: decode, columns: [decode, hit, kl]}")
    hand.all_done()
    page = markdown(hand.plan, records_of(hand), {})
    begin = page.index("## Every trial at its last stage")
    assert page[begin:].split("\n\n")[1].splitlines() == [
        "| row | decode | hit | kl |",
        "|---|---:|---:|---:|",
        "| trial-00 losses=kl:1.0 | 2.00x | 1.650 | 0.100 |",
        "| trial-01 losses=kl:1.0,ce:0.5 | 2.00x | 1.725 | 0.150 |",
        "| trial-02 operator=hyena-2h | 1.90x | 1.680 | 0.120 |",
    ]
    assert "| swapped | layers | decode | hit | kl | stage |\n" in page
    assert "swapped  layers  decode    hit     kl  stage\n" in answer(hand.plan, records_of(hand), {}, [])
    del (rows := records_of(hand))[-1]["metrics"]["decode_ratio"]
    last = markdown(hand.plan, rows, {}).split("## Every stage")[1].split("\n\n")[1].splitlines()[-1]
    assert last == "| trial-02 joint | - | 1.680 | 0.120 |"  # what was not measured comes last


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("ratio", "trial-00"),
        ("prefill", "trial-02"),
        ("sampled", "trial-00"),
        ("agree", "trial-00"),
        ("layers", "trial-00"),
    ],
)
def test_the_better_comes_first(tmp_path: Path, sort: str, first: str) -> None:
    hand = Hand(tmp_path, f"report.sort={sort}")
    hand.all_done()
    page = markdown(hand.plan, records_of(hand), {}).split("## Every trial at its last stage")[1]
    assert page.splitlines()[4].startswith(f"| {first}")


def test_a_beginning_is_told_without_what_is_not_there(hand: Hand) -> None:
    hand.finish("teacher", "heads 0")
    records = records_of(hand)
    page = markdown(hand.plan, records, {})
    assert "## Verdict\n\nNo student is finished yet.\n\n" in page
    assert "## Best path" not in page and "cost:" not in page
    told = answer(hand.plan, records, {}, [])
    assert "best path" not in told and "trial-02 operator=hyena-2h" in told
    assert [line for line in told.splitlines() if line.startswith("0/2")] == [
        "0/2           -  1.000  1.500       -        -  teacher"
    ]


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
    paths = write_report(hand.plan, hand.store, rows, RUN, folder)
    files = ["report.html", "report.md", "records.json", "records.csv", "pareto.png", "speed.png", "curves.png"]
    assert paths == {name: folder / name for name in files}
    assert json.loads(paths["records.json"].read_text()) == {"study": "handmade", "run": RUN, "records": rows}
    assert paths["report.md"].read_text() == markdown(hand.plan, rows, RUN, files)
    frame = pd.read_csv(paths["records.csv"])
    assert list(frame.columns) == [
        "kind", "name", "trial", "group", "seed",
        "stage_index", "stage_count", "outcome", "last", "operator", "swapped_layers", "total_layers", "words",
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
        "outcome": "kept", "last": True,
        "operator": "hyena-2", "swapped_layers": "[0, 1]", "total_layers": 2, "words": "losses=kl:1.0,ce:0.5",
        "stage_key": hand.key("two mixed"), "run_id": "run", "reused": True, "metrics.accuracy": 0.375,
        "metrics.agreement": 0.75 / 1.15, "metrics.generation_agreement": 0.5 / 1.15, "metrics.hit_nll": 1.725,
        "metrics.greedy_generation_perplexity": 4.6, "metrics.sampled_generation_perplexity": 13.8,
        "metrics.kl": 0.15, "metrics.miss_nll": 2.875, "metrics.parameters": 6_000, "metrics.perplexity": 9.2,
        "metrics.perplexity_ratio": 1.15, "metrics.student_tokens": 640, "metrics.core": "torch",
        "metrics.decode_ratio.16": 1.0, "metrics.decode_ratio.32": 2.0, "metrics.prefill_ratio.16": 0.75,
        "metrics.prefill_ratio.32": 1.5, "metrics.train_ratio": 0.8, "metrics.stage_tokens_per_s": 40.0,
        "metrics.stage_seconds": 8.0, "joint": True,
        "group": "trial-01", "seed": 0.0, "values.recipe.joint.0.losses.kl": 1.0,
        "values.recipe.joint.0.losses.ce": 0.5,
    })  # fmt: skip


def test_a_report_without_students_has_no_picture(hand: Hand, tmp_path: Path) -> None:
    hand.finish("teacher")
    assert sorted(write_report(hand.plan, hand.store, records_of(hand), {}, tmp_path / "report")) == [
        "records.csv", "records.json", "report.html", "report.md"
    ]  # fmt: skip
    assert not (tmp_path / "report" / "pareto.png").exists()
