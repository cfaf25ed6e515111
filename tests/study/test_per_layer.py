"""Operators by layer: what a file may say of them, what of it a stage has, and what people read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from operators.config import HyenaConfig, SkipConfig, WindowConfig
from orchestrator.record.records import trial_words
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.names import operator_name
from orchestrator.study.placing import PerLayer, placed_in, placing
from orchestrator.study.plan import Plan, make_plan, stage_memory, throughput_specs
from orchestrator.study.spec import ScratchSpec, spec_from_json
from tests.study.test_path import RESOLVED

STUDY = """
study: layers
data: {sequence_length: 64}
operator: %s
schedule: {%s}
recipe:
  batch_size: 2
  phases: [{tokens: 512, losses: {kl: 1.0}}]
throughput: {lengths: [64], decode_tokens: 4}
"""
TWO, HEADS = HyenaConfig(), HyenaConfig(heads=4)
MIXED = "{default: {kind: hyena}, layers: {2: {kind: hyena, heads: 4}}}"


def planned(folder: Path, operator: str, schedule: str = "layers_per_stage: 2", *overrides: str) -> Plan:
    file = folder / "study.yaml"
    file.write_text(STUDY % (operator, schedule), encoding="utf-8")
    document = read_document(file, overrides)
    return make_plan(document, validate(document), RESOLVED)


def test_a_layer_has_its_own_operator_or_the_default(tmp_path: Path) -> None:
    operator = planned(tmp_path, MIXED).study.operator
    assert operator == PerLayer(default=TWO, layers={"2": HEADS})
    assert [operator.of(layer) for layer in range(4)] == [TWO, TWO, HEADS, TWO]
    assert hash(operator) == hash(operator.model_copy())


def test_a_placing_does_not_depend_on_how_it_is_written() -> None:
    assert placing({3: TWO, 1: TWO}) == TWO
    assert placing({0: HEADS, 1: TWO, 2: TWO}) == PerLayer(default=TWO, layers={"0": HEADS})
    assert placing({1: TWO, 0: HEADS}) == PerLayer(default=HEADS, layers={"1": TWO})  # as often: the lowest layer's
    one = PerLayer(default=TWO, layers={"0": HEADS, "1": HEADS, "9": SkipConfig()})
    other = PerLayer(default=HEADS, layers={"2": TWO, "3": TWO})
    assert placed_in(one, (0, 1, 2)) == placed_in(other, (0, 1, 2)) == PerLayer(default=HEADS, layers={"2": TWO})
    assert placed_in(one, (2, 3)) == TWO and placed_in(HEADS, ()) == HEADS


def test_stages_whose_layers_have_one_operator_are_those_of_a_study_that_has_it_everywhere(tmp_path: Path) -> None:
    mixed = planned(tmp_path, MIXED).trials[0].steps
    plain = planned(tmp_path, "{kind: hyena}").trials[0].steps
    assert mixed[0].train.key == plain[0].train.key != mixed[1].train.key
    assert mixed[1].train.operator == placing({2: HEADS, 3: TWO})
    assert mixed[1].operator == placing({0: TWO, 1: TWO, 2: HEADS, 3: TWO})
    uniform = planned(tmp_path, "{default: {kind: hyena}, layers: {1: {kind: hyena}}}")
    whole = planned(tmp_path, "{kind: hyena}")
    assert set(uniform.specs) == set(whole.specs)
    assert throughput_specs(uniform, "h") == throughput_specs(whole, "h")


def test_all_that_a_student_has_is_measured_and_trained_from_scratch(tmp_path: Path) -> None:
    plan = planned(tmp_path, MIXED)
    last = plan.trials[0].steps[-1]
    bare = placing({layer: HyenaConfig(heads=4 if layer == 2 else None, init="random") for layer in range(4)})
    assert throughput_specs(plan, "h")[last.train.key].operator == bare
    (scratch,) = [step.train for step in plan.controls.values() if isinstance(step.train, ScratchSpec)]
    assert (scratch.operator, scratch.layers) == (bare, (0, 1, 2, 3))
    for spec in plan.specs.values():
        assert spec_from_json(spec.model_dump_json()) == spec


def test_memory_is_of_the_operators_in_their_layers(tmp_path: Path) -> None:
    """Between those of the students that have one of them everywhere, by the share of its layers."""
    found = []
    for operator in ("{kind: hyena, order: 4}", MIXED.replace("heads: 4", "order: 4"), "{kind: hyena}"):
        plan = planned(tmp_path, operator, "layer_order: [[0], [1], [2], [3]]")
        last = plan.trials[0].steps[-1]
        found.append(stage_memory(plan, {}, "cpu")[last.evaluate.key].bytes)
    most, mixed, least = found
    assert mixed - least == pytest.approx((most - least) / 4, abs=2)


def test_operators_by_layer_have_a_name(tmp_path: Path) -> None:
    layers = {"5": HEADS, "11": HEADS, "3": WindowConfig()}
    assert operator_name(PerLayer(default=TWO, layers=layers)) == "hyena-2 + window-64 in 3 + hyena-4h in 5,11"
    plan = planned(tmp_path, "{kind: hyena}", "keep: []", f"search.space.operator=[{{kind: hyena}}, {MIXED}]")
    assert list(trial_words(plan).values()) == ["operator=hyena-2", "operator=hyena-2 + hyena-4h in 2"]


def test_one_value_of_one_layer_is_swept(tmp_path: Path) -> None:
    plan = planned(tmp_path, MIXED, "keep: []", "search.space={operator.layers.2.heads: [2, 4]}")
    found = [json.loads(trial.study.operator.model_dump_json())["layers"]["2"]["heads"] for trial in plan.trials]
    assert found == [2, 4]


BESIDE = "{default: {kind: hyena}, layers: {%s}}"


@pytest.mark.parametrize(
    ("operator", "schedule", "told"),
    [
        (BESIDE % "4: {kind: hyena}", "", r"4:45: operator.layers.4: layer 4 does not exist"),
        (BESIDE % "1: {kind: hyena}", "keep: [1]", r"layers.1: .*schedule.keep and stays attention: take it out"),
        (BESIDE % "1: {kind: skip}", "layer_order: [[0], [3]]", r"4:45: operator.layers.1: layer 1 is never swapped"),
        (BESIDE % "1: {kind: hyena, heads: 5}", "", r"4:62: operator.layers.1.heads: 5 must divide the teacher's"),
        ("{default: {kind: hyena, heads: 5}, layers: {1: {kind: skip}}}", "", r"4:35: operator.default.heads: 5 must"),
        (BESIDE % "", "", r"4:36: operator.layers: must have at least 1 item"),
        ("{layers: {1: {kind: hyena}}}", "", r"operator.default: this key is missing"),
        (BESIDE % "1: {kind: hyna}", "", r"operator.layers.1.kind: unknown kind hyna; did you mean hyena"),
        (BESIDE % "1: {kind: hyena, haeds: 2}", "", r"operator.layers.1.haeds: unknown key; did you mean heads"),
        (BESIDE % "one: {kind: hyena}", "", r"4:45: operator.layers.one: must match"),
        (BESIDE % "01: {kind: hyena}", "", r"operator.layers: a key must be a plain word, got 01"),
        (BESIDE % "1: {kind: skip}, 1: {kind: hyena}", "", r"operator.layers.1: this key stands twice"),
        ("{kind: rnn}", "", r"operator.kind: unknown kind rnn; allowed here: hyena, window, skip$"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(tmp_path: Path, operator: str, schedule: str, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        planned(tmp_path, operator, schedule or "layers_per_stage: 2")


def test_a_layer_without_softmax_attention_has_no_operator(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY % (BESIDE % "1: {kind: skip}", ""), encoding="utf-8")
    document = read_document(tmp_path / "study.yaml")
    with pytest.raises(StudyError, match=r"operator.layers.1: layer 1 has no softmax attention: .* have are 0, 2, 3"):
        make_plan(document, validate(document), dataclasses.replace(RESOLVED, sites=(0, 2, 3)))
