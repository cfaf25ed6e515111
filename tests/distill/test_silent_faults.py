"""Losses that look right and train the wrong thing: faults that others shipped, and how each shows here.

A stage that trained on the beginning of each sequence only, half a cross-entropy, weights that never moved, rows of a
batch that know each other. What chunks change is in `test_losses`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from orchestrator.distill import stage
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.losses import batch_losses
from orchestrator.study.recipe import LogitKL, Losses, Numerics, Optimizer
from orchestrator.study.spec import DistilSpec, PhaseSpec
from tests.texts import random_tokens, write_tokens

LAYERS = (0, 2)
LOSSES = {
    "mixer_mse": Losses(mixer_mse=1.0),
    "hidden_mse": Losses(hidden_mse=1.0),
    "kl": Losses(kl=1.0),
    "reverse kl": Losses(kl=LogitKL(direction="reverse", temperature=2.0)),
    "ce": Losses(ce=1.0),
}
POWER = HyenaConfig(
    heads=4, feature_map="power", key_dim=8, normalise=True, key_gate=True,
    filter=ImplicitFilterConfig(positive=True, width=16, features=9),
)  # fmt: skip
OPERATORS = {"order 2": HyenaConfig(), "order 3": HyenaConfig(order=3), "heads": HyenaConfig(heads=4), "power": POWER,
             "modal": HyenaConfig(heads=4, filter=ModalFilterConfig(modes=4))}  # fmt: skip


@pytest.fixture
def student(tiny_teacher: Path) -> Any:
    model = load_teacher(tiny_teacher)
    swap(model, LAYERS, HyenaConfig(heads=4), torch.Generator().manual_seed(0))
    return model.requires_grad_(True)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ce"])
def test_a_student_that_is_its_teacher_has_no_loss(student: Any, ids: Tensor, name: str) -> None:
    total, _ = batch_losses(student, student, ids, LAYERS, LOSSES[name])
    assert total.item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_every_position_of_every_row_is_trained(teacher: Any, student: Any, ids: Tensor, name: str) -> None:
    """By the gradient of what the loss looks at: all positions, or all that have a next token."""
    looked_at: nn.Module = student.gpt_neox
    if name == "mixer_mse":
        looked_at = attention_of(student, 2)
    elif name == "hidden_mse":
        looked_at = student.gpt_neox.layers[2]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        value = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
        value.retain_grad()
        outputs.append(value)

    looked_at.register_forward_hook(keep)
    batch_losses(teacher, student, ids, LAYERS, LOSSES[name])[0].backward()  # type: ignore[no-untyped-call]
    [x_BLD] = outputs
    assert x_BLD.grad is not None
    sizes_BL = x_BLD.grad.norm(dim=-1)
    if "mse" not in name:
        assert not sizes_BL[:, -1].any()
        sizes_BL = sizes_BL[:, :-1]
    assert (sizes_BL > 1e-3 * sizes_BL.median()).all()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_a_batch_do_not_know_each_other(teacher: Any, student: Any, ids: Tensor, name: str) -> None:
    together, _ = batch_losses(teacher, student, ids, LAYERS, LOSSES[name])
    alone = [batch_losses(teacher, student, row[None], LAYERS, LOSSES[name])[0] for row in ids]
    assert alone[0].item() != pytest.approx(alone[1].item(), rel=1e-3)
    assert together.item() == pytest.approx(sum(one.item() for one in alone) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_tensor_that_trains_moves(
    place: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: str, dtype: Any
) -> None:
    """In two steps: what reads a tensor that starts at zero has no gradient in the first."""
    write_tokens(tmp_path, train=random_tokens(320))
    moved: dict[str, bool] = {}
    real = stage.train

    def looking(training: Any, made: Any) -> Any:
        trained = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        result = real(training, made)
        moved.update({name: not torch.equal(p, before[name]) for name, p in trained.items()})
        return result

    monkeypatch.setattr(stage, "train", looking)
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=LAYERS, new_layers=LAYERS, operator=OPERATORS[operator],
        phases=(PhaseSpec(losses=Losses(kl=1.0, ce=0.1), steps=2),), batch_size=2, sequence_length=16,
        first_sequence=0, freeze=(), optimizer=Optimizer(warmup=0.0, decay=0.0), numerics=Numerics(dtype=dtype), seed=0,
    )  # fmt: skip
    run_stage(spec, place(inputs={"tokens": tmp_path, "teacher": tiny_teacher, "parent": tiny_teacher}))
    assert len(moved) > 40
    assert [name for name, has in moved.items() if not has] == []
