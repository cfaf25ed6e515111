"""What was decided is told: rows of stages that were given back, the tables of choices and gates, all by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run

from operators.config import HyenaConfig
from orchestrator.distill.models.origin import Origin
from orchestrator.record.answer.decided import choice_table, decided_lines, gate_table, score_table
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.page import page
from orchestrator.record.answer.points import curves_of
from orchestrator.record.answer.text import answer, text_table
from orchestrator.record.card import model_card
from orchestrator.record.choice import exported_stage
from orchestrator.record.choices import Cost, choices_of, decided_of
from orchestrator.record.decisions import choice_text, decided, near
from orchestrator.record.groups import best_by_layers, students
from orchestrator.record.home import Home
from orchestrator.record.records import Record, best_path, ends, make_records, pareto_front, trial_words
from orchestrator.record.screen.logs import log_text
from orchestrator.record.tracking.entry import choice_results, outcome_of, path_identity, stage_identity
from orchestrator.record.tracking.names import shown
from orchestrator.record.tracking.tracker import Tracker
from orchestrator.run.growing import Growing
from orchestrator.run.store import Store
from tests.record.chosen import FOUR, Chosen
from tests.record.handmade import asked


@pytest.fixture
def hand(tmp_path: Path) -> Chosen:
    made = Chosen(tmp_path)
    made.everything()
    return made


def records_of(hand: Chosen) -> list[Record]:
    return make_records(hand.plan, hand.store, hand.speeds)


def test_the_paths_are_as_the_head_of_the_home_says(hand: Chosen) -> None:
    told = [[(step.train.layers, step.outcome) for step in trial.steps] for trial in hand.plan.trials]  # type: ignore[attr-defined]
    assert told == [
        [((2,), "kept"), ((0,), "kept")],
        [((0, 1), "given_back"), ((0, 1), "given_back"), ((2,), "kept")],
        [((3,), "kept")],
        [((2,), "kept"), ((0, 1), "given_back"), ((0, 1), "given_back")],
    ]


def test_stages_that_were_given_back_are_told_and_never_ranked(hand: Chosen) -> None:
    rows = records_of(hand)
    assert [(row["name"], row["outcome"], row["last"]) for row in rows[1:]] == [
        ("trial-00 stage 1", "kept", False), ("trial-00 stage 2", "kept", True),
        ("trial-01 stage 1", "given_back", False), ("trial-01 stage 2", "given_back", False),
        ("trial-01 stage 3", "kept", True), ("trial-02 stage 1", "kept", True),
        ("trial-03 stage 1", "kept", True), ("trial-03 stage 2", "given_back", False),
        ("trial-03 stage 3", "given_back", False),
    ]  # fmt: skip
    given_back = {row["stage_key"] for row in rows if row["outcome"] == "given_back"}
    fast = [
        row | {"metrics": row["metrics"] | {"perplexity_ratio": 0.5}} if row["stage_key"] in given_back else row
        for row in rows
    ]
    ranked = [*students(fast), *best_by_layers(students(fast)), *pareto_front(fast, "prefill_ratio", "32"), *ends(fast)]
    assert not given_back & {row["stage_key"] for row in [*ranked, *best_path(fast)]}
    assert [row["name"] for row in best_path(rows)] == ["trial-00 stage 1", "trial-00 stage 2"]
    assert [row["name"] for row in ends(rows)] == [
        "trial-00 stage 2", "trial-01 stage 3", "trial-03 stage 1", "trial-02 stage 1",
    ]  # fmt: skip
    text = markdown(hand.plan, rows, {}, (), decided_of(hand.plan, hand.store))
    assert "| trial-01 stage 2, given back | 2/4 |" in text


def test_curves_are_of_the_stages_that_a_student_comes_from(hand: Chosen) -> None:
    for trial in hand.plan.trials:
        for step in trial.steps:
            hand.journal(step.train.key, (10, 160, 1.0, {"loss/kl": 1.0 + step.swapped[0]}))
    curves = {each.title.split(" ")[0]: each for each in curves_of(hand.plan, hand.store, records_of(hand))}
    assert curves["trial-01"].lines == (("kl", ((160, 3.0),)),) and curves["trial-01"].stages == (160,)
    assert curves["trial-00"].stages == (160, 320) and len(curves["trial-00"].lines[0][1]) == 3


def test_the_end_of_a_trial_is_what_was_not_given_back(tmp_path: Path) -> None:
    hand = Chosen(tmp_path)
    hand.teach()
    hand.grow()  # the gate wants more, and that is not trained yet
    trial = hand.plan.trials[1]
    assert [step.outcome for step in trial.steps] == ["extended", "kept"] and trial.open
    assert not any(row["last"] for row in records_of(hand) if row["trial"] == "trial-01")
    hand.grow()
    rows = [row for row in records_of(hand) if row["trial"] == "trial-01"]
    assert [row["outcome"] for row in rows] == ["given_back", "given_back", "kept"]
    _, second, third = (step.train.key for step in hand.plan.trials[1].steps)
    assert exported_stage(hand.plan, hand.store, records_of(hand), "trial-01", None, None) == third
    (hand.store.folder(hand.plan.trials[1].steps[2].evaluate.key) / "DONE.json").unlink()
    with pytest.raises(ValueError, match="no student of trial-01 is finished yet"):
        exported_stage(hand.plan, hand.store, records_of(hand), "trial-01", None, None)
    assert exported_stage(hand.plan, hand.store, records_of(hand), "trial-01", "2", None) == second


def test_trials_without_a_stage_yet_are_told_as_such(tmp_path: Path) -> None:
    hand = Chosen(tmp_path)
    assert hand.plan.trials[0].steps == ()
    with pytest.raises(ValueError, match="--stage 1: trial-00 has no stages yet: results decide them"):
        exported_stage(hand.plan, hand.store, [], "trial-00", "1", None)
    with pytest.raises(ValueError, match=r"trial-00:1: trial-00 has no stages yet: .*, and choice-1 to choice-1"):
        log_text(hand.plan, hand.store, hand.speeds, "trial-00:1")
    assert best_path([]) == [] and decided_lines(decided_of(hand.plan, hand.store)) == []


def test_a_choice_has_a_log_by_its_number(hand: Chosen) -> None:
    first, second = hand.plan.trials[0].path.decisions
    for decision in (first, second):
        for spec in (*decision.needs, decision.spec):
            (hand.store.folder(spec.key) / "log.txt").write_text(f"of {spec.key}")
    text = log_text(hand.plan, hand.store, hand.speeds, "trial-00:choice-2")
    assert "trial-00 choice 2, score of layers 3 (" in text and f"of {second.spec.key}" in text
    assert first.spec.key not in text


def test_what_a_choice_found_and_cost(hand: Chosen) -> None:
    first, second, joint = choices_of(hand.plan, hand.store)
    assert (first.trials, first.number, first.student, first.measure) == (("trial-00",), 1, "teacher", "hits")
    assert (first.order, first.tied, first.tau, first.teacher) == ((2, 0, 3, 1), (0,), (0.75, 0.5, 1.0), (1.5, 0.25))
    assert first.scores == {0: (0.02, 0.004), 1: (0.5, 0.1), 2: (0.01, 0.002), 3: (0.4, 0.05)}
    assert first.cost == Cost(scores=4, trained=0, read=5 * 64, seconds=6 * 0.5)  # the teacher is read as well
    assert (second.number, second.student, second.cost.scores) == (2, "stage 1", 3)
    assert (joint.measure, joint.scores[3], joint.tau, joint.teacher) == ("gate", (0.75, None), None, None)
    assert joint.cost == Cost(scores=0, trained=160, read=0, seconds=1.0)


def test_the_lines_for_a_terminal(hand: Chosen) -> None:
    assert decided_lines(decided_of(hand.plan, hand.store)) == [
        "trial-00 choice 1, at the teacher, by hits: 2 (+0.01), 0 (+0.02), 3 (+0.4), 1 (+0.5); tied with the first: 0",
        "  tau 0.75 [0.50, 1.00]; teacher 1.50 ± 0.25; 4 scores of 320 tokens, 3.0 s",
        "trial-00 choice 2, at stage 1, by hits: 0 (+0.03), 1 (+0.6), 3 (+0.7); tied with the first: 1",
        "  tau 0.75 [0.50, 1.00]; teacher 1.50 ± 0.25; 3 scores of 256 tokens, 2.5 s",
        "trial-02 choice 1, at the teacher, by joint scalars: 3 (0.75), 1 (0.5), 0 (0.25), 2 (0.125)",
        "  160 tokens trained, 1.0 s",
        "trial-01 stage 1, layers 0-1: 1.300 above 1.1, trained on, then 1.200: given back",
        "trial-03 stage 2, layers 0-1: 1.250 above 1.1, trained on, then 1.150: given back",
    ]
    text = answer(hand.plan, records_of(hand), {}, [], decided_of(hand.plan, hand.store))
    assert "what was decided\ntrial-00 choice 1, at the teacher" in text
    told = text.partition("swapped: attention")[0].splitlines()
    tables = [line for line in told if "at least as fast" not in line and not line.startswith("knee")]
    assert max(map(len, tables)) <= 110


def test_what_is_decided_is_said_once_while_it_runs(tmp_path: Path) -> None:
    growing = Chosen(tmp_path)
    growing.teach()
    told, before = [], growing.plan
    for _ in range(9):
        growing.grow()
        told.append(list(decided(before, growing.plan, growing.store)))
        before = growing.plan
    lines = [line for some in told for line in some]
    assert sorted(lines) == sorted({
        "chosen trial-00 choice 1, at the teacher, by hits: 2 (+0.01), 0 (+0.02), 3 (+0.4), 1 (+0.5); tied with the "
        "first: 0",
        "chosen trial-00 choice 2, at stage 1, by hits: 0 (+0.03), 1 (+0.6), 3 (+0.7); tied with the first: 1",
        "chosen trial-02 choice 1, at the teacher, by joint scalars: 3 (0.75), 1 (0.5), 0 (0.25), 2 (0.125)",
        "trial-01 stage 1, layers 0-1: 1.300 above 1.1: trained on",
        "trial-01 stage 1, layers 0-1: 1.300 above 1.1, trained on, then 1.200: given back",
        "trial-03 stage 2, layers 0-1: 1.250 above 1.1: trained on",
        "trial-03 stage 2, layers 0-1: 1.250 above 1.1, trained on, then 1.150: given back",
    })  # fmt: skip
    for trial in ("trial-01", "trial-03"):
        assert [line.rpartition(" ")[2] for line in lines if line.startswith(trial)] == ["on", "back"]


def test_layers_are_told_with_their_operators_and_those_scores(tmp_path: Path) -> None:
    """Of several operators of a layer the score of the one that it is swapped by."""
    operators = "operator=[{kind: hyena, heads: 2}, {kind: window, window: 4}]"
    schedule = "schedule={choice: {score: hits, texts: 64, until: {layers: 1}}}"
    space = "search={space: {seed: [0]}}"
    two = Chosen.__new__(Chosen)
    two.asked, two.home = asked(tmp_path, operators, schedule, space, *FOUR), Home(tmp_path / "home")
    two.store = Store(two.home.store)
    two.growing = Growing(two.asked.growing(two.store).planner, two.store)
    [decision] = two.plan.trials[0].path.decisions
    for spec in decision.needs:
        told = (spec.layers[0] + 1) * (1.0 if isinstance(spec.operator, HyenaConfig) else 0.1) if spec.layers else 0.0
        two.write(spec, {"tokens": 64, "excess_hit_loss": told, "excess_hit_loss_error": 0.25})
    result = {"order": [3, 0], "operators": {"3": 0, "0": 1}, "scores": {"3": {"score": 9.0}, "0": {"score": 8.0}}}
    two.write(decision.spec, result)
    [chosen] = choices_of(two.plan, two.store)
    assert chosen.scores == {3: (4.0, 0.25), 0: (0.1, 0.25)}
    assert choice_text(chosen).endswith("by hits: 3 (hyena-2h, +4), 0 (window-4, +0.1)")
    assert score_table(decided_of(two.plan, two.store))["layer"].tolist() == ["3 hyena-2h", "0 window-4"]


def test_the_tables_of_the_report(hand: Chosen) -> None:
    decided, tau = decided_of(hand.plan, hand.store), "0.75 [0.50, 1.00]"
    assert choice_table(decided).to_numpy().tolist()[1:] == [
        ["trial-00 choice 2", "stage 1", "hits", "0, 1, 3", "1", tau, "1.50 ± 0.25", "3", "0", "256", "2.5"],
        ["trial-02 choice 1", "teacher", "joint scalars", "3, 1, 0, 2", "-", "-", "-", "0", "160", "0", "1.0"],
    ]  # fmt: skip
    assert score_table(decided).to_numpy().tolist()[4:8] == [
        ["trial-00 choice 2", "1", "0", "+0.0300 ± 0.0040", "-"],
        ["trial-00 choice 2", "2", "1", "+0.60 ± 0.10", "with the first"],
        ["trial-00 choice 2", "3", "3", "+0.700 ± 0.050", "-"],
        ["trial-02 choice 1", "1", "3", "0.75", "-"],
    ]
    assert gate_table(decided).to_numpy().tolist() == [
        ["trial-01 stage 1", "0-1", "1.300, then 1.200", "1.1", "given back"],
        ["trial-01 stage 3", "2", "1.020", "1.1", "kept"],
        ["trial-03 stage 1", "2", "1.020", "1.1", "kept"],
        ["trial-03 stage 2", "0-1", "1.250, then 1.150", "1.1", "given back"],
    ]
    html = page(hand.plan, records_of(hand), {}, [], decided)
    assert "What was decided" in html and "1.300, then 1.200" in html and "+0.700 ± 0.050" in html


@pytest.mark.parametrize(
    ("score", "error", "told"),
    [
        (0.0002221, 0.0000103, "0.000222 ± 0.000010"),
        (4.656, 0.1175, "4.66 ± 0.12"),
        (12.3, 25.0, "12 ± 25"),
        (0.5, None, "0.5"),
    ],
)
def test_a_number_has_the_digits_of_its_error(score: float, error: float | None, told: str) -> None:
    assert near(score, error) == told


def test_words_of_schedules_are_words(hand: Chosen) -> None:
    assert trial_words(hand.plan)["trial-00"] == "by hits, every stage, until 2 layers"
    wide = [["row", "ratio"], ["trial-00 " + "by kl, restored alone, " * 6, "1.000"]]
    import pandas as pd

    lines = text_table(pd.DataFrame(wide[1:], columns=wide[0])).splitlines()
    assert max(map(len, lines)) == 110 and lines[2].endswith("  1.000") and lines[3].startswith("  kl, restored alone,")


def test_mlflow_is_sent_scores_by_the_number_of_the_decision(hand: Chosen) -> None:
    chosen = choices_of(hand.plan, hand.store, hand.plan.trials[:1])
    (first, points), (second, others) = choice_results(hand.store, chosen)
    assert {(name, value, step) for name, value, _, step in points} == {
        ("score/layer_0", 0.02, 1), ("score/layer_1", 0.5, 1), ("score/layer_2", 0.01, 1), ("score/layer_3", 0.4, 1),
    }  # fmt: skip
    assert [(name, step) for name, _, _, step in others] == [
        ("score/layer_0", 2),
        ("score/layer_1", 2),
        ("score/layer_3", 2),
    ]
    assert [first, second] == [decision.spec.key for decision in hand.plan.trials[0].path.decisions]
    names = shown(hand.plan)
    assert [outcome_of(names, step) for step in hand.plan.trials[1].steps] == ["given_back", "given_back", "kept"]


def test_mlflow_learns_what_became_of_a_stage_after_it_was_sent(tmp_path: Path, empty_database: Path) -> None:
    hand = Chosen(tmp_path)
    hand.home.root.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_database, hand.home.root / "mlflow.db")
    hand.teach()
    before, speeds = hand.plan, hand.speeds
    hand.grow()
    tracker = Tracker(hand.home, before, speeds, live=False)
    tracker.sync()
    first = before.trials[1].steps[0]

    def run(identity: str) -> Run:
        return tracker.runs.client.get_run(tracker.runs.ids[identity])

    assert run(stage_identity(first)).data.tags["layerswap.outcome"] == "kept"
    for outcome in ("extended", "given_back"):
        tracker.replan(hand.plan, hand.speeds)
        tracker.sync()
        assert run(stage_identity(first)).data.tags["layerswap.outcome"] == outcome
        hand.grow()
    tracker.replan(hand.plan, hand.speeds)
    tracker.sync()
    trial = run(path_identity(tracker.shown.paths[0]))
    scores = {layer: trial.data.metrics[f"score/layer_{layer}"] for layer in range(4)}
    assert scores == {0: 0.03, 1: 0.6, 2: 0.01, 3: 0.7}
    assert "- choice 2, at stage 1, by hits: 0 (+0.03)" in trial.data.tags["mlflow.note.content"]
    told = json.loads(Path(tracker.runs.client.download_artifacts(trial.info.run_id, "choices.json")).read_text())
    assert [each["order"] for each in told] == [[2, 0, 3, 1], [0, 1, 3]] and told[0]["cost"]["read"] == 320


def test_the_card_of_a_student_leaves_out_what_was_given_back(hand: Chosen) -> None:
    trial = hand.plan.trials[1]
    first, second, third = (step.train.key for step in trial.steps)
    records = records_of(hand)
    text = model_card(hand.plan, records, third, "trial-01", (2,), Origin())
    assert f"| trial-01 stage 3 | 2 | 160 | `{third}` |" in text and first not in text and second not in text
    assert "| trial-01 stage 3 | 1/4 |" in text and "given back" not in text
    given_back = model_card(hand.plan, records, second, "trial-01", (0, 1), Origin())
    assert first in given_back and second in given_back and third not in given_back


def test_seeds_that_came_to_other_layers_are_other_students() -> None:
    def row(seed: int, index: int, layers: list[int], ratio: float, last: bool) -> Record:
        trial = f"trial-{seed:02d}"
        place = {"kind": "stage", "name": f"{trial} stage {index + 1}", "trial": trial, "group": "trial-00"}
        place |= {"stage_index": index, "last": last, "outcome": "kept", "words": f"seed={seed}; by kl, 2 a stage"}
        return place | {
            "seed": seed, "stage_key": f"{trial} {index}", "swapped_layers": layers,
            "metrics": {"perplexity_ratio": ratio},
        }  # fmt: skip

    rows = [row(0, 0, [1], 1.0, False), row(0, 1, [1, 2], 1.2, True)]
    rows += [row(1, 0, [1], 1.1, False), row(1, 1, [0, 1], 1.1, True)]
    assert [(each["name"], each["members"]) for each in students(rows)] == [
        ("trial-00 ×2 stage 1", ["trial-00", "trial-01"]),
        ("trial-00 stage 2", ["trial-00"]),
        ("trial-01 stage 2", ["trial-01"]),
    ]
    assert students(rows)[0]["words"] == "by kl, 2 a stage"
    assert [each["name"] for each in ends(rows)] == ["trial-01 stage 2", "trial-00 stage 2"]
    assert [each["name"] for each in best_path(rows)] == ["trial-00 ×2 stage 1", "trial-01 stage 2"]
