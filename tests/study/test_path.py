"""Paths that results decide: by rules worked out by hand, with results made up for every stage that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import Plan, Trial, make_plan
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import Architecture, ChoiceSpec, DistilSpec, ScoreSpec, SourceIdentity, ThroughputSpec

STUDY = """
study: chosen
data: {sequence_length: 64}
operator: {kind: hyena, order: 2}
schedule: {%s}
recipe:
  batch_size: 2
  phases: [{tokens: 512, losses: {kl: 1.0}}]
throughput: {lengths: [64, 128], decode_tokens: 4}
"""
RESOLVED = Resolved(
    train=SourceIdentity(source="python-stdlib", fingerprint="a" * 64),
    validation=None,
    architecture=Architecture(layers=4, hidden=64, heads=4, intermediate=256, max_length=512, vocabulary=512),
    teacher=None,
    locations={},
    sites=(0, 1, 2, 3),
    inner=64,
)
Answer = Callable[[Any], Mapping[str, Any]]


class World:
    """Results of the stages that a plan asks for: what it waits for is answered, one at a time."""

    def __init__(self, tmp_path: Path, schedule: str, answer: Answer, *overrides: str) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(STUDY % schedule, encoding="utf-8")
        self.document = read_document(file, overrides)
        self.answer = answer
        self.known: dict[str, Mapping[str, Any]] = {}
        self.asked: list[Any] = []

    def plan(self) -> Plan:
        return make_plan(self.document, validate(self.document), RESOLVED, "cpu", self.known.get, "here")

    def whole(self) -> Plan:
        """The plan when all that it waits for was answered; a growing plan keeps what it had."""
        plan = self.plan()
        for _ in range(100):
            if not plan.waits:
                return plan
            for key in plan.waits:
                spec = plan.specs[key]
                self.asked.append(spec)
                self.known[key] = self.answer(spec)
            grown = self.plan()
            assert set(plan.specs) <= set(grown.specs)
            plan = grown
        raise AssertionError("it never ends")

    def trial(self) -> Trial:
        return self.whole().trials[0]


def layers(trial: Trial) -> list[tuple[int, ...]]:
    return [step.train.layers for step in trial.steps]


def costs(*scores: float) -> Answer:
    """Choices by these costs of layers 0, 1, ..., and students as good as their teacher."""

    def answer(spec: Any) -> Mapping[str, Any]:
        if isinstance(spec, ChoiceSpec):
            order = sorted((each.layer for each in spec.candidates), key=lambda layer: scores[layer])
            return {"order": order if spec.ascending else order[::-1]}
        return {"perplexity_ratio": 1.0}

    return answer


def ratios(answer: Answer, *told: float) -> Answer:
    """The same, students' ratios in the order in which they are asked for."""
    left = list(told)

    def answered(spec: Any) -> Mapping[str, Any]:
        return {"perplexity_ratio": left.pop(0)} if spec.kind == "evaluate" else answer(spec)

    return answered


