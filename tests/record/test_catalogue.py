"""The list of a home's studies, one in full and two side by side, against what was written down by hand."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.record.catalogue import by_layers, differences, listed, shared_stages, shown, summarise, table
from orchestrator.record.home import Home
from orchestrator.record.records import make_records
from orchestrator.record.remembered import variant_of
from tests.record.handmade import START, Hand
from tests.record.test_remembered import WHO, other, remembered


def call(hand: Hand, *words: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, words), "--home", str(hand.home.root)])
    assert done.exit_code == code, done.output
    return done


def test_a_list_tells_of_every_variant_newest_first(hand: Hand, tmp_path: Path) -> None:
    hand.all_done()
    mine, seeded = variant_of(hand.home, hand.plan), remembered(other(hand, tmp_path, "seed=1"), START)
    mine.remember(hand.asked, set())
    for minutes, status in ((3, "interrupted"), (4.5, "finished")):
        with mine.running(WHO) as run:
            run.tell(started=START + 60.0, seconds=60.0 * minutes, status=status)
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    summarise(mine, rows, (11, 12), 512.0)
    day = [time.strftime("%Y-%m-%d %H:%M", time.localtime(START + after)) for after in (60.0, 0.0)]
    assert [list(row.values()) for row in listed(hand.home)] == [
        [mine.title, day[0], "finished", "2", "11/12", "1.100 at 2/2", "7.5 min", "0.50 GB"],
        [seeded.title, day[1], "interrupted", "1", "-", "-", "0.0 min", "-"],
    ]
    assert mine.title in call(hand, "list").stdout


def test_an_empty_home_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["list", "--home", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, f"nothing was run in {tmp_path} yet\n")
    assert listed(Home(tmp_path)) == []


def test_a_study_is_shown_with_its_runs(hand: Hand) -> None:
    variant = variant_of(hand.home, hand.plan)
    variant.remember(hand.asked, set())
    with variant.running(WHO) as run:
        run.tell(seconds=90.0, status="failed", failures={"trial-00": "NonFiniteLoss"}, trained=["a"], reused=3)
    told = shown(variant).splitlines()
    assert told[0] == f"{variant.title}: Which of two operators costs less?"
    assert f"file:     {hand.file}" in told and "device:   cpu, test" in told
    assert told[6].startswith("run 1: failed, ") and told[6].endswith(", 1.5 min")
    assert told[7:] == [
        "  layerswap run s.yaml", "  by ada on there, commit abc", "  Python 3.11, torch 2",
        "  1 stages trained, 3 reused, peak memory 0.00 GB", "  failed: trial-00: NonFiniteLoss",
    ]  # fmt: skip
    assert call(hand, "show", "handmade").stdout == shown(variant) + "\n"


def test_two_studies_differ_in_what_is_told(hand: Hand, tmp_path: Path) -> None:
    mine = remembered(hand)
    theirs = remembered(other(hand, tmp_path, "recipe.batch_size=4", "numerics.threads=2"), 2.0)
    assert differences(mine, theirs) == [
        {"value": "recipe.batch_size", "A": "2", "B": "4"},
        {"value": "numerics.threads", "A": "-", "B": "2"},
    ]
    shared, of_mine, of_theirs = shared_stages(mine, theirs)
    assert shared == len(mine.needed() & theirs.needed()) > 0
    assert (of_mine, of_theirs) == (len(mine.needed()), len(theirs.needed()))


def test_the_best_students_by_layers_stand_side_by_side(hand: Hand) -> None:
    hand.all_done()
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    one_layer = [row for row in rows if len(row["swapped_layers"]) < 2]
    assert by_layers(rows, one_layer) == [
        {"swapped": "1", "ratio A": "1.050", "ratio B": "1.050", "hit A": "1.575", "hit B": "1.575",
         "agree A": "0.714", "agree B": "0.714"},
        {"swapped": "2", "ratio A": "1.100", "ratio B": "-", "hit A": "1.650", "hit B": "-",
         "agree A": "0.682", "agree B": "-"},
    ]  # fmt: skip


def test_a_table_is_aligned() -> None:
    assert table([{"name": "a", "count": "10"}, {"name": "long", "count": "9"}]).splitlines() == [
        "name  count",
        "-----------",
        "a        10",
        "long      9",
    ]


def test_compare_tells_all_three(hand: Hand, tmp_path: Path) -> None:
    hand.all_done()
    mine, theirs = remembered(hand), remembered(other(hand, tmp_path, "recipe.batch_size=4"), 2.0)
    told = call(hand, "compare", mine.title, theirs.title).stdout
    assert "recipe.batch_size" in told and "stages are shared" in told and "1.050" in told
    same = call(hand, "compare", mine.title, hand.file, code=2).stderr
    assert same.endswith(f"are one study, {mine.title}: `layerswap list` names the others\n")


@pytest.mark.parametrize("words", [("show", "x"), ("compare", "x", "y")])
def test_what_was_not_run_is_told(hand: Hand, words: tuple[str, ...]) -> None:
    remembered(hand)
    assert call(hand, *words, code=2).stderr.startswith("x: no study file, and no study of ")
