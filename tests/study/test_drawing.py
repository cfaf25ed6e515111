"""A search that learns as a plan: rounds of points, each known when all trials of the one before are judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.loader import StudyError
from orchestrator.study.spec import DrawSpec, EvaluateSpec, ThroughputSpec
from tests.study.test_path import World

SPACE = "{recipe.optimizer.lr: {low: 0.001, high: 0.1, log: true}}"
SEARCH = f"search={{method: optuna, trials: %d, space: {SPACE}, optuna: {{%s}}}}"


class Draws:
    """Results of a search: the n-th point drawn has the rate n thousandths, and n tenths as its ratio above 1."""

    def __init__(self, most: int = 100) -> None:
        self.drawn: list[DrawSpec] = []
        self.number, self.most = 0, most

    def __call__(self, spec: Any) -> Mapping[str, Any]:
        match spec:
            case DrawSpec():
                self.drawn.append(spec)
                new = range(self.number + 1, min(self.number + spec.count, self.most) + 1)
                self.number += len(new)
                return {"points": [{"recipe.optimizer.lr": n / 1000} for n in new]}
            case EvaluateSpec():
                return {"perplexity_ratio": 1.25}
            case ThroughputSpec():
                return {"decode_ratio": {"64": 2.0, "128": 3.0}}
        raise AssertionError(spec.kind)


def world(tmp_path: Path, draws: Draws, trials: int, how: str) -> World:
    return World(tmp_path, "layers_per_stage: 4", draws, SEARCH % (trials, how))


def test_points_are_drawn_in_rounds_when_those_before_are_judged(tmp_path: Path) -> None:
    draws = Draws()
    searched = world(tmp_path, draws, 5, "batch: 2")
    before = searched.plan()
    assert (before.trials, before.drawing.left, before.names) == ((), 5, [f"trial-0{n}" for n in range(5)])
    plan = searched.whole()
    assert [trial.values["recipe.optimizer.lr"] for trial in plan.trials] == [n / 1000 for n in range(1, 6)]
    assert [trial.study.recipe.optimizer.lr for trial in plan.trials] == [n / 1000 for n in range(1, 6)]
    assert [spec.count for spec in draws.drawn] == [2, 2, 1]
    assert [spec.told for spec in draws.drawn] == [(), ((1.25,), (1.25,)), ((1.25,), (1.25,))]
    assert [spec.previous for spec in draws.drawn] == [None, draws.drawn[0].key, draws.drawn[1].key]
    assert not plan.waits and not plan.drawing.left
    judged = [spec.subject for spec in searched.asked if isinstance(spec, EvaluateSpec)]
    assert len(judged) == 4  # the last one decides nothing


def test_what_a_draw_is_made_of(tmp_path: Path) -> None:
    draws = Draws()
    world(tmp_path, draws, 1, "sampler: nsga2, objective: [ratio, decode]").whole()
    (spec,) = draws.drawn
    assert (spec.sampler, spec.directions, spec.seed, spec.whole) == ("nsga2", ("minimize", "maximize"), 0, ())
    assert spec.spaces == ({"recipe.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}},)


def test_trials_are_judged_by_ratio_and_by_speed_at_a_length(tmp_path: Path) -> None:
    draws = Draws()
    searched = world(tmp_path, draws, 3, "objective: [{decode: 64}, ratio]")
    plan = searched.whole()
    assert draws.drawn[1].told == ((2.0, 1.25), (2.0, 1.25))
    assert draws.drawn[1].directions == ("maximize", "minimize")
    speeds = [spec for spec in searched.asked if isinstance(spec, ThroughputSpec)]
    assert len(speeds) == 1 and set(plan.drawing.measured) == set(speeds)  # one architecture
    assert world(tmp_path, draws, 3, "objective: decode").whole() and draws.drawn[-1].told == ((3.0,), (3.0,))


def test_a_space_that_has_no_more_ends_the_search(tmp_path: Path) -> None:
    plan = world(tmp_path, Draws(most=3), 6, "batch: 2").whole()
    assert len(plan.trials) == 3 and not plan.drawing.left
    assert plan.notes[0] == "search.trials is 6 and the space has 3 points: each is tried once"


def test_a_plan_that_is_drawn_is_one_variant_however_far_it_is_known(tmp_path: Path) -> None:
    from orchestrator.record.remembered import identity

    searched = world(tmp_path, Draws(), 3, "batch: 1")
    before, after = searched.plan(), searched.whole()
    assert identity(before) == identity(after)
    others = [world(tmp_path, Draws(), 4, "batch: 1"), world(tmp_path, Draws(), 3, "batch: 1, objective: decode")]
    assert len({identity(before), *(identity(other.plan()) for other in others)}) == 3


@pytest.mark.parametrize(
    ("search", "told"),
    [
        ("{method: optuna}", "optuna search needs trials"),
        ("{method: random, trials: 2, optuna: {}}", "optuna belongs to method optuna, and method is random"),
        ("{method: optuna, trials: 2, early_stopping: {}}", "early_stopping compares all trials at once"),
        ("{method: optuna, trials: 2, optuna: {objective: [ratio, decode, ratio]}}", "at most 2"),
    ],
)
def test_what_does_not_fit_a_search_is_told(tmp_path: Path, search: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        World(tmp_path, "layers_per_stage: 4", Draws(), f"search={search}").plan()


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ("{low: 1, high: 9, log: true, step: 2}", "step 2 has no use on a logarithmic scale"),
        ("{low: 1, high: 9, step: 0.5}", "recipe.batch_size takes whole numbers: write step so, not 0.5"),
        ("{low: 1, high: 9, step: 10}", "step 10 is wider than the range"),
    ],
)
def test_steps_that_do_not_fit_their_range_are_told(tmp_path: Path, axis: str, told: str) -> None:
    search = f"search={{method: random, trials: 2, space: {{recipe.batch_size: {axis}}}}}"
    with pytest.raises(StudyError, match=told):
        World(tmp_path, "layers_per_stage: 4", Draws(), search).plan()


def test_a_random_search_draws_in_steps(tmp_path: Path) -> None:
    search = "search={method: random, trials: 9, space: {recipe.batch_size: {low: 1, high: 8, step: 3}}}"
    plan = World(tmp_path, "layers_per_stage: 4", Draws(), search).plan()
    assert sorted(trial.values["recipe.batch_size"] for trial in plan.trials) == [1, 4, 7]
