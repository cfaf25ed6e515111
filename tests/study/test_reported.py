"""`report:` of a study file: what it may name, what is said of the rest, and that no stage depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.record.answer import frames
from orchestrator.record.records import make_records
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.reported import COLUMNS, Report
from tests.record.handmade import Hand

BASE = "study: s\nrecipe: {phases: [{tokens: 9, losses: {ce: 1.0}}]}\n"


def report_of(folder: Path, line: str) -> Report:
    (folder / "study.yaml").write_text(f"{BASE}report: {line}\n", encoding="utf-8")
    return validate(read_document(folder / "study.yaml", ())).report


def test_columns_and_order_are_those_of_the_file(tmp_path: Path) -> None:
    assert report_of(tmp_path, "{sort: decode, columns: [hit, ratio]}") == Report(
        sort="decode", columns=("hit", "ratio")
    )
    assert report_of(tmp_path, "{}") == Report(sort=None, columns=None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{sort: hits}", "3:10: report.sort: unknown column hits; did you mean hit?"),
        ("{columns: [ratio, foo]}", f"report.columns.1: unknown column foo; there are {', '.join(COLUMNS)}"),
        ("{columns: [ratio, hit, ratio]}", "report.columns: columns names ratio more than once: name each column once"),
        ("{columns: ratio}", 'report.columns: must be a list, got "ratio"'),
        ("{columns: []}", "report.columns: must have at least 1 item"),
        ("{order: hit}", "report.order: unknown key; allowed here: sort, columns"),
    ],
)
def test_what_it_cannot_be_is_said_with_the_remedy(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(StudyError) as error:
        report_of(tmp_path, line)
    assert told in str(error.value)


def test_no_stage_depends_on_it(tmp_path: Path) -> None:
    hands = []
    for name, override in (("plain", "seed=0"), ("other", "report.sort=decode")):
        (tmp_path / name).mkdir()
        hands.append(Hand(tmp_path / name, override))
    assert hands[0].plan.specs.keys() == hands[1].plan.specs.keys()
    assert hands[0].speeds == hands[1].speeds


def test_every_column_can_be_told(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    hand.all_done()
    row = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)[-1]
    told = {name: frames.cell(row, name, "32") for name in COLUMNS}
    assert told == {
        "swapped": "2/2", "layers": "0-1", "seeds": "-", "tokens": "640", "perplexity": "8.96", "ratio": "1.120",
        "agree": "0.670", "hit": "1.680", "miss": "2.800", "copied": "0.45", "greedy": "4.48", "sampled": "13.44",
        "kl": "0.120", "prefill": "1.60x", "decode": "1.90x", "train": "0.80x",
    }  # fmt: skip
    assert set(frames.COLUMNS) | set(frames.NARROW) | set(frames.LEAD) <= set(COLUMNS)
