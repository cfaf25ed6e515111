"""Early stopping: students are compared on equal terms only, and a study in which it can stop nothing is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.halving import good_enough
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import Plan, make_plan
from tests.study.test_plan import RESOLVED

STUDY = """\
study: halved
teacher: {kind: pretrain, tokens: 4096}
data: {sequence_length: 32}
operator: {kind: hyena, heads: 4}
schedule: {layers_per_stage: 2}
recipe:
  batch_size: 2
  phases: [{tokens_per_layer: 640, losses: {kl: 1.0}}]
  joint: [{tokens: 6400, losses: {kl: 1.0}}]
"""
STUDIES = Path(__file__).resolve().parents[2] / "studies"
HEADS = "search.space={operator.heads: [2, 4]}"


def planned(folder: Path, *overrides: str) -> Plan:
    (folder / "halved.yaml").write_text(STUDY)
    document = read_document(folder / "halved.yaml", overrides)
    return make_plan(document, validate(document), RESOLVED)


def rungs(plan: Plan) -> list[tuple[int, int, dict[str, int]]]:
    """Swapped layers, tokens, and the step with which each trial is there, counted from 1."""
    found = []
    for rung in plan.rungs:
        at = {}
        for trial in plan.trials:
            keys = [step.evaluate.key for step in trial.steps]
            if trial.name in rung.judged:
                at[trial.name] = keys.index(rung.judged[trial.name]) + 1
        found.append((rung.swapped, rung.tokens, at))
    return found


def test_without_early_stopping_nobody_is_compared(tmp_path: Path) -> None:
    assert planned(tmp_path, HEADS).rungs == ()


def test_rungs_are_all_stages_before_the_last(tmp_path: Path) -> None:
    """Two layers of 640 tokens each at a time; the joint stage ends both paths, so nothing is left to stop there."""
    both = [{"trial-00": n, "trial-01": n} for n in (1, 2, 3)]
    assert rungs(planned(tmp_path, HEADS, "search.early_stopping={}")) == [
        (2, 1280, both[0]), (4, 2560, both[1]), (6, 3840, both[2])
    ]  # fmt: skip
    assert rungs(planned(tmp_path, HEADS, "search.early_stopping={grace_layers: 5}")) == [(6, 3840, both[2])]


def test_six_layers_at_once_are_not_compared_with_four_of_six(tmp_path: Path) -> None:
    """Paths of other steps meet where they have equally many layers after equally many tokens."""
    change = ("search.space={schedule.layers_per_stage: [2, 3, 6]}", "search.early_stopping={grace_layers: 4}")
    assert rungs(planned(tmp_path, *change)) == [(6, 3840, {"trial-00": 3, "trial-01": 2, "trial-02": 1})]


def test_students_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    change = ("search.space={recipe.phases.0.tokens_per_layer: [640, 1280], operator.heads: [2, 4]}",)
    found = rungs(planned(tmp_path, *change, "search.early_stopping={grace_layers: 6}"))
    assert [(tokens, list(at)) for _, tokens, at in found] == [
        (3840, ["trial-00", "trial-01"]), (7680, ["trial-02", "trial-03"])
    ]  # fmt: skip


def test_a_student_that_trials_share_is_one(tmp_path: Path) -> None:
    """They differ in the joint stage only: there is no choice before it, and no stage after it."""
    change = ("search.space={recipe.joint.0.tokens: [640, 6400]}", "search.early_stopping={}")
    with pytest.raises(StudyError, match=r"--set search\.early_stopping.*: search\.early_stopping: can stop nothing: "):
        planned(tmp_path, *change)


def test_who_ends_where_others_go_on_is_compared_with_them(tmp_path: Path) -> None:
    """The joint stage of one is one of two for the other."""
    change = (
        "search.space=[{operator.heads: [2]}, {schedule.keep: [[4, 5]], operator.heads: [4]}]",
        "search.early_stopping={grace_layers: 4}",
    )
    assert rungs(planned(tmp_path, *change)) == [(4, 2560, {"trial-00": 2, "trial-01": 2})]


@pytest.mark.parametrize("grace", [7, 99])
def test_a_grace_that_no_student_outlasts_is_an_error(tmp_path: Path, grace: int) -> None:
    with pytest.raises(
        StudyError, match=rf"no two students of {grace} swapped layers or more have .*lower grace_layer"
    ):
        planned(tmp_path, HEADS, f"search.early_stopping={{grace_layers: {grace}}}")


def test_one_trial_cannot_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="can stop nothing"):
        planned(tmp_path, "search.early_stopping={}")


@pytest.mark.parametrize("name", ["late-stage", "quality", "filters"])
def test_studies_whose_trials_part_at_the_last_stage_take_none(name: str) -> None:
    document = read_document(STUDIES / f"{name}.yaml", ("search.early_stopping={}",))
    with pytest.raises(StudyError, match="can stop nothing"):
        make_plan(document, validate(document), RESOLVED)


@pytest.mark.parametrize(
    ("ratios", "factor", "good"),
    [
        ({"a": 1.2, "b": 1.1}, 2, {"b"}),
        ({"a": 1.2, "b": 1.1, "c": 1.3}, 2, {"a", "b"}),  # one of two, rounded up
        ({"a": 1.3, "b": 1.2, "c": 1.4, "d": 1.1, "e": 1.26}, 2, {"b", "d", "e"}),
        ({"a": 1.3, "b": 1.2, "c": 1.4, "d": 1.1, "e": 1.26}, 5, {"d"}),
        ({"a": 1.2, "b": 1.2, "c": 1.3}, 3, {"a", "b"}),  # as good as the last that stays
        ({"a": 1.2}, 4, {"a"}),
        ({}, 2, set()),
    ],
)
def test_the_best_stay(ratios: dict[str, float], factor: int, good: set[str]) -> None:
    assert good_enough(ratios, factor) == good
    backwards = dict(reversed(ratios.items()))
    assert good_enough(backwards, factor) == good
