"""Regret by hand: three layers, two seeds, every number of the tables worked out beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.files import read_json
from orchestrator.record.answer.regret_table import LEGEND, count_table, error_text, row_table, way_table
from orchestrator.record.choices import Cost
from orchestrator.record.regret import Judged, Truth, Way, best, judge, usual_ways
from orchestrator.record.regretting import judged, truth_of, ways_of
from orchestrator.record.remembered import Asked, variant_of
from orchestrator.study.plan import Plan
from tests.record.chosen import FOUR, Chosen
from tests.record.handmade import asked, quality

RATIOS = {
    (0,): {0: 1.02, 1: 1.05}, (1,): {0: 1.00, 1: 1.05}, (2,): {0: 1.01, 1: 1.03},
    (0, 1): {0: 1.10, 1: 1.12}, (0, 2): {0: 1.08, 1: 1.06}, (1, 2): {0: 1.05, 1: 1.07},
    (0, 1, 2): {0: 1.2, 1: 1.2},
}  # fmt: skip
TRUTH = Truth(RATIOS, {layers: {seed: 2 * ratio for seed, ratio in each.items()} for layers, each in RATIOS.items()})
WAY = Way("by hand", {1: ((0,),), 2: ((0, 2),), 3: ((0, 1, 2),)}, (0.5, 0.25, 1.0), Cost(3, 160, 320, 12.5))


@pytest.fixture
def told() -> Judged:
    return judge(WAY, TRUTH)


def near(*numbers: float) -> object:
    return pytest.approx(numbers, abs=1e-12)


def test_the_best_set_has_the_lowest_mean_over_seeds() -> None:
    assert [best(RATIOS, count) for count in (1, 2, 3)] == [(2,), (1, 2), (0, 1, 2)]  # (1,) is lower on seed 0 alone


def test_every_number_of_a_row(told: Judged) -> None:
    one, two, three = told.rows
    assert one.ratio == near(1.035, 0.015)  # .03 apart: a standard error of half of it
    assert one.regret == near(0.015, 0.005)  # .01 and .02 more than (2,)
    assert one.held_out == near(0.005, 0.005)  # .01 more than (2,), best on seed 1; 0 more than (1,), best on seed 0
    assert one.hits == near(0.03, 0.01)
    assert (one.tie, one.rank, one.among) == (False, 3, 3)
    assert two.regret == near(0.01, 0.02) and two.held_out == near(-0.005, 0.005)  # .03 and -.01; 0 and -.01
    assert (two.tie, two.rank, two.among) == (True, 2, 3)
    assert three.regret == near(0.0, 0.0) and (three.tie, three.rank, three.among) == (False, 1, 1)


def test_means_are_over_numbers_of_layers_that_have_several_sets(told: Judged) -> None:
    assert told.regret == near(0.0125, 0.0075)  # of seeds .02 and .005
    assert told.held_out == near(0.0, 0.005)
    assert told.hits == near(0.025, 0.015)


def test_the_tables(told: Judged) -> None:
    assert way_table([told]).to_numpy().tolist() == [
        ["by hand", "0.0125 ± 0.0075", "0.0000 ± 0.0050", "0.0250 ± 0.0150", "2", "0.50 [0.25, 1.00]", "3", "160",
         "320", "12"],
    ]  # fmt: skip
    assert count_table([told]).to_numpy().tolist() == [["by hand", "0.0150 3/3", "0.0100~ 2/3"]]
    assert row_table([told]).to_numpy().tolist()[1] == [
        "by hand", "2", "0,2", "1.0700 ± 0.0100", "0.0100 ± 0.0200 ~", "-0.0050 ± 0.0050", "0.0200 ± 0.0400", "2/3",
    ]  # fmt: skip
    assert [error_text(each) for each in (None, (0.5, None), (0.5, 0.25))] == ["-", "0.5000", "0.5000 ± 0.2500"]


def test_several_sets_side_by_side_are_told_by_their_means() -> None:
    row = judge(Way("two", {1: ((0,), (1,))}), TRUTH).rows[0]
    assert row.ratio == near(1.03, 0.02) and row.rank == 2.5  # of 1.01 and 1.05; third and second
    assert row.regret == near(0.01, 0.01)  # 0 and .02


def test_a_single_seed_has_no_errors_and_holds_nothing_out() -> None:
    one = {layers: {0: each[0]} for layers, each in RATIOS.items()}
    found = judge(WAY, Truth(one, one))
    assert (found.rows[0].regret[1], found.rows[0].held_out, found.held_out, found.rows[0].tie) == (
        None,
        None,
        None,
        False,
    )
    assert found.regret is not None and found.regret == (pytest.approx(0.025), None)  # .02 and .03


def test_sets_that_the_truth_lacks_are_missing_and_not_judged() -> None:
    less = Truth(*({k: v for k, v in each.items() if k != (0, 2)} for each in (TRUTH.ratios, TRUTH.hits)))
    found = judge(WAY, less)
    assert found.missing == ((0, 2),) and [row.count for row in found.rows] == [1, 3]


def test_ways_that_need_no_stages() -> None:
    ways = {
        way.name: way.sets for way in usual_ways((0, 1, 2, 3, 4, 5), {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0, 4: 9.0, 5: 4.0})
    }
    assert [sets[0] for sets in ways["uniform"].values()] == [
        (3,), (1, 4), (1, 3, 5), (0, 2, 3, 5), (0, 1, 3, 4, 5), (0, 1, 2, 3, 4, 5),
    ]  # fmt: skip
    assert (ways["bottom_up"][2], ways["top_down"][2], ways["exact"][3]) == (((0, 1),), ((4, 5),), ((1, 2, 3),))
    drawn = ways["random x5"]
    assert all(len(sets) == 5 and all(len(each) == count for each in sets) for count, sets in drawn.items())
    assert all(set(drawn[2][index]) < set(drawn[3][index]) for index in range(5))
    assert len(set(drawn[3])) > 1 and drawn == {w.name: w.sets for w in usual_ways((0, 1, 2, 3, 4, 5))}["random x5"]


class Truthful(Chosen):
    """The home of choices, and in it a study that has the sets of one and two of four layers, two seeds each."""

    SETS = ([[0]], [[1]], [[2]], [[3]], [[0, 1]], [[0, 2]], [[2, 3]])

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        space = f"search.space={{seed: [0, 1], schedule.layer_order: {[*self.SETS]}}}"
        self.truth = asked(root, "study=sets", "recipe.phases.0.tokens=320", space, *FOUR)
        self.sets = self.remember(self.truth)
        self.remember(self.asked)

    def remember(self, study: Asked) -> Plan:
        """Let a study have been run in the home."""
        plan: Plan = study.growing(self.store).plan
        variant_of(self.home, plan).remember(study, set(plan.specs))
        return plan

    def measure_sets(self) -> None:
        for trial in self.sets.trials:
            [step] = trial.steps
            self.write(step.train, {"seconds": 4.0})
            self.write(step.evaluate, quality(1.0 + 0.01 * sum(step.swapped) + 0.1 * len(step.swapped)))


@pytest.fixture
def hand(tmp_path: Path) -> Truthful:
    made = Truthful(tmp_path)
    made.everything()
    return made


def test_the_ways_of_a_study_are_what_its_trials_came_to(hand: Truthful) -> None:
    first, gated, joint, _ = ways_of(hand.plan, hand.store)
    assert first.name == "by hits, every stage, until 2 layers"
    assert first.sets == {1: ((2,),), 2: ((0, 2),)} and first.tau == (0.75, 0.5, 1.0)
    assert first.cost == Cost(scores=7, trained=0, read=8 * 64, seconds=10 * 0.5)  # the teacher is read once
    assert gated.sets == {1: ((2,),)}  # what was given back is no set that it came to
    assert joint.sets == {1: ((3,),)} and joint.cost == Cost(0, 160, 0, 1.0)


def test_what_the_truth_has_and_what_it_lacks_is_told(hand: Truthful) -> None:
    with pytest.raises(ValueError, match="--truth sets: no set of layers is finished"):
        truth_of(hand.sets, hand.store)
    hand.measure_sets()
    truth = truth_of(hand.sets, hand.store)
    assert truth.layers == (0, 1, 2, 3) and truth.sets(2) == [(0, 1), (0, 2), (2, 3)]
    assert truth.ratios[2, 3] == pytest.approx({0: 1.25, 1: 1.25})
    found, notes = judged(hand.plan, truth, hand.store, "sets")
    assert [row.regret[0] for row in found[0].rows] == pytest.approx([0.02, 0.01])  # of (2,) and of (0, 2)
    partly = [(3, 6, 2), (0, 4, 3), (0, 1, 4)]
    assert notes == [f"sets has {there} of the {every} sets of {count} layers" for there, every, count in partly]


def test_the_command_prints_writes_and_says_what_is_missing(
    hand: Truthful, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["regret", "handmade", "--truth", "sets", "--home", "home"]
    none = CliRunner().invoke(app, words)
    assert none.exit_code == 2 and "no set of layers is finished" in none.output
    hand.measure_sets()
    done = CliRunner().invoke(app, [*words, "--json", "regret.json"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    rows = [line.split()[-4:] for line in lines if line.startswith("by hits")]
    assert rows == [["2", "0.75", "[0.50,", "1.00]"], ["0.0200", "3/4", "0.0100", "2/3"], ["7", "0", "512", "5"]]
    assert "by hits, every stage, until 2 layers  0.0150 ± 0.0000" in done.output  # a mean of .02 and .01
    assert max(map(len, lines[1 : lines.index(LEGEND.splitlines()[0])])) <= 110
    assert "note: sets has 3 of the 6 sets of 2 layers" in done.output
    told = read_json(tmp_path / "regret.json")
    alone = CliRunner().invoke(app, [*words, "--json", "-"])
    assert json.loads(alone.stdout) == told and not (tmp_path / "-").exists()
    assert told["ways"][0]["regret"] == pytest.approx([0.015, 0.0]) and told["truth"] == "sets"
    page = tmp_path / done.stdout.splitlines()[-1].removeprefix("regret:").strip()
    assert "| by hits, every stage, until 2 layers | 2 | 0,2 | 1.2200 ± 0.0000 |" in page.read_text()
    assert page.with_name("regret.png").stat().st_size > 10_000


def test_a_truth_of_other_sets_or_of_another_teacher_is_bad_input(
    hand: Truthful, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hand.measure_sets()
    words = ["regret", "handmade", "--home", "home", "--truth"]
    hand.remember(asked(tmp_path, "study=other", "teacher.tokens=3_200", "search.space={seed: [0, 1]}", *FOUR))
    done = CliRunner().invoke(app, [*words, "other"])
    assert done.exit_code == 2 and "--truth other has another teacher than handmade" in done.output
    for trial in hand.sets.trials:
        if trial.steps[0].swapped not in ((0,), (1,)):
            (hand.store.folder(trial.steps[0].evaluate.key) / "DONE.json").unlink()
    done = CliRunner().invoke(app, [*words, "sets"])
    assert done.exit_code == 2 and "sets has none of the sets that handmade comes to" in done.output
    assert "sets lacks layers 2: add [[2]] to its schedule.layer_order, and run it" in done.output
