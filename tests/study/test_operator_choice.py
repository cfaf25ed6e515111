"""Paths whose layers and operators are chosen together, with scores made up for every pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from operators.config import HyenaConfig
from orchestrator.record.records import trial_words
from orchestrator.record.screen.facts import stage_names
from orchestrator.study.loader import StudyError
from orchestrator.study.placing import placing
from orchestrator.study.plan import throughput_specs
from orchestrator.study.spec import Candidate, ChoiceSpec, DistilSpec, ScoreSpec, ScratchSpec
from tests.study.test_path import Answer, World, costs, layers

TWO, HEADS = HyenaConfig(), HyenaConfig(heads=4)
LIST = "operator=[{kind: hyena}, {kind: hyena, heads: 4}]"
# By layer the cost of the first operator and of the second.
PAIRS = [(3.0, 5.0), (4.0, 1.0), (6.0, 4.0), (2.0, 2.0)]


def pairs(scores: list[tuple[float, float]] = PAIRS) -> Answer:
    """Choices by these costs of layers 0, 1, ... and students as good as their teacher."""

    def answer(spec: Any) -> Mapping[str, Any]:
        if not isinstance(spec, ChoiceSpec):
            return {"perplexity_ratio": 1.0}
        ranked = sorted((scores[each.layer][each.operator], each.layer, each.operator) for each in spec.candidates)
        best = {layer: operator for _, layer, operator in reversed(ranked)}
        order = list(dict.fromkeys(layer for _, layer, _ in ranked))
        return {"order": order, "operators": {str(layer): operator for layer, operator in best.items()}}

    return answer


def test_layers_are_swapped_by_the_operator_of_their_lowest_score(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {take: 2}", pairs(), LIST)
    trial = world.trial()
    assert layers(trial) == [(1, 3), (0, 2)]
    assert trial.steps[0].train.operator == placing({1: HEADS, 3: TWO})
    assert trial.steps[1].train.operator == placing({0: TWO, 2: HEADS})
    end = placing({0: TWO, 1: HEADS, 2: HEADS, 3: TWO})
    assert trial.steps[1].operator == end
    plan = world.whole()
    speed = throughput_specs(plan, "h")[trial.steps[1].train.key].operator
    bare = placing({layer: HyenaConfig(heads=4 if layer in (1, 2) else None, init="random") for layer in range(4)})
    assert speed == bare
    assert [step.train.operator for step in plan.controls.values() if isinstance(step.train, ScratchSpec)] == [bare]


def test_every_pair_has_a_score_by_its_role(tmp_path: Path) -> None:
    plan = World(tmp_path, "choice: {}, keep: [0, 2]", pairs(), LIST).plan()
    (choice,) = [spec for spec in plan.specs.values() if isinstance(spec, ChoiceSpec)]
    assert [(each.layer, each.operator) for each in choice.candidates] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    scores = {spec.key: spec for spec in plan.specs.values() if isinstance(spec, ScoreSpec)}
    found = {role: scores[key] for role, key in choice.parents.items() if role.startswith("layer")}
    assert {role: (spec.layers, spec.operator) for role, spec in found.items()} == {
        "layer 1": ((1,), TWO), "layer 1 operator 1": ((1,), HEADS),
        "layer 3": ((3,), TWO), "layer 3 operator 1": ((3,), HEADS),
    }  # fmt: skip
    assert set(plan.specs) >= set(choice.parents.values())
    names = stage_names(plan, {})
    assert names[choice.parents["layer 3 operator 1"]] == "trial-00 choice 1, score of hyena-4h layers 3"


def test_scores_of_one_operator_are_those_of_a_study_that_has_it_alone(tmp_path: Path) -> None:
    both, alone = (
        World(tmp_path, "choice: {}", pairs(), operator).plan() for operator in (LIST, "operator={kind: hyena}")
    )
    scores = [{key for key, spec in plan.specs.items() if isinstance(spec, ScoreSpec)} for plan in (both, alone)]
    assert scores[0] > scores[1] and len(scores[0]) == 9


def test_the_first_operator_is_left_out_of_keys() -> None:
    assert "operator" not in Candidate(layer=1, score="k", operator=0).model_dump_json()
    assert Candidate(layer=1, score="k", operator=2).role == "layer 1 operator 2"


def test_forward_has_the_picked_with_their_operators_beside(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {rerank: forward, until: {layers: 3}}", pairs(), LIST)
    trial = world.trial()
    assert layers(trial) == [(1,), (3,), (0,)]
    scores = [spec for spec in trial.path.decisions[1].needs if isinstance(spec, ScoreSpec) and spec.layers]
    assert [(spec.layers, spec.operator) for spec in scores] == [
        ((0, 1), placing({0: TWO, 1: HEADS})), ((0, 1), HEADS),
        ((1, 2), placing({1: HEADS, 2: TWO})), ((1, 2), HEADS),
        ((1, 3), placing({1: HEADS, 3: TWO})), ((1, 3), HEADS),
    ]  # fmt: skip


def test_every_operator_is_prepared_once(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {prepared: {local: 512}, until: {layers: 1}}", pairs(), LIST)
    decision = world.trial().path.decisions[0]
    local = {spec.key: spec.operator for spec in decision.needs if isinstance(spec, DistilSpec)}
    assert list(local.values()) == [TWO, HEADS]
    scores = [spec for spec in decision.needs if isinstance(spec, ScoreSpec) and spec.prepared is not None]
    assert len(scores) == 8 and all(local[spec.prepared] == spec.operator for spec in scores)


def test_probes_distil_every_pair(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {score: {probe: 300}}", pairs(), LIST)
    decision = world.trial().path.decisions[0]
    probes = [(spec.layers, spec.operator) for spec in decision.needs if isinstance(spec, DistilSpec)]
    assert probes == [((layer,), operator) for layer in range(4) for operator in (TWO, HEADS)]


def test_an_axis_may_set_one_operator(tmp_path: Path) -> None:
    space = "search.space={operator: [{kind: hyena}, [{kind: hyena}, {kind: hyena, heads: 4}]]}"
    world = World(tmp_path, "choice: {until: {layers: 1}}", pairs(), space)
    plan = world.whole()
    assert list(trial_words(plan).values()) == ["operator=hyena-2", "operator=hyena-2 or hyena-4h"]
    assert [trial.steps[0].train.layers for trial in plan.trials] == [(3,), (1,)]


def test_a_layer_that_was_given_back_is_not_chosen_by_another_operator(tmp_path: Path) -> None:
    ratios = iter([1.5, 1.0, 1.0, 1.0])

    def answer(spec: Any) -> Mapping[str, Any]:
        return {"perplexity_ratio": next(ratios)} if spec.kind == "evaluate" else pairs()(spec)

    trial = World(tmp_path, "choice: {}, gate: {ratio: 1.2}", answer, LIST).trial()
    assert [(step.train.layers, step.outcome) for step in trial.steps][:2] == [((1,), "given_back"), ((3,), "kept")]
    assert trial.steps[-1].operator == placing({0: TWO, 2: HEADS, 3: TWO})


@pytest.mark.parametrize(
    ("schedule", "operator", "told"),
    [
        ("keep: []", LIST, "operator lists candidates, and only a choice takes one: give one, or schedule.choice"),
        ("choice: {score: skip}", LIST, "score skip tells no operators apart: set it to kl"),
        ("choice: {score: {joint: 512}}", LIST, "score joint tells no operators apart: set it to kl"),
        ("choice: {scored: restored_alone}", LIST, "tells no operators apart: set it to swapped_alone"),
        ("choice: {}", "operator=[{kind: hyena}, {kind: hyena, order: 2}]", "a candidate twice: keep one of them"),
        ("choice: {}", "operator=[{kind: hyena}]", "operator: must have at least 2 items"),
        ("choice: {}", "operator=[{kind: hyena}, {kind: hyena, heads: 5}]", "operator.1.heads: 5 must divide"),
        ("choice: {}", "operator=[{kind: hyena}, {kind: hyna}]", "operator.1.kind: unknown kind hyna; did you mean"),
    ],
)
def test_what_does_not_fit_is_told_with_its_remedy(tmp_path: Path, schedule: str, operator: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        World(tmp_path, schedule, costs(), operator).plan()


EXACT = "choice: {solver: exact, until: {decode: 1.5}, take: 2}"


@pytest.mark.parametrize("alike", [True, False])
def test_an_exact_choice_solves_by_the_speeds_of_single_layers(tmp_path: Path, alike: bool) -> None:
    def answer(spec: Any) -> Mapping[str, Any]:
        if spec.kind == "throughput":
            (layer,) = spec.layers
            student = 120.0 + 10 * layer + (100 if spec.operator.heads else 0)
            return {"decode_tokens_per_s": {"128": student}, "teacher_decode_tokens_per_s": {"128": 100.0}}
        if spec.kind == "choice":
            return {"order": [3, 1, 0], "operators": {"3": 1, "1": 0, "0": 1}}
        return {"perplexity_ratio": 1.0}

    world = World(tmp_path, EXACT, answer, LIST, *([] if alike else ["recipe.freeze=['*layers.0.*']"]))
    speeds = [spec for spec in world.plan().specs.values() if spec.kind == "throughput"]
    assert [spec.layers for spec in speeds] == [(layer,) for layer in range(1 if alike else 4) for _ in range(2)]
    trial = world.trial()
    solve = trial.path.decisions[0].spec.solve
    assert solve is not None and (solve.decode, solve.layers, solve.seconds) == (1.5, None, 0.01)
    students = [120.0, 220.0] * 4 if alike else [120.0, 220.0, 130.0, 230.0, 140.0, 240.0, 150.0, 250.0]
    assert solve.added == pytest.approx([1 / student - 0.01 for student in students])
    assert layers(trial) == [(1, 3), (0,)]  # and layer 2 stays attention
    assert trial.steps[-1].operator == placing({0: HEADS, 1: TWO, 3: HEADS})


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("choice: {solver: exact, until: {decode: 1.5}, rerank: forward}", "rerank is forward: set it to once"),
        ("choice: {solver: exact}", "needs an end to solve for: give until with decode, layers or both"),
        ("choice: {solver: exact, until: {ratio: 1.1}}", "needs an end to solve for"),
        ("choice: {solver: exact, until: {decode: 1.0}}", "which the teacher itself has: give more than 1"),
        ("choice: {solver: exact, until: {layers: 1}, scored: restored_alone}", "set scored to swapped_alone"),
    ],
)
def test_what_cannot_be_solved_exactly_is_told(tmp_path: Path, schedule: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        World(tmp_path, schedule, costs()).plan()
