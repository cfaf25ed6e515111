"""Which measurements of speed a plan asks for: equal architectures share one."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.plan import throughput_specs
from orchestrator.study.sources import Resolved
from tests.study.test_plan import ALL, RESOLVED, planned


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_equal_architectures_share_one_speed_measurement() -> None:
    plan = planned("search.space={recipe.joint.0.losses: [{kl: 1}, {ce: 1}], operator.init: [transfer, random]}")
    speeds = throughput_specs(plan, "h")
    students = [speeds[step.train.key] for trial in plan.trials for step in trial.steps]
    assert len({spec.key for spec in students}) == 3  # 2, 4, 6 layers of one operator
    assert plan.teacher.train.key in speeds
    skips = [speeds[plan.controls[name].train.key] for name in plan.controls if "skip" in name]
    assert len({spec.key for spec in skips}) == 2  # of one layer, and of all
    assert {spec.train_batch_size for spec in skips} == {plan.study.recipe.batch_size}
    assert {spec.hardware for spec in speeds.values()} == {"h"}


def test_speed_is_by_the_number_of_layers_where_they_look_alike_and_all_train() -> None:
    down = "{layer_order: top_down, layers_per_stage: 2}"
    all_orders = f"{down}, {{layer_order: [[0, 3], [5]]}}, {{layer_order: [[1, 4]]}}"

    def layers(*overrides: str, orders: str = all_orders, resolved: Resolved = RESOLVED) -> list[list[tuple[int, ...]]]:
        alone = ("recipe.joint=[]", "controls={skip: false, scratch: none}")
        plan = planned(f"search.space={{schedule: [{orders}]}}", *alone, *overrides, resolved=resolved)
        speeds = throughput_specs(plan, "h")
        return [[speeds[step.train.key].layers for step in trial.steps] for trial in plan.trials]

    apart = [[(4, 5), (2, 3, 4, 5), ALL], [(0, 3), (0, 3, 5)], [(1, 4)]]
    assert layers() == [[(0, 1), (0, 1, 2, 3), ALL], [(0, 1), (0, 1, 2)], [(0, 1)]]
    assert layers("recipe.optimizer.rest_scale=0") == apart
    assert layers("recipe.freeze=['*layers.0.*']") == apart
    mixed = "operator={default: {kind: hyena}, layers: {4: {kind: hyena, heads: 4}}}"
    assert layers(mixed, orders=down) == apart[:1]
    brought = RESOLVED.architecture.model_copy(update={"pretrained": "w"})
    resolved = Resolved(RESOLVED.train, None, brought, "w", {}, ALL, 128)
    assert layers("teacher={kind: pretrained, hub: a/b}", resolved=resolved) == apart


def test_training_speed_is_measured_of_what_the_stages_train() -> None:
    frozen = "recipe.freeze=[lm_head.*, '*embed*']"
    plan = planned(
        frozen, "search.space={recipe.optimizer.rest_scale: [0.0, 0.3, 0.5]}", "recipe.optimizer.rest_scale=0"
    )
    speeds = throughput_specs(plan, "h")
    of_trials = [{speeds[step.train.key] for step in trial.steps} for trial in plan.trials]
    assert [{spec.rest_trains for spec in specs} for specs in of_trials] == [{False}, {True}, {True}]
    assert of_trials[1] == of_trials[2]
    controls = {name.split()[0]: speeds[step.train.key] for name, step in plan.controls.items()}
    assert (controls["skip"].rest_trains, controls["scratch"].rest_trains) == (False, True)
    globs = ("*embed*", "lm_head.*")
    assert {spec.freeze for spec in [*set.union(*of_trials), controls["skip"]]} == {globs}
    teacher = speeds[plan.teacher.train.key]
    assert (controls["scratch"].freeze, teacher.freeze, teacher.rest_trains) == ((), (), True)
