"""Trials that differ in their seed alone are one student; what ranks them and what is a tie, by hand."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.answer.frames import cell, lead_table
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.text import answer
from orchestrator.record.answer.verdict import legend, tied, verdict
from orchestrator.record.choice import exported_stage, told_apart
from orchestrator.record.groups import best_by_layers, noise, seeds_range, students, ties
from orchestrator.record.records import Record, best_path, ends, make_records, pareto_front
from orchestrator.study.reported import Report
from tests.record.handmade import Hand, quality, speed

SPACE = (
    "search.space=[{seed: [0, 1, 2], recipe.joint.0.losses: [{kl: 1.0}]}, "
    "{seed: [0], recipe.joint.0.losses: [{ce: 1.0}]}]"
)
LUCKY = (1.25, 1.0, 1.29)  # last ratios of the seeds: the lowest of all, but the mean is 1.18
STEADY = 1.1


class Seeds(Hand):
    """The same study with three seeds of one point and one of another; `RATIOS` has the ratio of each last stage."""

    def __init__(self, root: Path, *ratios: float) -> None:
        super().__init__(root)
        from orchestrator.study.loader import read_document, validate
        from orchestrator.study.plan import make_plan, throughput_specs
        from orchestrator.study.sources import resolve

        document = read_document(self.file, (SPACE,))
        study = validate(document)
        self.plan = make_plan(document, study, resolve(study, root))
        self.speeds = throughput_specs(self.plan, "test")
        for trial, last in zip(self.plan.trials, ratios, strict=True):
            for step, ratio in zip(trial.steps, (1.02, 1.05, last), strict=True):
                self.write(step.train, {"seconds": 1.0, "tokens": 160, "tokens_per_s": 40.0})
                self.write(step.evaluate, quality(ratio))
                self.write(self.speeds[step.train.key], speed(1.0 + len(step.swapped) / 4, 1.5))

    def records(self) -> list[Record]:
        return make_records(self.plan, self.store, self.speeds, set(), lambda _: None)


@pytest.fixture
def seeds(tmp_path: Path) -> Seeds:
    return Seeds(tmp_path, *LUCKY, STEADY)


def student(name: str, *ratios: float, layers: int = 2) -> Record:
    """A row of `students` as the ranking reads it."""
    spread = {"perplexity_ratio": statistics.stdev(ratios)} if len(ratios) > 1 else {}
    return {
        "name": name, "label": name, "stage_key": name, "swapped_layers": list(range(layers)), "ratios": list(ratios),
        "metrics": {"perplexity_ratio": statistics.fmean(ratios)}, "spread": spread,
    }  # fmt: skip


def test_seeds_are_one_row_of_mean_deviation_and_count(seeds: Seeds) -> None:
    records = seeds.records()
    assert [row["group"] for row in records[::3]] == ["trial-00", "trial-00", "trial-00", "trial-03"]
    assert [row["seed"] for row in records[::3]] == [0, 1, 2, 0]
    rows = students(records)
    assert [row["name"] for row in rows] == [
        "trial-00 ×3 stage 1", "trial-00 ×3 stage 2", "trial-00 ×3 joint",
        "trial-03 stage 1", "trial-03 stage 2", "trial-03 joint",
    ]  # fmt: skip
    three, one = rows[2], rows[5]
    assert three["words"] == "losses=kl:1.0" and one["words"] == "seed=0 losses=ce:1.0"
    assert (three["seeds"], three["members"]) == ([0, 1, 2], ["trial-00", "trial-01", "trial-02"])
    assert three["ratios"] == list(LUCKY)
    assert three["metrics"]["perplexity_ratio"] == pytest.approx(1.18)
    assert three["metrics"]["hit_nll"] == pytest.approx(1.5 * 1.18)
    assert three["spread"]["perplexity_ratio"] == pytest.approx(statistics.stdev(LUCKY))
    assert three["spread"]["perplexity"] == pytest.approx(8 * statistics.stdev(LUCKY))
    assert three["metrics"]["student_tokens"] == 640 and isinstance(three["metrics"]["student_tokens"], int)
    assert three["metrics"]["prefill_ratio"] == {"16": 0.75, "32": 1.5}
    assert cell(three, "ratio", "32") == "1.180 ± 0.157" and cell(three, "seeds", "32") == "3"
    assert one["spread"] == {} and cell(one, "ratio", "32") == "1.100" and cell(one, "seeds", "32") == "1"


def test_a_seed_is_left_out_of_the_words_alone(seeds: Seeds) -> None:
    """The records stay what every trial was, seed by seed."""
    assert [row["words"] for row in seeds.records()[::3]][1] == "seed=1 losses=kl:1.0"


def test_of_one_seed_a_student_is_its_record(hand: Hand) -> None:
    hand.all_done()
    rows = [row for row in make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: "") if row["trial"]]
    for row, found in zip(rows, students(rows), strict=True):
        assert {name: found[name] for name in row} == row
        assert found["ratios"] == [row["metrics"]["perplexity_ratio"]] and found["label"] == row["trial"]


def test_seeds_that_are_not_finished_are_not_waited_for(seeds: Seeds) -> None:
    last = seeds.plan.trials[1].steps[-1]
    (seeds.store.folder(last.evaluate.key) / "DONE.json").unlink()
    rows = {row["name"]: row for row in students(seeds.records())}
    assert rows["trial-00 ×2 joint"]["ratios"] == [1.25, 1.29] and "trial-00 ×3 stage 2" in rows


def test_the_luckiest_seed_is_not_the_best_student(seeds: Seeds) -> None:
    """Of the seeds one has 1.0, but the mean is 1.18; the other student has 1.1."""
    records = seeds.records()
    assert [row["name"] for row in best_path(records)] == ["trial-03 stage 1", "trial-03 stage 2", "trial-03 joint"]
    assert [row["name"] for row in ends(records)] == ["trial-03 joint", "trial-00 ×3 joint"]
    front = pareto_front(records, "prefill_ratio", "32")
    assert [row["name"] for row in front] == ["trial-00 ×3 stage 1", "trial-00 ×3 stage 2"]
    best = {len(row["swapped_layers"]): row["name"] for row in best_by_layers(students(records))}
    assert best == {1: "trial-00 ×3 stage 1", 2: "trial-00 ×3 stage 2"}


def test_the_member_nearest_to_the_mean_is_exported(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path, 1.0, 1.06, 1.09, 1.3)  # the mean is 1.05
    records = seeds.records()

    def key(trial: int, stage: int = -1) -> str:
        return seeds.plan.trials[trial].steps[stage].train.key

    assert exported_stage(seeds.plan, seeds.store, records, None, None, None) == key(1)
    assert exported_stage(seeds.plan, seeds.store, records, "trial-00", None, None) == key(0)  # as it is named
    assert exported_stage(seeds.plan, seeds.store, records, "trial-00", None, "quality") == key(0)
    assert best_path(records)[-1]["trial"] == "trial-01"


def test_the_best_of_all_in_quality_is_by_the_mean_too(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path, 0.5, 1.5, 1.6, 0.9)
    key = exported_stage(seeds.plan, seeds.store, seeds.records(), None, None, "quality")
    assert key == seeds.plan.trials[3].steps[-1].train.key


def test_means_closer_than_two_standard_errors_are_a_tie() -> None:
    one, other = student("one", 1.0, 1.1, 1.2), student("other", 1.2, 1.3, 1.4)  # deviations of 0.1
    least = 2 * (0.01 / 3 + 0.01 / 3) ** 0.5  # 0.163; the means differ by 0.2
    assert noise(one, other, []) == pytest.approx(least)
    assert ties(one, [one, other], []) == []
    near = student("near", 1.16, 1.26, 1.36)  # by 0.16
    assert ties(one, [other, near], []) == [near]


def test_where_there_is_one_seed_the_range_of_seeds_decides() -> None:
    """The widest range among students that swap as many layers, else of all; without any nothing is said."""
    one, other = student("one", 1.0), student("other", 1.05)
    narrow, wide = student("narrow", 1.4, 1.44), student("wide", 2.0, 2.5, layers=1)
    assert noise(one, other, [one, other]) is None and ties(one, [other], [one, other]) == []
    assert noise(one, other, [one, other, narrow, wide]) == pytest.approx(0.04)
    assert ties(one, [other], [narrow, wide]) == []
    assert ties(one, [other], [wide]) == [other]
    assert noise(one, narrow, [narrow]) == pytest.approx(0.04)  # of one seed against several
    assert seeds_range([one, narrow, wide]) == pytest.approx(0.5) and seeds_range([one]) is None


def test_a_stage_that_trials_share_is_no_tie_with_itself() -> None:
    one = student("one", 1.0, 1.1)
    again, other = {**one, "name": "again"}, student("other", 1.01, 1.11)
    assert ties(one, [again, other, {**other, "name": "again"}], []) == [other]


def test_ties_are_said(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path, 1.1, 1.12, 1.14, 1.13)
    records = seeds.records()
    said = "It is a tie with trial-03 (1.130): less than 0.040 apart, which is noise of seeds."
    assert verdict(records).startswith(
        "The best student swaps 2 of 2 layers at 1.120 ± 0.020 times the teacher's perplexity after 640 tokens "
        f"(trial-00 ×3, hyena-2, the mean of 3 seeds). {said}"
    )
    assert "was not measured" not in verdict(records)
    key = exported_stage(seeds.plan, seeds.store, records, None, None, None)
    assert told_apart(records, key) == "as good within the noise of seeds: trial-03"
    assert told_apart(records, seeds.plan.trials[0].steps[0].train.key) is None  # of a stage on the way
    (tmp_path / "apart").mkdir()
    assert "tie" not in verdict(Seeds(tmp_path / "apart", 1.1, 1.12, 1.14, 1.5).records())


def test_a_tie_is_said_for_every_number_of_layers(seeds: Seeds) -> None:
    rows: list[Any] = [row for row in seeds.records() if row["stage_index"] != 1]
    assert tied(rows) == ["2 swapped: trial-03 joint is a tie with trial-00 ×3 joint (1.180 ± 0.157)"]
    assert tied(rows)[0] in answer(seeds.plan, rows, {}, [])
    assert f"- {tied(rows)[0]}\n" in markdown(seeds.plan, rows, {})


def test_tables_tell_seeds_where_there_are_several(seeds: Seeds, hand: Hand) -> None:
    records = seeds.records()
    lead = lead_table(records, "32", Report())
    assert list(lead.columns) == ["swapped", "layers", "seeds", "ratio", "hit", "decode", "prefill", "stage"]
    assert lead.to_numpy().tolist()[-1] == [
        "2/2", "0-1", "3", "1.050 ± 0.000", "1.575 ± 0.000", "1.50x", "1.50x", "trial-00 ×3 stage 2 losses=kl:1.0"
    ]  # fmt: skip
    page = markdown(seeds.plan, records, {})
    assert "| trial-00 ×3 losses=kl:1.0 | 2/2 | 3 | 640 | 9.44 ± 1.26 | 1.180 ± 0.157 |" in page
    assert "| trial-02 joint | 2/2 | 640 | 10.32 | 1.290 |" in page  # every stage of every seed
    assert legend(records, "32").endswith("\n×n: the mean of n seeds, ± one standard deviation.")
    hand.all_done()
    assert "×n" not in legend(make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None), "32")
