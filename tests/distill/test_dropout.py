"""Distillation knows no dropout, whatever the teacher's configuration says; training on the text keeps it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from operators.config import HyenaConfig
from orchestrator.distill import stage
from orchestrator.distill.context import Workplace
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.journal import read_journal
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.spec import Architecture, DistilSpec, PhaseSpec, ScratchSpec
from tests.texts import random_tokens, write_tokens

LENGTH = 16


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens", train=random_tokens(40 * LENGTH))


@pytest.fixture(params=["attention_dropout", "hidden_dropout"])
def dropping(request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path: Path) -> Path:
    """The tiny teacher with a tenth of something dropped in training."""
    folder = tmp_path / "dropping"
    shutil.copytree(tiny_teacher, folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {request.param: 0.1}))
    return folder


def distilled(place: Any, text: Path, teacher: Path, layers: tuple[int, ...], losses: Losses) -> Workplace:
    made: Workplace = place(
        "-".join(map(str, layers)) or "none", {"tokens": text, "teacher": teacher, "parent": teacher}, log_every=1
    )
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=layers or (0, 1, 2), new_layers=layers, operator=HyenaConfig(),
        phases=(PhaseSpec(losses=losses, steps=1),), batch_size=4, sequence_length=LENGTH, first_sequence=0, freeze=(),
        optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    run_stage(spec, made)
    return made


def test_a_student_that_is_the_teacher_has_no_loss(place: Any, text: Path, dropping: Path) -> None:
    made = distilled(place, text, dropping, (), Losses(kl=1.0, hidden_mse=1.0))
    metrics = read_journal(made.journal)[0]["metrics"]
    assert (metrics["loss/kl"], metrics["loss/hidden_mse"]) == (0.0, 0.0)


def modes(model: Any) -> dict[bool, set[bool]]:
    """Whether modules are in training mode, by whether they are of a swapped layer."""
    found: dict[bool, set[bool]] = {}
    for name, module in model.named_modules():
        found.setdefault(".operator" in name, set()).add(module.training)
    return found


def test_operators_are_distilled_in_training_mode(
    place: Any, text: Path, dropping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = stage.batch_losses, []

    def looking(teacher: Any, student: Any, *more: Any) -> Any:
        seen.append((modes(teacher), modes(student)))
        return real(teacher, student, *more)

    monkeypatch.setattr(stage, "batch_losses", looking)
    distilled(place, text, dropping, (1,), Losses(kl=1.0))
    [(teacher, student)] = seen
    assert teacher == {False: {False}}
    assert student[True] == {True}


def test_the_control_from_scratch_keeps_the_dropout_of_its_configuration(
    place: Any, text: Path, dropping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = stage.next_token_loss, []

    def looking(model: Any, ids_BL: torch.Tensor) -> Any:
        seen.append(modes(model))
        assert not torch.equal(real(model, ids_BL), real(model, ids_BL))
        return real(model, ids_BL)

    monkeypatch.setattr(stage, "next_token_loss", looking)
    shape = Architecture(layers=3, hidden=32, heads=4, intermediate=64, max_length=96, vocabulary=300)
    spec = ScratchSpec(
        tokens="t", teacher="r", architecture=shape, operator=HyenaConfig(init="random"), layers=(1,), batch_size=4,
        token_budget=4 * LENGTH, sequence_length=LENGTH, optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    run_stage(spec, place("scratch", {"tokens": text, "teacher": dropping}))
    assert seen == [{False: {True}, True: {True}}]
