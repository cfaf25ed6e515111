"""What a study says of memory, and the stages that it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import Architecture, EvaluateSpec, SourceIdentity

STUDY = """\
study: sized
teacher: {kind: pretrain, layers: 2, tokens: 4096}
data: {sequence_length: 32}
recipe: {phases: [{tokens: 640, losses: {kl: 1}}]}
throughput: {lengths: [64, 128]}
"""
SHAPE = Architecture(layers=2, hidden=128, heads=4, intermediate=512, max_length=1024, vocabulary=2048)
RESOLVED = Resolved(SourceIdentity(source="text", fingerprint="f"), None, SHAPE, None, {}, (0, 1), 128)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(*overrides: str) -> Plan:
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    document = read_document(Path("study.yaml"), overrides)
    return make_plan(document, validate(document), RESOLVED)


def test_how_the_teacher_is_held_is_no_matter_of_its_own_training_nor_of_a_student_from_scratch() -> None:
    wide, narrow = (planned("numerics.dtype=bfloat16", f"numerics.teacher_dtype={d}") for d in ("float32", "bfloat16"))
    assert wide.teacher.train == narrow.teacher.train
    for plan in (wide, narrow):
        scratch = [s.train for name, s in plan.controls.items() if name.startswith("scratch")]
        assert scratch and {step.numerics.teacher_dtype for step in scratch} == {"float32"}  # type: ignore[attr-defined]
    assert wide.teacher.evaluate.key != narrow.teacher.evaluate.key
    students = [step.train for trial in narrow.trials for step in trial.steps]
    assert {step.numerics.teacher_dtype for step in students} == {"bfloat16"}  # type: ignore[attr-defined]


def test_activations_are_made_again_in_every_stage_with_a_student() -> None:
    plan = planned("recipe.checkpoint_activations=true")
    asked = {spec.kind: spec.checkpoint_activations for spec in plan.specs.values() if hasattr(spec, "layers")}
    assert asked.keys() == {"distil", "scratch"}
    trained = [spec for spec in plan.specs.values() if getattr(spec, "phases", ()) or spec.kind == "scratch"]
    assert {spec.checkpoint_activations for spec in trained} == {True}


def test_every_evaluation_of_a_student_reads_the_teachers_own_on_the_same_text_in_the_same_precision() -> None:
    plan = planned("search.space={numerics.dtype: [float32, bfloat16]}")
    evaluations = [spec for spec in plan.specs.values() if isinstance(spec, EvaluateSpec)]
    students = [spec for spec in evaluations if spec.subject != plan.teacher.train.key]
    assert {spec.numerics.dtype for spec in students} == {"float32", "bfloat16"}
    order = list(plan.specs)
    for spec in students:
        reference = plan.specs[str(spec.reference)]
        assert reference == spec.of(plan.teacher.train.key) and reference.parents.keys() == {
            "tokens",
            "teacher",
            "subject",
        }
        assert order.index(reference.key) < order.index(spec.key)
    assert plan.teacher.evaluate.reference is None and plan.teacher.evaluate in evaluations
