"""Which models are probed, by what, and the keys of that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.study.loader import validate
from orchestrator.study.plan import make_plan
from orchestrator.study.spec import ProbesSpec
from tests.study.test_plan import RESOLVED, planned, read

PROBES = "evaluation.probes={windows: 4}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_probes_are_of_the_teacher_of_every_student_and_of_all_attention_skipped() -> None:
    plan = planned(PROBES, "controls.scratch=own")
    probed = [step.probes.subject for step in plan.steps if step.probes is not None]
    assert probed == [
        plan.teacher.train.key,
        plan.controls["skip all"].train.key,
        *(step.train.key for step in plan.trials[0].steps),
    ]
    wanted = ProbesSpec(
        tokens=plan.tokens.key, teacher=plan.teacher.train.key, subject=probed[-1], sequence_length=32, lengths=(32,),
        windows=4, needles=16, numerics=plan.teacher.evaluate.numerics, seed=0,
    )  # fmt: skip
    assert plan.trials[0].steps[-1].probes == wanted
    assert plan.specs[wanted.key] == wanted
    asked = planned("evaluation={seed: 5, probes: {lengths: [64, 16, 64], windows: 2, needles: 3}}").teacher.probes
    assert asked is not None
    assert (asked.lengths, asked.windows, asked.needles, asked.seed) == ((16, 64), 2, 3, 5)


def test_probes_change_no_other_key_and_none_of_theirs_but_by_their_own_settings() -> None:
    without, plain, other = planned(), planned(PROBES), planned("evaluation.probes={windows: 5}")
    assert all(step.probes is None and step.probed == () for step in without.steps)
    kinds = [
        {spec.key for spec in plan.specs.values() if (spec.kind == "probes") == probes}  # type: ignore[attr-defined]
        for plan in (without, plain, other)
        for probes in (False, True)
    ]
    assert kinds[0] == kinds[2] == kinds[4] and kinds[1] == set()
    assert len(kinds[3]) == len(kinds[5]) and kinds[3].isdisjoint(kinds[5])
    again = {key for key, spec in planned(PROBES, "evaluation.tokens=99").specs.items() if isinstance(spec, ProbesSpec)}
    assert again == kinds[3]


def test_a_students_probes_stand_beside_its_teachers_in_the_same_precision() -> None:
    plan = planned(PROBES, "search.space={numerics.dtype: [float32, bfloat16]}")
    steps = [trial.steps[0] for trial in plan.trials]
    for step, dtype in zip(steps, ("float32", "bfloat16"), strict=True):
        teacher, own = step.probed
        assert {teacher.numerics.dtype, own.numerics.dtype} == {dtype}
        assert (teacher.subject, own.subject) == (plan.teacher.train.key, step.train.key)
        assert {teacher.key, own.key} <= plan.specs.keys()
    assert plan.teacher.probed[0] == plan.teacher.probed[1] == steps[0].probed[0]


def test_a_model_with_one_layer_to_swap_has_probes_of_it_skipped() -> None:
    resolved = dataclasses.replace(RESOLVED, sites=(2,))
    document = read(PROBES, "schedule={layer_order: [[2]]}")
    plan = make_plan(document, validate(document), resolved)
    assert plan.controls["skip 2"].probes is not None