def test_a_choice_made_once_gives_the_order(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {score: kl, texts: 640}", costs(3.0, 1.0, 4.0, 2.0))
    before = world.plan()
    assert (before.trials[0].steps, before.rest, before.trials[0].open) == ((), 4, True)
    assert layers(world.trial()) == [(1,), (3,), (0,), (2,)]
    assert [step.swapped for step in world.trial().steps] == [(1,), (1, 3), (0, 1, 3), (0, 1, 2, 3)]
    assert [type(spec) for spec in world.asked] == [ChoiceSpec]


def test_a_choice_is_of_scores_of_single_layers_and_the_teacher(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {score: kl, texts: 640}, keep: [2]", costs(3.0, 1.0, 4.0, 2.0))
    plan = world.plan()
    scores = [spec for spec in plan.specs.values() if isinstance(spec, ScoreSpec)]
    assert sorted(spec.layers for spec in scores) == [(), (0,), (1,), (3,)]
    own = next(spec for spec in scores if not spec.layers)
    assert own.subject == own.teacher == plan.teacher.train.key and own.reference is None
    assert {spec.reference for spec in scores if spec.layers} == {own.key}
    assert {(spec.text, spec.reported, spec.operator.kind) for spec in scores if spec.layers} == {
        (640, 32_768, "hyena")
    }
    choice = next(spec for spec in plan.specs.values() if isinstance(spec, ChoiceSpec))
    by_layer = {spec.layers[0]: spec.key for spec in scores if spec.layers}
    assert choice.parents == {
        "subject": plan.teacher.train.key, "reference": own.key,
        **{f"layer {layer}": key for layer, key in by_layer.items()},
    }  # fmt: skip
    keys = list(plan.specs)
    assert all(keys.index(parent) < keys.index(key) for key in keys for parent in plan.specs[key].parents.values())


def test_restored_layers_are_scored_in_a_student_that_has_all_others_swapped(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {scored: restored_alone, until: {layers: 2}}", costs(3.0, 1.0, 4.0, 2.0))
    trial = world.trial()
    scores = [spec for spec in trial.path.decisions[0].needs if isinstance(spec, ScoreSpec) and spec.layers]
    assert [spec.layers for spec in scores] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert not trial.path.decisions[0].spec.ascending
    assert layers(trial) == [(2,), (0,)]  # what costs most without it is swapped first


def test_forward_scores_again_beside_the_picked_and_before_any_training(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {rerank: forward, take: 2, until: {layers: 3}}", costs(3.0, 1.0, 4.0, 2.0))
    trial = world.trial()
    assert layers(trial) == [(1, 3), (0,)]
    assert [kind.kind for kind in world.asked] == ["choice", "choice"]
    first, second = trial.path.decisions
    assert [spec.layers for spec in second.needs if spec.layers] == [(0, 1, 3), (1, 2, 3)]
    teacher = world.plan().teacher.train.key
    assert {spec.subject for each in (first, second) for spec in each.needs} == {teacher}


def test_where_all_that_is_left_goes_there_is_nothing_to_choose(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {rerank: every_stage, take: 3}", costs(3.0, 1.0, 4.0, 2.0))
    assert layers(world.trial()) == [(0, 1, 3), (2,)] and [spec.kind for spec in world.asked] == ["choice"]
    whole = World(tmp_path, "choice: {take: 4}", costs(3.0, 1.0, 4.0, 2.0)).plan()
    assert layers(whole.trials[0]) == [(0, 1, 2, 3)] and not whole.waits


def test_every_stage_scores_again_at_the_student_so_far(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {rerank: every_stage, until: {layers: 2}}", costs(3.0, 1.0, 4.0, 2.0))
    trial = world.trial()
    assert layers(trial) == [(1,), (3,)]
    second = trial.path.decisions[1]
    assert second.spec.subject == trial.steps[0].train.key
    scores = [spec for spec in second.needs if isinstance(spec, ScoreSpec) and spec.layers]
    assert [(spec.layers, spec.subject) for spec in scores] == [
        ((layer,), trial.steps[0].train.key) for layer in (0, 2, 3)
    ]


def test_ways_that_come_to_the_same_layers_share_their_stages(tmp_path: Path) -> None:
    world = World(
        tmp_path, "keep: []", costs(3.0, 1.0, 4.0, 2.0),
        "search.space={schedule: [{choice: {until: {layers: 2}}}, {layer_order: [[1], [3], [2]]}]}",
    )  # fmt: skip
    plan = world.whole()
    chosen, fixed = plan.trials
    assert [step.train.key for step in chosen.steps] == [step.train.key for step in fixed.steps[:2]]
    assert len(plan.users()) == 3 and plan.users()[chosen.steps[1].train.key] == ["trial-00", "trial-01"]


def test_skip_scores_attention_left_out_whatever_the_operator(tmp_path: Path) -> None:
    world = World(
        tmp_path, "choice: {score: skip, until: {layers: 1}}", costs(3.0, 1.0, 4.0, 2.0),
        "search.space={operator: [{kind: hyena, order: 2}, {kind: hyena, order: 3}]}",
    )  # fmt: skip
    plan = world.whole()
    assert {trial.path.decisions[0].spec.key for trial in plan.trials} == {plan.trials[0].path.decisions[0].spec.key}
    scores = [spec for spec in plan.specs.values() if isinstance(spec, ScoreSpec)]
    assert len(scores) == 5 and {spec.operator.kind for spec in scores} == {"skip"}


def test_probes_distil_every_candidate_and_score_what_came_of_it(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {score: {probe: 300}, until: {layers: 1}}", costs(3.0, 1.0, 4.0, 2.0))
    decision = world.trial().path.decisions[0]
    probes = {spec.key: spec for spec in decision.needs if isinstance(spec, DistilSpec)}
    assert [spec.layers for spec in probes.values()] == [(0,), (1,), (2,), (3,)]
    assert {spec.phases[0].steps for spec in probes.values()} == {2}  # 300 tokens in steps of 2 windows of 64
    scores = [spec for spec in decision.needs if isinstance(spec, ScoreSpec) and spec.reference]
    assert [spec.subject for spec in scores] == list(probes) and {spec.layers for spec in scores} == {()}


def test_prepared_operators_are_trained_once_for_all_candidates(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {prepared: {local: 512}, until: {layers: 1}}", costs(3.0, 1.0, 4.0, 2.0))
    decision = world.trial().path.decisions[0]
    (local,) = [spec for spec in decision.needs if isinstance(spec, DistilSpec)]
    assert local.layers == local.new_layers == (0, 1, 2, 3)
    assert local.phases[0].losses.mixer_mse == 1.0 and local.phases[0].losses.logit_kl.weight == 0
    assert local.optimizer.rest_scale == 0.0  # the teacher's own weights stay
    assert {spec.prepared for spec in decision.needs if isinstance(spec, ScoreSpec) and spec.layers} == {local.key}


def test_joint_scores_are_of_one_blend(tmp_path: Path) -> None:
    order = {"order": [2, 0, 1, 3]}
    world = World(tmp_path, "choice: {score: {joint: 1280}, until: {layers: 3}}", lambda _: order)
    trial = world.trial()
    (blend,) = trial.path.decisions[0].needs
    assert (blend.kind, blend.layers, blend.steps) == ("blend", (0, 1, 2, 3), 10)
    assert trial.path.decisions[0].spec.parents["blend"] == blend.key
    assert layers(trial) == [(2,), (0,), (1,)]


def test_a_path_ends_with_the_first_stage_above_its_ratio(tmp_path: Path) -> None:
    answer = ratios(costs(3.0, 1.0, 4.0, 2.0), 1.01, 1.05, 1.051)
    trial = World(tmp_path, "choice: {until: {ratio: 1.05}}", answer).trial()
    assert [(step.train.layers, step.outcome) for step in trial.steps] == [
        ((1,), "kept"),
        ((3,), "kept"),
        ((0,), "last"),
    ]


def test_a_path_ends_when_its_student_decodes_fast_enough(tmp_path: Path) -> None:
    speeds = iter([1.2, 1.5])

    def answer(spec: Any) -> Mapping[str, Any]:
        if isinstance(spec, ThroughputSpec):
            assert spec.hardware == "here"
            return {"decode_ratio": {"64": 9.0, "128": next(speeds)}}
        return costs(3.0, 1.0, 4.0, 2.0)(spec)

    world = World(tmp_path, "choice: {until: {decode: 1.5}}", answer)
    assert layers(world.trial()) == [(1,), (3,)]
    assert [spec.layers for spec in world.asked if isinstance(spec, ThroughputSpec)] == [(0,), (0, 1)]  # alike


def test_a_gate_that_is_passed_changes_nothing(tmp_path: Path) -> None:
    open_, gated = "layers_per_stage: 2", "layers_per_stage: 2, gate: {ratio: 1.2, extend: 2}"
    plain = World(tmp_path, open_, costs()).trial()
    world = World(tmp_path, gated, ratios(costs(), 1.2, 1.1))
    assert world.plan().rest == 2 + 3 and len(world.plan().trials[0].steps) == 1
    assert [step.train.key for step in world.trial().steps] == [step.train.key for step in plain.steps]


def test_a_gate_trains_on_and_then_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, "layers_per_stage: 2, gate: {ratio: 1.2, extend: 2}", ratios(costs(), 1.4, 1.3, 1.15, 1.1))
    trial = world.trial()
    assert [step.outcome for step in trial.steps] == ["extended", "extended", "kept", "kept"]
    assert [step.train.new_layers for step in trial.steps] == [(0, 1), (), (), (2, 3)]
    assert [step.train.first_sequence for step in trial.steps] == [0, 8, 16, 24]  # 4 steps of 2 sequences each
    assert [step.train.parent for step in trial.steps[1:]] == [step.train.key for step in trial.steps[:-1]]


def test_what_is_just_good_enough_passes_a_gate_that_extends_nothing(tmp_path: Path) -> None:
    trial = World(tmp_path, "layers_per_stage: 2, gate: {ratio: 1.2}", ratios(costs(), 1.2, 1.2)).trial()
    assert [step.outcome for step in trial.steps] == ["kept", "kept"]


def test_a_gate_gives_layers_back_and_the_path_goes_on_without_them(tmp_path: Path) -> None:
    gate = "gate: {ratio: 1.2, extend: 1, otherwise: roll_back}"
    world = World(tmp_path, f"layer_order: [[0], [1], [2]], {gate}", ratios(costs(), 1.1, 1.5, 1.3, 1.1))
    trial = world.trial()
    assert [(step.train.layers, step.outcome) for step in trial.steps] == [
        ((0,), "kept"), ((1,), "given_back"), ((1,), "given_back"), ((2,), "kept"),
    ]  # fmt: skip
    last, end = trial.steps[3], trial.end
    assert last.train.parent == trial.steps[0].train.key and last.swapped == (0, 2) and end is last
    other = World(tmp_path, "layer_order: [[0], [2]]", costs()).trial()
    assert other.steps[1].train.key == last.train.key  # as if it had never been tried


def test_a_choice_does_not_take_a_layer_that_was_given_back(tmp_path: Path) -> None:
    schedule = "choice: {until: {layers: 2}}, gate: {ratio: 1.2}"
    trial = World(tmp_path, schedule, ratios(costs(3.0, 1.0, 4.0, 2.0), 1.5, 1.0, 1.0)).trial()
    assert [(step.train.layers, step.outcome) for step in trial.steps] == [
        ((1,), "given_back"), ((3,), "kept"), ((0,), "kept"),
    ]  # fmt: skip


@pytest.mark.parametrize(("otherwise", "outcomes"), [("stop", ["last"]), ("keep", ["kept", "kept"])])
def test_a_gate_may_stop_or_keep(tmp_path: Path, otherwise: str, outcomes: list[str]) -> None:
    schedule = f"layers_per_stage: 2, gate: {{ratio: 1.2, otherwise: {otherwise}}}"
    assert [step.outcome for step in World(tmp_path, schedule, ratios(costs(), 1.5, 1.5)).trial().steps] == outcomes


def test_a_joint_stage_is_over_the_layers_that_stayed(tmp_path: Path) -> None:
    world = World(
        tmp_path, "layers_per_stage: 2, gate: {ratio: 1.2}", ratios(costs(), 1.5, 1.1),
        "recipe.joint=[{tokens: 512, losses: {ce: 1.0}}]",
    )  # fmt: skip
    assert [(step.train.layers, step.joint) for step in world.trial().steps] == [
        ((0, 1), False), ((2, 3), False), ((2, 3), True),
    ]  # fmt: skip


def test_without_phases_the_joint_stage_swaps_what_was_chosen(tmp_path: Path) -> None:
    world = World(
        tmp_path, "choice: {until: {layers: 2}}", costs(3.0, 1.0, 4.0, 2.0),
        "recipe={batch_size: 2, joint: [{tokens: 512, losses: {kl: 1.0}}]}",
    )  # fmt: skip
    (step,) = world.trial().steps
    assert (step.train.layers, step.train.new_layers, step.joint) == ((1, 3), (1, 3), True)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("choice: {}, layer_order: top_down", "choice decides the order itself: take out layer_order"),
        ("choice: {until: {}}", "nothing ends the path: give at least one of layers, ratio and decode"),
        ("choice: {score: skip, prepared: {local: 512}}", "score skip leaves attention out and has no operator"),
        ("choice: {score: {joint: 512}, scored: restored_alone}", "score joint blends all candidates at once"),
        ("choice: {score: {probe: 512}, prepared: {local: 512}}", "score probe trains its operators itself"),
        ("choice: {score: {probe: 100}}", "schedule.choice: 100 tokens are less than one step of 128"),
        ("gate: {ratio: 0.5}", "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_told_with_its_remedy(tmp_path: Path, schedule: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        World(tmp_path, schedule, costs()).plan()


@pytest.mark.parametrize(
    "schedule", ["gate: {ratio: 1.1}", "choice: {rerank: every_stage}", "choice: {until: {ratio: 1.1}}"]
)
def test_a_rule_that_looks_at_students_needs_stages(tmp_path: Path, schedule: str) -> None:
    joint = "recipe={batch_size: 2, joint: [{tokens: 512, losses: {kl: 1.0}}]}"
    with pytest.raises(StudyError, match=r"schedule\.\w+.*looks at students of stages.*add a phase"):
        World(tmp_path, schedule, costs(), joint).plan()


def test_early_stopping_needs_paths_that_are_known_before(tmp_path: Path) -> None:
    space = "search={space: {seed: [0, 1]}, early_stopping: {grace_layers: 1}}"
    with pytest.raises(StudyError, match=r"early_stopping: compares students whose stages are known before"):
        World(tmp_path, "gate: {ratio: 1.1}", costs(), space).plan()


def test_the_rule_names_a_path_however_far_it_is_known(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {until: {layers: 2}}", costs(3.0, 1.0, 4.0, 2.0))
    before, after = world.plan().trials[0], world.trial()
    other = World(tmp_path, "choice: {until: {layers: 3}}", costs(3.0, 1.0, 4.0, 2.0)).plan().trials[0]
    assert before.rule == after.rule != other.rule and before.ruled and after.ruled and not after.open


def test_scratch_controls_wait_until_the_longest_path_is_known(tmp_path: Path) -> None:
    world = World(tmp_path, "choice: {until: {layers: 2}}", costs(3.0, 1.0, 4.0, 2.0))
    assert not any(name.startswith("scratch") for name in world.plan().controls)
    found = world.whole().controls["scratch hyena-2"]
    assert (found.swapped, found.tokens) == ((1, 3), 1024)


def test_scratch_controls_do_not_wait_for_a_path_that_cannot_become_the_longest(tmp_path: Path) -> None:
    space = "search.space={schedule: [{choice: {until: {layers: 2}}}, {layer_order: [[0], [1]]}]}"
    plan = World(tmp_path, "keep: []", costs(), space).plan()
    assert plan.trials[0].open and plan.trials[0].path.most == 2 * 512
    assert plan.controls["scratch hyena-2"].swapped == (0, 1)
    longer = "search.space={schedule: [{choice: {until: {layers: 3}}}, {layer_order: [[0], [1]]}]}"
    assert "scratch hyena-2" not in World(tmp_path, "keep: []", costs(), longer).plan().controls


def test_how_much_a_path_may_come_to(tmp_path: Path) -> None:
    losses = "losses: {kl: 1.0}"
    phases = f"phases: [{{tokens_per_layer: 256, {losses}}}], joint: [{{tokens: 640, {losses}}}]"
    phases = f"recipe={{batch_size: 2, {phases}}}"
    schedule = "choice: {take: 2, until: {layers: 3}}, gate: {ratio: 1.2, extend: 1}"
    world = World(tmp_path, schedule, ratios(costs(3.0, 1.0, 4.0, 2.0), 1.5, 1.1, 1.0), phases)
    path = world.plan().trials[0].path
    assert (path.rest, path.most) == (5, 2 * 512 + 2 * 256 + 640)  # two layers, one, each stage once more, and joint
    assert world.trial().path.most == world.trial().steps[-1].tokens == 2 * 512 + 256 + 640
