"""What a student does not change of its teacher is in memory once."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from operators.config import HyenaConfig
from orchestrator.distill.models.student import (
    WEIGHTS,
    load_student,
    load_teacher,
    own_what_trains,
    parameter_count,
    save_student,
    sharing,
)
from orchestrator.distill.stage import STAGES, run_stage
from orchestrator.distill.training import loop
from orchestrator.distill.training.journal import read_journal
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import Architecture, DistilSpec, EvaluateSpec, PhaseSpec, ScratchSpec
from tests.distill.students import student_of
from tests.held import held_bytes
from tests.texts import random_tokens, write_tokens

LENGTH, BATCH = 16, 2


def spec_of(optimizer: Optimizer, **more: Any) -> DistilSpec:
    """Two steps after a swap of the second layer."""
    return DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(1,), new_layers=(1,), operator=HyenaConfig(), batch_size=BATCH,
        phases=(PhaseSpec(losses=Losses(kl=1.0), steps=2),), sequence_length=LENGTH, first_sequence=0,
        optimizer=optimizer, seed=0, **{"freeze": (), "numerics": Numerics(), **more},
    )  # fmt: skip


def inputs_of(teacher: Path, tmp_path: Path) -> dict[str, Path]:
    write_tokens(tmp_path / "tokens", train=random_tokens(LENGTH * 20), valid=random_tokens(LENGTH * 8))
    return {"tokens": tmp_path / "tokens", "teacher": teacher, "parent": teacher}


def held_in_a_step(place: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: DistilSpec) -> int:
    """Bytes between the second step's gradients and its update, without those that were there before the stage."""
    seen: list[int] = []
    usual = loop.average_gradients

    def look(parameters: Any) -> None:
        seen.append(held_bytes())
        usual(parameters)

    monkeypatch.setattr(loop, "average_gradients", look)
    before = held_bytes()
    run_stage(spec, place(inputs=inputs_of(teacher, tmp_path)))
    return seen[1] - before


def sizes(teacher: Path) -> tuple[int, int, int]:
    """Parameters of the teacher, of an operator in a layer of it, and of a student with that one."""
    student = student_of(teacher, {1: HyenaConfig()})
    operator = sum(p.numel() for n, p in student.named_parameters() if ".operator." in n)
    return parameter_count(load_teacher(teacher)), operator, parameter_count(student)


