"""What a student does not change of its teacher is in memory once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from operators.config import HyenaConfig
from orchestrator.distill.models.student import (
    load_student,
    load_teacher,
    own_what_trains,
    parameter_count,
    save_student,
    sharing,
)
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training import loop
from orchestrator.study.schema import Losses, Numerics, Optimizer
from orchestrator.study.spec import DistilSpec, PhaseSpec
from tests.distill.students import student_of
from tests.held import held_bytes
from tests.texts import random_tokens, write_tokens

LENGTH, BATCH = 16, 2


def held_in_a_step(
    place: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Optimizer
) -> int:
    """Bytes between the second step's gradients and its update, without those that were there before the stage."""
    write_tokens(tmp_path / "tokens", train=random_tokens(LENGTH * 20))
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(1,), new_layers=(1,), operator=HyenaConfig(), batch_size=BATCH,
        phases=(PhaseSpec(losses=Losses(kl=1.0), steps=2),), sequence_length=LENGTH, first_sequence=0, freeze=(),
        optimizer=optimizer, numerics=Numerics(), seed=0,
    )  # fmt: skip
    seen: list[int] = []
    usual = loop.average_gradients

    def look(parameters: Any) -> None:
        seen.append(held_bytes())
        usual(parameters)

    monkeypatch.setattr(loop, "average_gradients", look)
    before = held_bytes()
    run_stage(spec, place(inputs={"tokens": tmp_path / "tokens", "teacher": teacher, "parent": teacher}))
    return seen[1] - before


def sizes(teacher: Path) -> tuple[int, int, int]:
    """Parameters of the teacher, of an operator in a layer of it, and of a student with that one."""
    student = student_of(teacher, {1: HyenaConfig()})
    operator = sum(p.numel() for n, p in student.named_parameters() if ".operator." in n)
    return parameter_count(load_teacher(teacher)), operator, parameter_count(student)


@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
def test_the_teacher_is_held_once_and_what_trains_four_times(
    place: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest_scale: float
) -> None:
    """Four bytes a number: of what trains weights, gradients and AdamW's two moments; tables and a batch beside."""
    whole, operator, student = sizes(tiny_teacher)
    optimizer = Optimizer(method="adamw", rest_scale=rest_scale)
    found = held_in_a_step(place, tiny_teacher, tmp_path, monkeypatch, optimizer)
    assert found == pytest.approx(4 * whole + 16 * (student if rest_scale else operator), rel=0.03)


def test_only_what_trains_leaves_the_teachers_place(tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    student = sharing(teacher)
    theirs = dict(teacher.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in student.named_parameters())
    student.get_parameter("lm_head.weight").requires_grad_(True)
    own_what_trains(student, teacher)
    own = {name for name, p in student.named_parameters() if p.data_ptr() != theirs[name].data_ptr()}
    assert own == {"lm_head.weight"}
    assert torch.equal(student.get_parameter("lm_head.weight"), theirs["lm_head.weight"])
    assert not any(p.requires_grad for p in theirs.values())


def test_a_tied_head_stays_tied(tied_teacher: Path) -> None:
    student = sharing(load_teacher(tied_teacher))
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_loading_a_student_leaves_the_teacher_as_it_is(tiny_teacher: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    teacher = load_teacher(tiny_teacher)
    changed = student_of(tiny_teacher, {1: HyenaConfig()})
    with torch.no_grad():
        changed.get_parameter("lm_head.weight").add_(0.01)
    save_student(changed, teacher.state_dict(), tmp_path)
    student = load_student(tmp_path, sharing(teacher))
    theirs, names, untouched = (dict(m.named_parameters()) for m in (teacher, student, load_teacher(tiny_teacher)))
    assert all(torch.equal(p, theirs[name]) for name, p in untouched.items())
    shared = {name for name, p in theirs.items() if name in names and p.data_ptr() == names[name].data_ptr()}
    assert theirs.keys() & names.keys() - shared == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, changed(input_ids=ids).logits)
