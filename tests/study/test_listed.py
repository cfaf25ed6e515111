"""Choices of layers made elsewhere: what the file says is what is swapped, and is remembered with the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.loader import StudyError, read_document
from orchestrator.study.names import schedule_name
from tests.study.test_path import World, costs, layers


def world(tmp_path: Path, content: Any, more: str = "", *overrides: str) -> World:
    (tmp_path / "made.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return World(tmp_path, f"choice: {{layers: made.json{more}}}", costs(), *overrides)


@pytest.mark.parametrize(
    ("content", "more", "wanted"),
    [
        ([3, 0, 2], "", [(3,), (0,), (2,)]),  # layer 1 stays attention
        ([3, 0, 2, 1], ", take: 3", [(0, 2, 3), (1,)]),
        ([3, 0, 2], ", take: 2, until: {layers: 3}", [(0, 3), (2,)]),
        ([3, 0, 2], ", until: {layers: 2}", [(3,), (0,)]),
        ({"order": [2, 1], "scores": {"2": {"score": 0.5}}, "tied": []}, "", [(2,), (1,)]),  # of a choice of ours
        ({"keep": [0, 3]}, "", [(1,), (2,)]),
    ],
)
def test_what_the_file_says_is_swapped(tmp_path: Path, content: Any, more: str, wanted: list[tuple[int, ...]]) -> None:
    given = world(tmp_path, content, more)
    assert layers(given.trial()) == wanted
    assert given.asked == []  # nothing decides it
    assert not given.plan().trials[0].open
    assert given.plan().trials[0].path.decisions == ()


def test_layers_that_the_study_keeps_are_left_out(tmp_path: Path) -> None:
    given = world(tmp_path, [3, 0, 2], "", "schedule.keep=[0]")
    assert layers(given.trial()) == [(3,), (2,)]


def test_an_end_by_quality_is_asked_for(tmp_path: Path) -> None:
    given = world(tmp_path, [3, 0, 2], ", until: {ratio: 1.1}")
    given.answer = lambda spec: {"perplexity_ratio": 1.2}
    plan = given.plan()
    assert plan.trials[0].open
    assert layers(given.trial()) == [(3,)]
    assert given.trial().steps[0].outcome == "last"


def test_it_shares_its_stages_with_the_order_that_it_says(tmp_path: Path) -> None:
    given = world(tmp_path, [3, 0, 2]).trial()
    by_hand = World(tmp_path, "layer_order: [[3], [0], [2]]", costs()).trial()
    assert [step.train.key for step in given.steps] == [step.train.key for step in by_hand.steps]


def test_studies_without_a_list_are_named_as_before(tmp_path: Path) -> None:
    """What names a path whose stages results decide is its schedule: a key that is not used is no part of it."""
    plain = World(tmp_path, "choice: {score: kl}", costs()).plan().trials[0]
    assert "layers" not in plain.study.model_dump(mode="json")["schedule"]["choice"]


def test_an_axis_of_the_search_may_name_files(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    axis = "search.space={schedule.choice.layers: [made.json, other.json], seed: [0]}"
    plan = world(tmp_path, [3, 0], "", axis).plan()
    assert [layers(trial) for trial in plan.trials] == [[(3,), (0,)], [(1,)]]
    axis = "search.space={schedule: [{choice: {layers: other.json}}, {layer_order: [[2]]}]}"
    plan = world(tmp_path, [3, 0], "", axis).plan()
    assert [layers(trial) for trial in plan.trials] == [[(1,)], [(2,)]]


def test_the_file_may_go_afterwards(tmp_path: Path) -> None:
    given = world(tmp_path, [3, 0])
    (tmp_path / "made.json").unlink()
    assert layers(given.trial()) == [(3,), (0,)]
    assert given.document.values["schedule"] == {"choice": {"layers": [3, 0]}}


def test_its_name_tells_it(tmp_path: Path) -> None:
    assert schedule_name(world(tmp_path, [3, 0], ", take: 2").trial().study.schedule) == "by the list 3,0, 2 a stage"
    assert schedule_name(world(tmp_path, {"keep": [1, 2]}).trial().study.schedule) == "all but 1,2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[3, 0", "is no JSON"),
        ("7", "holds 7: give a JSON file of layers"),
        ({"layers": [1]}, "has neither order nor keep: give a JSON file"),
        ({"order": [1], "keep": [2]}, "has order and keep: give a JSON file"),
    ],
)
def test_a_file_that_says_no_layers_is_told_with_its_place(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(StudyError) as error:
        world(tmp_path, content)
    assert f"study.yaml:5:21: schedule.choice.layers: {tmp_path / 'made.json'} {said}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ([4], "", "schedule.choice.layers: layer 4 does not exist: the teacher has 4 layers, 0 to 3"),
        ({"keep": [9]}, "", "schedule.choice.layers.keep: layer 9 does not exist"),
        ([1, 1], "", "layers names [1] more than once"),
        ([], "", "schedule.choice.layers"),
        ([1], ", score: kl, rerank: once", "already: take out score and rerank, or layers"),
    ],
)
def test_layers_that_do_not_fit_are_told(tmp_path: Path, content: Any, more: str, said: str) -> None:
    with pytest.raises(StudyError) as error:
        world(tmp_path, content, more).plan()
    assert said in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("study: x\n", encoding="utf-8")
    with pytest.raises(StudyError) as error:
        read_document(file, ("schedule.choice.layers=none.json",))
    said = "--set schedule.choice.layers=none.json: schedule.choice.layers: "
    assert said + f"{tmp_path / 'none.json'} cannot be read (No such file or directory): give" in str(error.value)


def test_candidates_of_operators_need_scores(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="says no operators, and operator lists candidates"):
        world(tmp_path, [1], "", "operator=[{kind: hyena, order: 2}, {kind: hyena, order: 3}]").plan()
