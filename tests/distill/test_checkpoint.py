"""What a checkpoint holds, how many are kept, and what is not taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.distill.training import checkpoint
from orchestrator.distill.training.checkpoint import Pace, expected_seconds, load_checkpoint, save_checkpoint

State = tuple[nn.Module, list[torch.optim.Optimizer], dict[str, torch.Tensor]]


def state(steps: int = 0, width: int = 3) -> State:
    """A model after some steps, of which one parameter is frozen, its optimizers, and no average."""
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    model.bias.requires_grad_(False)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([model.weight], lr=0.1)]
    for step in range(steps):
        model(torch.full((1, width), step + 1.0)).sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    return model, optimizers, {}


def test_without_a_checkpoint_training_begins_at_the_beginning(tmp_path: Path) -> None:
    model, optimizers, none = state()
    assert load_checkpoint(tmp_path / "work", model, optimizers, none, print) == (0, 0.0)


def test_a_checkpoint_restores_parameters_optimizer_and_random_state(tmp_path: Path) -> None:
    model, optimizers, none = state(steps=3)
    save_checkpoint(tmp_path, 3, 1.5, model, optimizers, none)
    drawn = torch.rand(4)
    other, its, none = state()
    assert load_checkpoint(tmp_path, other, its, none, print) == (3, 1.5)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]
    for name, value in optimizers[0].state_dict()["state"][0].items():
        assert torch.equal(its[0].state_dict()["state"][0][name], value), name


def test_a_checkpoint_restores_the_average_in_place(tmp_path: Path) -> None:
    model, optimizers, _ = state(steps=1)
    save_checkpoint(tmp_path, 1, 0.0, model, optimizers, {"weight": torch.full((3, 3), 7.0)})
    average = {"weight": torch.zeros(3, 3)}
    load_checkpoint(tmp_path, model, optimizers, average, print)
    assert average["weight"].tolist() == [[7.0] * 3] * 3
    assert (model.weight != 7.0).all()  # type: ignore[operator,union-attr]


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 200_000, 1_000_000):
        save_checkpoint(tmp_path, step, 0.0, *state(steps=1))
    assert load_checkpoint(tmp_path, *state(), print)[0] == 1_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"step-200000", "step-1000000"}


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *state(steps=1))
    (tmp_path / ".step-000008.0badcafe.tmp").mkdir()
    assert load_checkpoint(tmp_path, *state(), print) == (4, 0.0)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *state(steps=1))
    model, optimizers, none = state(steps=2)
    save_checkpoint(tmp_path, 4, 0.0, model, optimizers, none)
    other, its, none = state()
    load_checkpoint(tmp_path, other, its, none, print)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, 0.0, *state(steps=1))
    model, optimizers, none = state()
    model.bias.requires_grad_(True)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"holds other parameters than the stage trains: \['model/bias'\]"):
        load_checkpoint(tmp_path, model, optimizers, none, print)


@pytest.mark.parametrize("cost", [0.001, 0.5, 40.0])
@pytest.mark.parametrize("every", [2.0, 15.0])
def test_writing_takes_at_most_a_share_of_the_time_and_comes_as_often_as_asked_where_it_is_cheap(
    cost: float, every: float
) -> None:
    """A clock that stands at a log step every tenth of a second."""
    pace, now, spent, gaps = Pace(every, 0.0, cost), 0.0, 0.0, []
    while now < 10_000:
        now += 0.1
        if pace.due(now):
            gaps.append(now - pace.last)
            pace.written(now, now + cost)
            now, spent = now + cost, spent + cost
    assert 0 < spent <= 0.03 * now
    assert min(gaps) >= every
    assert max(gaps) == pytest.approx(max(every, cost * 97 / 3), abs=0.2)


def test_with_no_interval_every_time_is_due() -> None:
    assert Pace(0.0, 5.0, 1e9).due(5.0)


def test_the_first_is_expected_to_take_what_its_bytes_take() -> None:
    model, *_ = state(width=1000)
    assert expected_seconds(model) == pytest.approx(3 * 4 * 1000**2 / 5e8)  # the bias is frozen


def test_what_is_written_is_what_trains_and_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers, none = state(steps=1)
    given: dict[str, torch.Tensor] = {}
    usual = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: (given.update(tensors), usual(tensors, path)))
    save_checkpoint(tmp_path, 1, 0.0, model, optimizers, none)
    moments = {f"optimizer/0/0/{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    assert given.keys() == {"model/weight", "random"} | moments
    own = optimizers[0].state_dict()["state"][0]
    kept = {"model/weight": model.weight} | {f"optimizer/0/0/{name}": value for name, value in own.items()}
    assert {name: given[name].data_ptr() for name in kept} == {n: t.data_ptr() for n, t in kept.items()}  # type: ignore[union-attr,operator]
