"""What a checkpoint holds, how many are kept, and what is not taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.distill.training.checkpoint import load_checkpoint, save_checkpoint

Pair = tuple[nn.Module, list[torch.optim.Optimizer]]


def pair(steps: int = 0, width: int = 3) -> Pair:
    """A model after some steps, of which one parameter is frozen, with its optimizers."""
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    model.bias.requires_grad_(False)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([model.weight], lr=0.1)]
    for step in range(steps):
        model(torch.full((1, width), step + 1.0)).sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    return model, optimizers


def test_without_a_checkpoint_training_begins_at_the_beginning(tmp_path: Path) -> None:
    model, optimizers = pair()
    assert load_checkpoint(tmp_path / "work", model, optimizers, print) == (0, 0.0)


def test_a_checkpoint_restores_parameters_optimizer_and_random_state(tmp_path: Path) -> None:
    model, optimizers = pair(steps=3)
    save_checkpoint(tmp_path, 3, 1.5, model, optimizers)
    drawn = torch.rand(4)
    other, its = pair()
    assert load_checkpoint(tmp_path, other, its, print) == (3, 1.5)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]
    for name, value in optimizers[0].state_dict()["state"][0].items():
        assert torch.equal(its[0].state_dict()["state"][0][name], value), name


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 200_000, 1_000_000):
        save_checkpoint(tmp_path, step, 0.0, *pair(steps=1))
    assert load_checkpoint(tmp_path, *pair(), print)[0] == 1_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"step-200000", "step-1000000"}


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *pair(steps=1))
    (tmp_path / ".step-000008.0badcafe.tmp").mkdir()
    assert load_checkpoint(tmp_path, *pair(), print) == (4, 0.0)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *pair(steps=1))
    model, optimizers = pair(steps=2)
    save_checkpoint(tmp_path, 4, 0.0, model, optimizers)
    other, its = pair()
    load_checkpoint(tmp_path, other, its, print)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *pair(steps=1))
    model, optimizers = pair()
    model.bias.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"holds other parameters than the stage trains: \['model/bias'\]"):
        load_checkpoint(tmp_path, model, optimizers, print)
