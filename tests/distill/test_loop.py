"""What the training loop counts and clears: time, rates, gradients of what a step leaves out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.distill.context import newest_step
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training import journal as journal_module
from orchestrator.distill.training import loop
from orchestrator.distill.training.journal import NAME, Journal, read_journal
from orchestrator.distill.training.loop import Stopped, Training, autocast, prepare, train
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import Architecture, TeacherSpec
from tests.texts import write_tokens

STEADY = Optimizer(method="adamw", warmup=0.0, decay=0.0)


def training(steps: int, tokens: int = 10) -> Training:
    """A line that is fitted; every step is of so many tokens."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 0.1, "initial_lr": 0.1}])

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        value = model(torch.full((1, 2), step + 1.0)).square().sum()
        return value, {"loss/fit": value.detach()}

    return Training(model, [optimizer], STEADY, steps, tokens, loss)


class Clock:
    """Says 100, 107, 114 and so on."""

    def __init__(self) -> None:
        self.ticks = itertools.count(100.0, 7.0)

    def monotonic(self) -> float:
        return next(self.ticks)


def test_seconds_and_rates_are_those_of_the_clock(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at once at the beginning, once a line of the journal, once after each checkpoint, once at the end."""
    monkeypatch.setattr(loop, "time", Clock())
    made = place(checkpoint_seconds=1e9)
    result = train(training(steps=5), made)
    assert [line["step"] for line in read_journal(made.journal)] == [2, 4, 5]
    rates = [line["metrics"]["tokens_per_s"] for line in read_journal(made.journal)]
    assert rates == pytest.approx([2 * 10 / 7, 2 * 10 / 7, 1 * 10 / 7])
    assert result == pytest.approx({"seconds": 28.0, "tokens": 50, "tokens_per_s": 50 / 28, "resumed_at": 0})


def test_seconds_of_a_stopped_attempt_count_and_its_steps_do_not_come_again(
    place: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "time", Clock())
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match=r"^stopped at step 2 of 5$"):
        train(training(steps=5), place(checkpoint_seconds=1e9, stop=str(tmp_path / "stop")))
    (tmp_path / "stop").unlink()
    monkeypatch.setattr(loop, "time", Clock())
    made = place(checkpoint_seconds=1e9)
    assert newest_step(made.work) == 2
    result = train(training(steps=5), made)
    assert result == pytest.approx({"seconds": 7 + 21.0, "tokens": 50, "tokens_per_s": 50 / 28, "resumed_at": 2})
    rates = [line["metrics"]["tokens_per_s"] for line in read_journal(made.journal)]
    assert rates == pytest.approx([20 / 7, 20 / 7, 10 / 7])


@pytest.mark.parametrize(("patience", "steps"), [(13.0, [4]), (14.0, [4]), (15.0, [])])
def test_a_checkpoint_comes_when_so_many_seconds_have_gone(
    place: Any, monkeypatch: pytest.MonkeyPatch, patience: float, steps: list[int]
) -> None:
    monkeypatch.setattr(loop, "time", Clock())
    made = place(checkpoint_seconds=patience)
    train(training(steps=5), made)
    assert [int(path.name.removeprefix("step-")) for path in made.work.glob("step-*")] == steps


def test_a_checkpoint_that_takes_long_to_write_comes_rarely(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is seven seconds after the one before, so that writing takes seven."""
    monkeypatch.setattr(loop, "time", Clock())
    written: list[int] = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda work, step, *_: written.append(step))
    train(training(steps=100), place(checkpoint_seconds=13.0))
    assert written[0] == 4
    assert {b - a for a, b in itertools.pairwise(written)} == {2 * 33}  # 231 seconds, for writing to be 3 % of


def test_what_a_step_leaves_out_does_not_move_in_it(place: Any) -> None:
    """Phases leave parameters out; neither momentum nor weight decay may move them."""
    model = nn.ParameterList([torch.ones(3), torch.ones(3)])
    optimizer = torch.optim.AdamW([{"params": list(model), "lr": 0.1, "initial_lr": 0.1}], weight_decay=0.5)
    seen = []

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append([parameter.detach().clone() for parameter in model])
        return (model[0].sum() + model[1].sum() if step == 0 else model[0].sum()), {}

    train(Training(model, [optimizer], STEADY, 3, 1, loss), place())
    assert not torch.equal(seen[1][1], seen[0][1])
    assert torch.equal(seen[2][1], seen[1][1]) and torch.equal(model[1], seen[1][1])
    assert not torch.equal(seen[2][0], seen[1][0])


def test_new_memory_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    prepare(Numerics())
    assert torch.utils.deterministic.fill_uninitialized_memory is False


def test_a_journal_whose_first_line_is_torn_is_read_from_the_second(tmp_path: Any) -> None:
    (tmp_path / NAME).write_bytes(b'{"step": 1, "tok')
    journal = Journal(tmp_path)
    journal.write(2, 20, {"loss": 1.0})
    journal.close()
    assert [line["step"] for line in read_journal(tmp_path)] == [2]


def test_without_a_checkpoint_training_would_go_on_from_the_beginning(tmp_path: Any) -> None:
    assert newest_step(tmp_path) == newest_step(tmp_path / "none") == 0
    for step in (7, 1_000_000, 999_999):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert newest_step(tmp_path) == 1_000_000


def test_a_line_has_the_time_to_the_millisecond(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module.time, "time", lambda: 1234.56789)
    journal = Journal(tmp_path)
    journal.write(2, 20, {"loss": 1.0})
    journal.close()
    assert read_journal(tmp_path) == [{"step": 2, "tokens": 20, "time": 1234.568, "metrics": {"loss": 1.0}}]


def test_a_budget_of_tokens_is_whole_batches(place: Any, tmp_path: Any) -> None:
    write_tokens(tmp_path, train=range(60))
    shape = Architecture(layers=1, hidden=8, heads=1, intermediate=8, max_length=6, vocabulary=60)
    spec = TeacherSpec(
        tokens="t", architecture=shape, token_budget=40, batch_size=2, sequence_length=6, optimizer=STEADY,
        numerics=Numerics(), seed=0,
    )  # fmt: skip
    made = place(inputs={"tokens": tmp_path})
    result = run_stage(spec, made)
    assert (result["tokens"], result["resumed_at"]) == (36, 0)
    assert result["parameters"] == sum(p.numel() for p in load_teacher(made.out).parameters())
    assert [(line["step"], line["tokens"]) for line in read_journal(made.journal)] == [(2, 24), (3, 36)]


@pytest.mark.parametrize(("numerics", "kept"), [({}, True), ({"world_size": 2, "sharding": "full"}, False)])
def test_narrow_copies_of_weights_are_kept_where_the_weights_are(numerics: dict[str, Any], kept: bool) -> None:
    with autocast(Numerics(dtype="bfloat16", **numerics), "cpu"):
        assert torch.is_autocast_cache_enabled() == kept
