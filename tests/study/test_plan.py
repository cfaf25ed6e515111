"""From a study to the tree of stages: order, sharing, token counts, controls; nothing runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from operators.config import HyenaConfig
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import Plan, Trial, make_plan, throughput_specs
from orchestrator.study.schema import Study
from orchestrator.study.search import sample
from orchestrator.study.sources import Resolved, resolve
from orchestrator.study.spec import Architecture, DistilSpec, ScratchSpec, SourceIdentity, TeacherSpec, TokensSpec

STUDY = """\
study: planned
teacher: {kind: pretrain, tokens: 4096}
data: {sequence_length: 32}
operator: {kind: hyena, heads: 4}
schedule:
  layers_per_stage: 2
recipe:
  batch_size: 2
  phases:
    - {tokens_per_layer: 640, losses: {mixer_mse: 1}}
    - {tokens: 320, losses: {kl: 1.0}}
  joint:
    - {tokens: 6400, losses: {kl: 1.0}}
throughput: {lengths: [64, 128]}
search:
  space: {}
"""
RESOLVED = Resolved(
    train=SourceIdentity(source="text", fingerprint="f"),
    validation=None,
    architecture=Architecture(layers=6, hidden=128, heads=4, intermediate=512, max_length=1024, vocabulary=2048),
    teacher=None,
    locations={},
    sites=tuple(range(6)),
    inner=128,
)
ALL = (0, 1, 2, 3, 4, 5)
LEARNING = "recipe.optimizer.lr"
RAISE, LOWER = ": raise it, or lower one of those", ": lower it, or take a teacher of more"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(*overrides: str) -> Any:
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    return read_document(Path("study.yaml"), overrides)


def planned(*overrides: str, resolved: Resolved = RESOLVED) -> Plan:
    document = read(*overrides)
    return make_plan(document, validate(document), resolved)


def only(*overrides: str) -> Trial:
    (trial,) = planned(*overrides).trials
    return trial


def study_of(*overrides: str) -> Study:
    return validate(read(*overrides))


def keys(trial: Trial) -> list[str]:
    return [step.train.key for step in trial.steps]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        ([], [(0, 1), (2, 3), (4, 5)]),
        (["schedule.layers_per_stage=4"], [(0, 1, 2, 3), (4, 5)]),
        (["schedule.layers_per_stage=9"], [ALL]),
        (["schedule.layer_order=top_down"], [(4, 5), (2, 3), (0, 1)]),
        (["schedule.layer_order=top_down", "schedule.layers_per_stage=4"], [(2, 3, 4, 5), (0, 1)]),
        (["schedule.layer_order=interleaved", "schedule.layers_per_stage=1"], [(0,), (2,), (4,), (1,), (3,), (5,)]),
        (["schedule.layer_order=interleaved"], [(0, 2), (1, 4), (3, 5)]),
        (["schedule.keep=[0, 5]", "schedule.layers_per_stage=3"], [(1, 2, 3), (4,)]),
        (["schedule.keep=[2]", "schedule.layer_order=interleaved"], [(0, 3), (1, 5), (4,)]),
        (["schedule.layer_order=[[5, 0], [2]]"], [(0, 5), (2,)]),
        (["schedule.layer_order=[[4]]", "schedule.keep=[0, 1]"], [(4,)]),
    ],
)
def test_a_schedule_swaps_these_layers_in_this_order(overrides: list[str], stages: list[tuple[int, ...]]) -> None:
    *swapping, joint = only(*overrides).steps
    assert [step.train.new_layers for step in swapping] == stages  # type: ignore[attr-defined]
    assert [step.train.layers for step in swapping] == stages  # type: ignore[attr-defined]
    seen = [tuple(sorted(layer for stage in stages[: i + 1] for layer in stage)) for i in range(len(stages))]
    assert [step.swapped for step in swapping] == seen
    assert joint.joint
    assert (joint.train.layers, joint.train.new_layers, joint.swapped) == (seen[-1], (), seen[-1])  # type: ignore[attr-defined]


def test_without_phases_the_joint_stage_swaps_everything_at_once() -> None:
    (step,) = only("recipe.phases=[]", "schedule.keep=[3]").steps
    assert (step.train.layers, step.train.new_layers) == ((0, 1, 2, 4, 5), (0, 1, 2, 4, 5))  # type: ignore[attr-defined]


def test_without_joint_the_last_swap_is_the_end() -> None:
    assert [step.joint for step in only("recipe.joint=[]").steps] == [False] * 3


def test_a_path_is_a_chain_from_the_teacher() -> None:
    plan = planned()
    (trial,) = plan.trials
    parents = [step.train.parents["parent"] for step in trial.steps]
    assert parents == [plan.teacher.train.key, *keys(trial)[:-1]]
    for step in plan.steps:
        assert step.evaluate.subject == step.train.key
        assert step.evaluate.teacher == plan.teacher.train.key


def test_stages_come_after_their_parents_and_each_once() -> None:
    plan = planned("search.space={recipe.joint.0.losses: [{kl: 1}, {ce: 1}]}")
    seen: set[str] = set()
    for key, spec in plan.specs.items():
        assert set(spec.parents.values()) <= seen
        assert key == spec.key
        seen.add(key)
    assert {step.train.key for step in plan.steps} <= seen


def test_trials_share_what_they_begin_alike() -> None:
    first, second = planned("search.space={recipe.joint.0.losses: [{kl: 1}, {kl: 1, ce: 0.5}]}").trials
    assert keys(first)[:-1] == keys(second)[:-1]
    assert keys(first)[-1] != keys(second)[-1]


def test_a_joint_weight_changes_the_joint_stage_only() -> None:
    before, after = only(), only("recipe.joint.0.losses.ce=0.25")
    assert [a == b for a, b in zip(keys(before), keys(after), strict=True)] == [True, True, True, False]


def test_an_early_change_changes_everything_after_it() -> None:
    before, after = only(), only("recipe.phases.0.losses.ce=0.25")
    assert set(keys(before)).isdisjoint(keys(after))


def test_users_name_the_trials_of_a_shared_stage() -> None:
    plan = planned("search.space={schedule.layers_per_stage: [2, 6]}", "recipe.joint=[]")
    used = plan.users()
    assert sorted(used.values()) == [["trial-00"]] * 3 + [["trial-01"]]
    both = planned("search.space={recipe.joint.0.losses: [{kl: 1}, {ce: 1}]}")
    assert ["trial-00", "trial-01"] in both.users().values()


def test_tokens_and_the_place_in_the_text_run_on_along_a_path() -> None:
    steps = only("schedule.layers_per_stage=4").steps
    window = 2 * 32
    wanted_steps = [[4 * 640 // window, 5], [2 * 640 // window, 5], [100]]
    specs: list[Any] = [step.train for step in steps]
    assert [[phase.steps for phase in spec.phases] for spec in specs] == wanted_steps
    totals = [sum(map(sum, wanted_steps[: i + 1])) for i in range(3)]
    assert [step.tokens for step in steps] == [total * window for total in totals]
    assert [spec.first_sequence for spec in specs] == [0, totals[0] * 2, totals[1] * 2]
    assert sum(step.own_tokens for step in steps) == steps[-1].tokens


def test_a_budget_that_is_no_whole_number_of_steps_is_rounded_down() -> None:
    assert only("recipe.phases=[]", "recipe.joint.0.tokens=191").steps[0].tokens == 128


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["schedule.layer_order=[[7]]"],
            "schedule.layer_order: layer 7 does not exist: the teacher has 6 layers, 0 to 5",
        ),
        (["schedule.keep=[6]"], "schedule.keep: layer 6 does not exist: the teacher has 6 layers, 0 to 5"),
        (
            ["schedule.keep=[0, 1, 2, 3, 4, 5]"],
            "schedule.keep: every layer is kept as attention: leave at least one to swap",
        ),
        (["operator.heads=5"], "operator.heads: 5 must divide the teacher's width 128: give a divisor, for example 4"),
        (
            ["data.sequence_length=2048"],
            "data.sequence_length: 2048 exceeds the teacher's 1024 positions" + LOWER,
        ),
        (
            ["throughput.lengths=[32]"],
            "throughput.lengths: 32 must exceed decode_tokens (32) and be at most the teacher's 1024 positions",
        ),
        (
            ["evaluation.probes={lengths: [1024, 1025]}"],
            "evaluation.probes.lengths: 1025 exceeds the teacher's 1024 positions: lower it",
        ),
        (
            ["recipe.phases.1.tokens=63"],
            "recipe.phases.1.tokens: 63 tokens are less than one step of 64 (batch_size x sequence_length)" + RAISE,
        ),
        (
            ["recipe.joint.0.tokens=63"],
            "recipe.joint.0.tokens: 63 tokens are less than one step of 64 (batch_size x sequence_length)" + RAISE,
        ),
        (
            ["teacher.tokens=255"],
            "teacher.tokens: 255 tokens are less than one step of 256 (batch_size x sequence_length)" + RAISE,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_teacher_is_told_with_its_place(overrides: list[str], told: str) -> None:
    with pytest.raises(StudyError) as caught:
        planned(*overrides)
    assert str(caught.value) == f"--set {overrides[-1]}: {told}"


@pytest.mark.parametrize(
    ("axis", "column", "key"),
    [
        ("schedule.layer_order: [bottom_up, [[7]]]", 45, "schedule.layer_order"),
        ("operator.heads: [4, 5]", 31, "operator.heads"),
        ("recipe.joint.0.tokens: [640, 63]", 40, "recipe.joint.0.tokens"),
    ],
)
def test_what_does_not_fit_at_a_search_point_is_told_where_it_is_listed(axis: str, column: int, key: str) -> None:
    Path("study.yaml").write_text(STUDY.replace("space: {}", f"space: {{{axis}}}"), encoding="utf-8")
    document = read_document(Path("study.yaml"))
    with pytest.raises(StudyError, match=rf"^study\.yaml:16:{column}: {key}: "):
        make_plan(document, validate(document), RESOLVED)


def test_a_grid_is_the_product_of_its_axes_and_a_list_of_grids_their_union() -> None:
    assert sample(study_of("search.space={seed: [1, 2], schedule.layers_per_stage: [1, 3]}")) == [
        {"seed": seed, "schedule.layers_per_stage": size} for seed in (1, 2) for size in (1, 3)
    ]
    assert sample(study_of("search.space=[{seed: [1]}, {seed: [2, 1]}]")) == [{"seed": 1}, {"seed": 2}]


def test_random_points_are_seeded_within_their_bounds_and_distinct() -> None:
    axes = f"{LEARNING}: {{low: 1e-4, high: 1e-2, log: true}}, recipe.optimizer.matrix_lr: {{low: 0.1, high: 0.2}}"
    search = f"search={{method: random, trials: 40, space: {{{axes}, seed: [1, 2]}}}}"
    points = sample(study_of(search))
    assert points == sample(study_of(search))
    assert points != sample(study_of(search, "seed=1"))
    assert len(points) == 40
    assert all(1e-4 <= point[LEARNING] <= 1e-2 for point in points)
    assert all(0.1 <= point["recipe.optimizer.matrix_lr"] <= 0.2 for point in points)
    assert 10 < sum(point[LEARNING] < 1e-3 for point in points) < 30  # half of them, on a logarithmic scale
    few = sample(study_of("search={method: random, trials: 40, space: {seed: [1, 2]}}"))
    assert sorted(point["seed"] for point in few) == [1, 2]


def test_controls_are_every_skip_and_each_operator_from_scratch_on_the_longest_path() -> None:
    plan = planned(
        "controls.scratch=every", "search.space={operator: [{kind: hyena}, {kind: hyena, heads: 4}], seed: [0, 1]}"
    )
    assert set(plan.controls) == {"scratch hyena-2", "scratch hyena-4h", *(f"skip {i}" for i in ALL), "skip all"}
    skip, scratch = plan.controls["skip all"], plan.controls["scratch hyena-4h"]
    assert isinstance(skip.train, DistilSpec)
    assert isinstance(scratch.train, ScratchSpec)
    assert (skip.train.layers, skip.train.phases, skip.own_tokens) == (ALL, (), 0)
    assert scratch.train.operator == HyenaConfig(heads=4, init="random")
    assert scratch.own_tokens == max(trial.steps[-1].tokens for trial in plan.trials)
    assert scratch.train.optimizer.rest_scale == 1.0


@pytest.mark.parametrize("tokens", [[6400, 3200], [3200, 6400]])
def test_a_scratch_control_has_the_tokens_of_the_longest_path_wherever_that_is(tokens: list[int]) -> None:
    scratch = planned(f"search.space={{recipe.joint.0.tokens: {tokens}}}").controls["scratch hyena-4h"]
    assert scratch.own_tokens == scratch.tokens == planned().trials[0].steps[-1].tokens
    assert scratch.swapped == ALL


def test_heads_that_divide_no_width_are_told_with_one_that_does() -> None:
    odd = dataclasses.replace(RESOLVED, inner=121)
    for heads, near in ((2, 1), (12, 11), (4, 1)):
        with pytest.raises(StudyError, match=f"{heads} must divide the teacher's width 121: .* for example {near}$"):
            planned(f"operator.heads={heads}", resolved=odd)
    assert planned("operator.heads=11", resolved=odd).trials


def test_filters_may_be_as_long_as_the_teachers_positions() -> None:
    filters = "operator={{kind: hyena, filter: {{kind: fir, taps: {}}}}}"
    assert planned(filters.format(1024)).trials
    with pytest.raises(StudyError, match=r"operator\.filter\.taps: 1025 exceeds the teacher's 1024 positions"):
        planned(filters.format(1025))


def test_by_default_the_own_operator_is_the_one_trained_from_scratch() -> None:
    plan = planned("search.space={operator: [{kind: hyena}, {kind: hyena, heads: 4}]}")
    assert [name for name in plan.controls if name.startswith("scratch")] == ["scratch hyena-4h"]


def test_controls_can_be_left_out() -> None:
    assert planned("controls={skip: false, scratch: none}").controls == {}


def test_only_layers_with_attention_are_swapped_and_left_out() -> None:
    hybrid = dataclasses.replace(RESOLVED, sites=(1, 3, 5))
    plan = planned("schedule={layers_per_stage: 1, keep: [0, 3]}", resolved=hybrid)
    assert [step.swapped for step in plan.trials[0].steps] == [(1,), (1, 5), (1, 5)]
    skipped = {name: step.swapped for name, step in plan.controls.items() if name.startswith("skip")}
    assert skipped == {"skip 1": (1,), "skip 3": (3,), "skip 5": (5,), "skip all": (1, 3, 5)}
    assert plan.total_layers == 6
    with pytest.raises(StudyError, match="layer 2 has no softmax attention: those that have are 1, 3, 5"):
        planned("schedule={layer_order: [[1], [2, 3]]}", resolved=hybrid)


def test_the_teacher_trains_on_the_studys_text_or_is_imported() -> None:
    made = planned()
    assert isinstance(made.teacher.train, TeacherSpec)
    assert made.teacher.train.tokens == made.tokens.key
    pretrained = RESOLVED.architecture.model_copy(update={"pretrained": "w"})
    found = Resolved(RESOLVED.train, None, pretrained, "w", {}, ALL, 128)
    brought = planned("teacher={kind: pretrained, hub: a/b}", resolved=found)
    assert brought.teacher.train.parents == {}
    assert brought.tokens.teacher == brought.teacher.train.key
    assert brought.tokens.vocabulary is None
    assert list(brought.specs)[:2] == [brought.teacher.train.key, brought.tokens.key]


def test_a_plan_does_not_depend_on_the_folder_or_file_it_lies_in(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two/deeper"):
        base = tmp_path / name
        base.mkdir(parents=True)
        (base / "text.txt").write_text("the same text")
        path = base / f"{base.name}.yaml"
        path.write_text(STUDY, encoding="utf-8")
        document = read_document(path, ("data.train={source: text, files: [text.txt]}",))
        study = validate(document)
        found.append(make_plan(document, study, resolve(study, base)))
    assert list(found[0].specs) == list(found[1].specs)
    assert isinstance(found[0].tokens, TokensSpec)


@pytest.mark.parametrize(
    ("change", "same"),
    [("question=why?", True), ("study=other", True), ("search.early_stopping={}", True), ("seed=1", False)],
)
def test_only_what_decides_a_result_changes_keys(change: str, same: bool) -> None:
    swept = "search.space={operator.heads: [2, 4]}"
    assert (list(planned(swept).specs) == list(planned(swept, change).specs)) is same


def test_a_batch_is_shared_in_training_only() -> None:
    plan = planned("numerics.world_size=2", "numerics.sharding=full", "numerics.matmul=medium")
    training = [spec for spec in plan.specs.values() if getattr(spec, "phases", None) or hasattr(spec, "token_budget")]
    rest = [spec for spec in plan.specs.values() if spec not in training]
    assert {spec.world_size for spec in training} == {2}
    assert {spec.numerics.matmul for spec in training} == {"medium"}
    assert {spec.world_size for spec in [*rest, *throughput_specs(plan, "h").values()]} == {1}
    assert plan.teacher.evaluate.numerics == planned().teacher.evaluate.numerics


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["teacher.batch_size=5"], "teacher.batch_size: 5 sequences cannot be shared equally by numerics.world_size 2"),
        (["recipe.batch_size=3"], "recipe.batch_size: 3 sequences cannot be shared equally by numerics.world_size 2"),
    ],
)
def test_a_batch_that_cannot_be_shared_equally_is_told(overrides: list[str], told: str) -> None:
    with pytest.raises(StudyError) as caught:
        planned("numerics.world_size=2", *overrides)
    assert str(caught.value) == f"--set {overrides[0]}: {told}"
