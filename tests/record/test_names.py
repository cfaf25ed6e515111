"""Names of runs, and what every trial tells of itself, over plans of known values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.record.tracking.names import Shown, shown
from tests.record.handmade import planned

LAYERS = "1/3 layers 0", "2/3 layers 1", "3/3 joint layers 0,1"


def of(folder: Path, space: str) -> Shown:
    """The runs of the handmade study with another space."""
    return shown(planned(folder, f"search.space={space}"))


def names(runs: Shown) -> list[str]:
    return [path.name for path in runs.paths]


def test_a_name_tells_the_values_that_differ_and_the_place(tmp_path: Path) -> None:
    runs = of(tmp_path, "[{operator.order: [2, 3], recipe.joint.0.losses: [{kl: 1.0}, {kl: 1.0, ce: 0.5}]}]")
    assert names(runs) == ["order 2 · kl 1", "order 2 · ce 0.5", "order 3 · kl 1", "order 3 · ce 0.5"]
    first, last = runs.paths[0].steps, runs.paths[3].steps
    assert [runs.stages[step.train.key].name for step in first] == [
        f"order 2 · {LAYERS[0]}", f"order 2 · {LAYERS[1]}", f"order 2 · kl 1 · {LAYERS[2]}"
    ]  # fmt: skip
    assert runs.stages[last[2].train.key].name == f"order 3 · ce 0.5 · {LAYERS[2]}"
    assert [path.name for path in runs.stages[first[0].train.key].paths] == ["order 2 · kl 1", "order 2 · ce 0.5"]
    assert set(runs.alone.values()) == {"teacher", "scratch hyena-2", "skip 0", "skip 1", "skip all"}


def test_a_study_without_a_search_is_told_by_its_operator(tmp_path: Path) -> None:
    runs = of(tmp_path, "[{}]")
    assert names(runs) == ["hyena-2"]
    assert runs.paths[0].parameters == {"operator": "hyena-2"}


def test_operators_of_one_name_are_told_apart_and_keys_of_one_end_by_more_of_it(tmp_path: Path) -> None:
    space = (
        "[{operator: [{kind: hyena, order: 2, filter: {width: 16}}, {kind: hyena, order: 2, filter: {width: 24}}]},"
        " {recipe.joint.0.losses.kl: [0.5], recipe.phases.0.losses.kl: [0.25]}]"
    )
    joint, phases = "joint.0.losses.kl 0.5", "phases.0.losses.kl 0.25"
    assert names(of(tmp_path, space)) == ["hyena-2 width 16", "hyena-2 width 24", f"hyena-2 · {joint} · {phases}"]


def test_every_trial_tells_every_swept_key(tmp_path: Path) -> None:
    space = "[{recipe.optimizer.layer_decay: [0.8]}, {operator.filter.width: [16]}, {recipe.joint: [[]]}]"
    runs = of(tmp_path, space)
    told = [{**path.parameters} for path in runs.paths]
    joint = [parameters.pop("recipe.joint") for parameters in told]
    assert told == [
        {"operator": "hyena-2", "recipe.optimizer.layer_decay": decay, "operator.filter.width": width}
        for decay, width in (("0.8", "32"), ("1.0", "16"), ("1.0", "32"))
    ]
    assert joint[0] == joint[1] and "'tokens': 320" in joint[0] and joint[2] == "[]"


def test_points_of_one_path_are_one_run_with_their_values_side_by_side(tmp_path: Path) -> None:
    """As of a rate of an optimizer that the study does not use."""
    plan = planned(tmp_path, "search.space=[{recipe.optimizer.lr: [0.003, 0.004]}]")
    first, second = plan.trials
    runs = shown(dataclasses.replace(plan, trials=(first, dataclasses.replace(second, path=first.path))))
    (path,) = runs.paths
    assert path.numbers == "trial-00,trial-01"
    assert path.name == "lr 0.003 or lr 0.004"
    assert path.parameters == {"operator": "hyena-2", "recipe.optimizer.lr": "0.003 | 0.004"}
    assert runs.stages[first.steps[0].train.key].name == f"lr 0.003 or lr 0.004 · {LAYERS[0]}"


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.123456789, 0.123456788, "0.123457"), (0.5, 0.25, "0.5")], ids=["alike", "not alike"]
)
def test_no_two_runs_have_one_name(tmp_path: Path, low: float, high: float, told: str) -> None:
    runs = of(tmp_path, f"[{{recipe.optimizer.rest_scale: [{low}, {high}], recipe.joint: [[]]}}]")
    everything = [*names(runs), *(stage.name for stage in runs.stages.values()), *runs.alone.values(), "handmade"]
    assert len(everything) == len({*everything}) == 2 + 4 + 5 + 1
    assert names(runs)[0] == f"rest_scale {told} · joint []" + (" · trial-00" if low - high < 0.1 else "")


def test_a_long_name_is_cut_and_still_its_own(tmp_path: Path) -> None:
    orders = ", ".join(f"[[{a}], [{b}]]" for a, b in ((0, 1), (1, 0)))
    keys = "".join(f", recipe.optimizer.{key}: [0.1, 0.2]" for key in ("rest_scale", "warmup", "decay", "weight_decay"))
    space = f"[{{schedule.layer_order: [{orders}], recipe.optimizer.gradient_clip: [0.1, 0.2]{keys}}}]"
    runs = of(tmp_path, space)
    assert len(names(runs)) == len({*names(runs)}) == 64
    assert all(len(name) < 200 for name in names(runs))