@pytest.mark.parametrize("teacher_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
def test_the_teacher_is_held_once_and_what_trains_four_times(
    place: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest_scale: float,
    teacher_dtype: Any,
) -> None:  # fmt: skip
    """Four bytes a number: of what trains weights, gradients and AdamW's two moments; tables and a batch beside."""
    whole, operator, student = sizes(tiny_teacher)
    spec = spec_of(
        Optimizer(method="adamw", rest_scale=rest_scale),
        numerics=Numerics(dtype="bfloat16", teacher_dtype=teacher_dtype),
    )
    found = held_in_a_step(place, tiny_teacher, tmp_path, monkeypatch, spec)
    teacher = (4 if teacher_dtype == "float32" else 2) * whole
    assert found == pytest.approx(teacher + 16 * (student if rest_scale else operator), rel=0.04)


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


def told_by(place: Any, name: str, inputs: dict[str, Path], spec: DistilSpec) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses and gradient norms of a stage, step by step, and the tensors of its student."""
    made = place(name, inputs, log_every=1)
    run_stage(spec, made)
    lines = [line["metrics"] for line in read_journal(made.journal)]
    told = [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]
    return told, load_file(made.out / WEIGHTS)


def of_narrow_numbers(folder: Path, to: Path) -> Path:
    """The folder of the same teacher with weights rounded to numbers of bfloat16."""
    shutil.copytree(folder, to)
    load_teacher(folder).bfloat16().float().save_pretrained(to)
    return to


def test_a_teacher_of_narrow_numbers_gives_the_same_bits_in_half_the_memory(
    place: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Of a stage that trains some, its evaluation, and of a stage after it."""
    teacher = of_narrow_numbers(tiny_teacher, tmp_path / "narrow")
    inputs, found = inputs_of(teacher, tmp_path), []
    for dtype in ("float32", "bfloat16"):
        numerics = Numerics(dtype="bfloat16", teacher_dtype=dtype)
        spec = spec_of(Optimizer(rest_scale=0.1), numerics=numerics, freeze=("*layers.2*", "*embed_in*"))
        first = told_by(place, f"{dtype} first", inputs, spec)
        after = {**inputs, "parent": tmp_path / f"{dtype} first" / "out-0"}
        second = told_by(
            place, f"{dtype} second", after, spec.model_copy(update={"new_layers": (0,), "layers": (0, 1)})
        )
        evaluation = EvaluateSpec(
            tokens="t", teacher="r", subject="s", sequence_length=LENGTH, numerics=numerics,
            evaluation=Evaluation(tokens=LENGTH * 4, prompts=2, prompt_tokens=4, new_tokens=3),
        )  # fmt: skip
        metrics = run_stage(evaluation, place(f"{dtype} evaluated", {**inputs, "subject": after["parent"]}))
        likelihood = {name: value for name, value in metrics.items() if "generation_" not in name}
        assert {"generation_agreement", "generation_prefix"} < metrics.keys() - likelihood.keys()
        found.append((first[0], second[0], likelihood))
        tensors = {**first[1], **{f"second {name}": tensor for name, tensor in second[1].items()}}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        found[-1] += (sorted(tensors), [tensors[name].tolist() for name in sorted(tensors)])
    assert found[0] == found[1]


def test_activations_made_again_give_the_same_bits(place: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    inputs = inputs_of(tiny_teacher, tmp_path)
    spec = spec_of(Optimizer(rest_scale=0.1))
    spec = spec.model_copy(update={"phases": (PhaseSpec(losses=Losses(kl=1.0, hidden_mse=0.5, ce=0.1), steps=3),)})
    kept = told_by(place, "kept", inputs, spec)
    again = told_by(place, "again", inputs, spec.model_copy(update={"checkpoint_activations": True}))
    assert kept[0] == again[0]
    assert all(torch.equal(tensor, again[1][name]) for name, tensor in kept[1].items())


@pytest.mark.parametrize("kind", ["distil", "scratch"])
def test_of_a_layer_only_its_input_is_kept(place: Any, tiny_teacher: Path, tmp_path: Path, kind: str) -> None:
    """Bytes that are kept for gradients in a step of a stage."""
    inputs, kept = inputs_of(tiny_teacher, tmp_path), []
    shape = Architecture(layers=3, hidden=32, heads=4, intermediate=64, max_length=96, vocabulary=300)
    scratch = ScratchSpec(
        tokens="t", teacher=None, architecture=shape, operator=HyenaConfig(), layers=(1,), token_budget=LENGTH * BATCH,
        batch_size=BATCH, sequence_length=LENGTH, optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    spec = spec_of(Optimizer(rest_scale=0.1)) if kind == "distil" else scratch
    for again in (False, True):
        total = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal total
            total += 0 if tensor.is_leaf else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run_stage(spec.model_copy(update={"checkpoint_activations": again}), place(f"{kind} {again}", inputs))
        kept.append(total)
    assert kept[1] < kept[0] / 3


def test_what_a_stage_held_is_gone_with_it(monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    """Models refer to themselves, by hooks and layers called otherwise, so that counting references is not enough."""
    held: list[weakref.ref[Tensor]] = []

    def stage(spec: Any, at: Any) -> dict[str, Any]:
        model = torch.nn.Linear(2, 2)
        model.itself = [model]  # type: ignore[assignment]
        held.append(weakref.ref(model.weight))
        return {}

    monkeypatch.setitem(STAGES, "distil", stage)
    run_stage(spec_of(Optimizer()), place())
    assert held[0]() is None
