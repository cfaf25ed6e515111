"""What a search tries: how many points, numbers of which kind, and points that mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import Plan, make_plan
from orchestrator.study.search import sample
from tests.study.test_plan import RESOLVED, STUDY

SIZE, TOKENS, LEARNING = "schedule.layers_per_stage", "recipe.joint.0.tokens", "recipe.optimizer.lr"
LOSSES, MATRIX = "recipe.joint.0.losses", "recipe.optimizer.matrix_lr"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str) -> Plan:
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    document = read_document(Path("study.yaml"), overrides)
    return make_plan(document, validate(document), RESOLVED)


def drawn(space: str, trials: int, *overrides: str) -> list[dict[str, Any]]:
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    search = f"search={{method: random, trials: {trials}, space: {space}}}"
    return sample(validate(read_document(Path("study.yaml"), (search, *overrides))))


@pytest.mark.parametrize("seed", range(5))
def test_a_random_search_has_as_many_points_as_it_asks_for(seed: int) -> None:
    eight = f"{{{SIZE}: [1, 2, 3, 4], seed: [0, 1]}}"
    points = drawn(eight, 8, f"seed={seed}")
    assert len({tuple(point.values()) for point in points}) == len(points) == 8
    assert len(drawn(eight, 9, f"seed={seed}")) == 8
    assert len(drawn(f"[{{{SIZE}: [1, 2]}}, {{{SIZE}: [2, 3]}}]", 9, f"seed={seed}")) == 3  # of both spaces together


def test_more_trials_are_the_same_points_and_further_ones() -> None:
    space = f"{{{SIZE}: [1, 2, 3], {LEARNING}: {{low: 1e-4, high: 1e-2, log: true}}}}"
    assert drawn(space, 7)[:4] == drawn(space, 4)
    assert drawn(f"{{{SIZE}: [1, 2, 3, 4, 5]}}", 5)[:3] == drawn(f"{{{SIZE}: [1, 2, 3, 4, 5]}}", 3)


def test_a_plan_says_where_a_space_has_fewer_points_than_trials() -> None:
    search = f"search={{method: random, trials: 9, space: {{{SIZE}: [1, 2]}}}}"
    assert planned(search).notes == ["search.trials is 9 and the space has 2 points: each is tried once"]
    assert planned(search.replace("9", "2")).notes == []


def test_whole_bounds_are_drawn_as_whole_numbers_with_both_ends() -> None:
    points = drawn(f"{{{SIZE}: {{low: 1, high: 6}}}}", 6)
    assert sorted(point[SIZE] for point in points) == [1, 2, 3, 4, 5, 6]
    assert {type(point[SIZE]) for point in points} == {int}
    plan = planned(f"search={{method: random, trials: 3, space: {{{TOKENS}: {{low: 640, high: 6400, log: true}}}}}}")
    assert len(plan.trials) == 3


def test_whole_numbers_on_a_logarithmic_scale_are_drawn_as_often_in_every_octave() -> None:
    budgets = [point[TOKENS] for point in drawn(f"{{{TOKENS}: {{low: 64, high: 65536, log: true}}}}", 600)]
    assert {type(budget) for budget in budgets} == {int}
    assert min(budgets) >= 64 and max(budgets) <= 65_536
    below = sum(budget < 2_048 for budget in budgets)  # five of ten octaves
    assert 240 < below < 360


def test_whole_bounds_of_a_key_that_takes_real_numbers_are_drawn_as_real_numbers() -> None:
    values = [point["recipe.joint.0.losses.kl"] for point in drawn("{recipe.joint.0.losses.kl: {low: 1, high: 3}}", 5)]
    assert all(1.0 < value < 3.0 and value != int(value) for value in values)


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        (f"{SIZE}: {{low: 1.0, high: 6}}", f"{SIZE}: {SIZE} takes whole numbers: write both bounds so, not 1.0 and 6"),
        ("operator.init: {low: 1, high: 6}", "operator.init: operator.init takes no number: list its values"),
        ("operator: {low: 1, high: 6}", "operator: operator takes no number: list its values"),
        (
            f"{LEARNING}: {{low: 0.1, high: 0.10000000001}}",
            f"{LEARNING}.low: low 0.1 and high 0.10000000001 are too near for other numbers between: widen them",
        ),
    ],
)
def test_a_range_that_its_key_cannot_take_is_told_at_the_axis(axis: str, told: str) -> None:
    with pytest.raises(StudyError) as caught:
        planned(f"search={{method: random, trials: 2, space: {{{axis}}}}}")
    assert str(caught.value).endswith(f": search.space.{told}")


@pytest.mark.parametrize(
    ("ways", "paths"),
    [
        (["{kl: 1}", "{kl: 1.0}", "{kl: {weight: 1}}", "{kl: {}}", "{kl: {direction: forward, temperature: 1}}"], 1),
        (["{ce: 1}", "{ce: 1, kl: 0}", "{ce: 1, kl: {weight: 0, direction: reverse}}", "{ce: 1, mixer_mse: 0}"], 1),
        (["{hidden_mse: 1}", "{hidden_mse: 1, hit_weight: 3}"], 1),  # of hits, and nothing is weighed by them
        (["{kl: 1}", "{kl: 1, hit_weight: 3}", "{kl: 2}", "{kl: {temperature: 2}}", "{kl: {direction: reverse}}"], 5),
        (["{ce: 1}", "{ce: 1, hit_weight: 3}"], 2),
    ],
)
def test_one_loss_is_one_stage_however_it_is_written(ways: list[str], paths: int) -> None:
    plan = planned(f"search.space={{{LOSSES}: [{', '.join(ways)}]}}")
    assert len(plan.trials) == len(ways)
    assert len(plan.paths) == paths


def test_the_plain_way_of_writing_a_loss_names_the_stage() -> None:
    specs: list[Any] = [
        planned(f"{LOSSES}={way}").trials[0].steps[-1].train for way in ("{kl: {weight: 2}}", "{kl: 2.0}")
    ]
    assert [spec.phases[0].losses.kl for spec in specs] == [2.0, 2.0]


def test_trials_that_are_one_path_are_told() -> None:
    plan = planned(f"search.space={{{LOSSES}: [{{kl: 1}}, {{ce: 1}}, {{kl: {{}}}}]}}")
    assert plan.notes == ["trial-00, trial-02 are one path, whose values mean the same: it is computed once"]
    assert planned(f"search.space={{{LOSSES}: [{{kl: 1}}, {{ce: 1}}]}}").notes == []


def test_the_rate_of_muon_names_no_stage_where_there_is_no_muon() -> None:
    adamw, muon = "{method: adamw, matrix_lr: %s}", "{method: muon, matrix_lr: %s}"

    def keys(optimizer: str) -> list[str]:
        changes = (f"recipe.optimizer={optimizer}", f"teacher.optimizer={optimizer}", "controls.scratch=own")
        return list(planned(*changes).specs)

    assert keys(adamw % 0.5) == keys(adamw % 0.25) == keys("{method: adamw}")
    assert set(keys(muon % 0.5)) & set(keys(muon % 0.25)) == {planned().tokens.key}


def test_a_sweep_of_the_rate_of_muon_without_muon_is_told_at_its_axis() -> None:
    sweep = f"search.space={{{MATRIX}: [0.1, 0.2]}}"
    with pytest.raises(StudyError) as caught:
        planned("recipe.optimizer.method=adamw", sweep)
    assert str(caught.value) == (
        f"--set {sweep}: search.space.{MATRIX}: changes nothing, for it is Muon's and recipe.optimizer.method is adamw"
        ": sweep recipe.optimizer.lr, or set the method to muon"
    )
    both = planned(f"search.space={{{MATRIX}: [0.1, 0.2], recipe.optimizer.method: [muon, adamw]}}")
    assert (len(both.trials), len(both.paths)) == (4, 3)
