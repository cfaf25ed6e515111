"""Training that is killed and started again ends with the bits and the history of training that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from operators import native
from operators.config import HyenaConfig
from orchestrator.distill import stage
from orchestrator.distill.context import Workplace, newest_step
from orchestrator.distill.models.student import WEIGHTS
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.journal import NAME, Journal, read_journal
from orchestrator.distill.training.loop import NonFiniteLoss, Stopped, Training, autocast, prepare, train
from orchestrator.distill.training.optimizers import schedule
from orchestrator.study.recipe import Average, Losses, Numerics, Optimizer
from orchestrator.study.spec import Architecture, DistilSpec, PhaseSpec, TeacherSpec
from tests.texts import random_tokens, write_tokens

STEPS = 11
CONFIG = Optimizer(warmup=0.2, decay=0.4)


class Killed(BaseException):
    """Stands for a process that ends without a chance to tidy up."""


def die_at_the_sixth(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the process of a stage end at its sixth call of `stage.name`, and go on when it is called again."""
    real, calls = getattr(stage, name), iter(range(100))

    def dying(*words: Any) -> Any:
        if next(calls) == 5:
            raise Killed
        return real(*words)

    monkeypatch.setattr(stage, name, dying)


def training(killed_at: int | None = None, poison: float = 0.0, device: str = "cpu") -> Training:
    """A small model with dropout, so that the random state matters, under Muon and AdamW."""
    prepare(Numerics(), seed=0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1)).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([{"params": matrices, "lr": 0.02, "initial_lr": 0.02}], lr=0.02),
        torch.optim.AdamW([{"params": rest, "lr": 0.01, "initial_lr": 0.01}], lr=0.01),
    ]

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == killed_at:
            raise Killed
        x_BD = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(device)
        value = (model(x_BD) - x_BD.sum(-1, keepdim=True)).pow(2).mean()
        value = value * poison if poison and step == 6 else value
        return value, {"loss/fit": value.detach()}

    return Training(model, optimizers, CONFIG, STEPS, 10, loss)


def history(made: Workplace) -> list[dict[str, Any]]:
    """The journal without what the clock says."""
    lines = read_journal(made.journal)
    for line in lines:
        del line["time"], line["metrics"]["tokens_per_s"]
    return lines


def bits(model: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


def uninterrupted(place: Any) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    whole, made = training(), place("whole")
    assert train(whole, made)["tokens"] == STEPS * 10
    return bits(whole.model), history(made)


def folders(made: Workplace) -> list[str]:
    return sorted(path.name for path in made.work.iterdir())


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, 6, 9, 10])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(place: Any, said: list[str], killed_at: int) -> None:
    with pytest.raises(Killed):
        train(training(killed_at), place("killed"))
    resumed, made = training(), place("killed")
    if made.work.exists():
        torch.manual_seed(99)  # whatever the random state is: the checkpoint's counts
    train(resumed, made)
    assert said == []
    assert (bits(resumed.model), history(made)) == uninterrupted(place)


@pytest.mark.parametrize("average", [Average(ema=0.8), Average(last=0.5)], ids=["ema", "last"])
@pytest.mark.parametrize("killed_at", [1, 4, 7, 10])
def test_the_average_goes_on_where_it_was(place: Any, average: Average, killed_at: int) -> None:
    def averaged(*killed: int) -> Training:
        made = training(*killed)
        return replace(made, config=made.config.model_copy(update={"average": average}))

    whole = averaged()
    train(whole, place("whole"))
    with pytest.raises(Killed):
        train(averaged(killed_at), place("killed"))
    resumed = averaged()
    train(resumed, place("killed"))
    assert bits(resumed.model) == bits(whole.model) != uninterrupted(place)[0]


def test_killed_many_times_is_uninterrupted_to_the_bit(place: Any) -> None:
    for killed_at in (1, 3, 4, 8, 8):
        with pytest.raises(Killed):
            train(training(killed_at), place("killed"))
    last, made = training(), place("killed")
    train(last, made)
    assert (bits(last.model), history(made)) == uninterrupted(place)


@pytest.mark.parametrize("torn", [["step-000008"], ["step-000006", "step-000008"]], ids=["newest", "both"])
@pytest.mark.parametrize("how", ["cut", "flipped", "no manifest", "empty manifest", "another step"])
def test_a_torn_checkpoint_leads_back_to_the_one_before_it(
    place: Any, said: list[str], torn: list[str], how: str
) -> None:
    with pytest.raises(Killed):
        train(training(9), place("killed"))
    made = place("killed")
    assert folders(made) == ["step-000006", "step-000008"]
    for name in torn:
        tensors, manifest = made.work / name / "state.safetensors", made.work / name / "manifest.json"
        blob = tensors.read_bytes()
        match how:
            case "cut":
                tensors.write_bytes(blob[:-9])
            case "flipped":
                tensors.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
            case "no manifest":
                manifest.unlink()
            case "empty manifest":
                manifest.write_text("{}")
            case "another step":
                step = int(name.removeprefix("step-"))
                manifest.write_text(manifest.read_text().replace(f'"step": {step}', f'"step": {step + 1}'))
    with pytest.raises(Killed):
        train(training(9), made)  # what was found is said even if this attempt tells nothing else
    resumed = training()
    train(resumed, place("killed"))
    assert [line.split(" is damaged")[0] for line in said] == [f"checkpoint {name}" for name in reversed(torn)]
    assert (bits(resumed.model), history(made)) == uninterrupted(place)


def test_checkpoints_come_as_often_as_asked_and_none_at_the_end(place: Any) -> None:
    made = place("often")
    train(training(), made)
    assert folders(made) == ["step-000008", "step-000010"]
    rare = place("rare", checkpoint_seconds=1e9)
    train(training(), rare)
    assert not rare.work.exists()


def test_the_journal_tells_means_since_the_line_before_it(place: Any) -> None:
    made, single = place("pairs"), place("single", log_every=1)
    train(training(), made)
    train(training(), single)
    losses = [line["metrics"]["loss/fit"] for line in read_journal(single.journal)]
    assert len(losses) == STEPS
    lines = read_journal(made.journal)
    assert [(line["step"], line["tokens"]) for line in lines] == [(s, 10 * s) for s in (2, 4, 6, 8, 10, 11)]
    wanted = [sum(losses[i : i + 2]) / len(losses[i : i + 2]) for i in range(0, STEPS, 2)]
    assert [line["metrics"]["loss/fit"] for line in lines] == pytest.approx(wanted)
    assert {"loss/total", "gradient_norm", "learning_rate_factor", "tokens_per_s"} <= set(lines[0]["metrics"])


def test_every_step_has_the_learning_rate_of_the_schedule(place: Any) -> None:
    asked, made = training(), place(log_every=1)
    train(asked, made)
    factors = [schedule(step, STEPS, CONFIG) for step in range(STEPS)]
    assert [line["metrics"]["learning_rate_factor"] for line in read_journal(made.journal)] == factors
    groups = [group for optimizer in asked.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [group["initial_lr"] * factors[-1] for group in groups]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(("role", "key"), [("student", "recipe"), ("teacher", "teacher")])
def test_a_loss_that_is_no_number_ends_the_stage_and_names_the_step(
    place: Any, poison: float, role: Any, key: str
) -> None:
    poisoned, made = replace(training(poison=poison), role=role), place("poisoned")
    told = rf"^step 7: loss/total=(nan|inf), loss/fit=.*: the {role} has diverged; lower {key}\.optimizer\.lr or "
    with pytest.raises(NonFiniteLoss, match=told):
        train(poisoned, made)
    assert all(torch.isfinite(parameter).all() for parameter in poisoned.model.parameters())
    assert [line["step"] for line in read_journal(made.journal)] == [2, 4, 6]


def test_a_teachers_training_is_told_of_as_the_teachers(place: Any, tmp_path: Path, monkeypatch: Any) -> None:
    roles: list[str] = []

    def see(asked: Training, _: Workplace) -> dict[str, Any]:
        roles.append(asked.role)
        return {}

    monkeypatch.setattr(stage, "train", see)
    write_tokens(tmp_path, train=range(64))
    shape = Architecture(layers=1, hidden=32, heads=4, intermediate=32, max_length=16, vocabulary=300)
    spec = TeacherSpec(
        tokens="t", architecture=shape, token_budget=16, batch_size=1, sequence_length=16, optimizer=CONFIG,
        numerics=Numerics(), seed=0,
    )  # fmt: skip
    run_stage(spec, place("teacher", {"tokens": tmp_path}))
    assert roles == ["teacher"]


def test_weights_that_the_last_step_breaks_are_not_saved(place: Any) -> None:
    asked = training()
    real, steps = asked.optimizers[1].step, iter(range(STEPS))

    def breaking(*words: Any) -> Any:
        real(*words)
        if next(steps) == STEPS - 1:
            asked.optimizers[1].param_groups[0]["params"][0].data[0] = float("inf")

    asked.optimizers[1].step = breaking  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match=r"^after step 11: 0\.bias is not finite: the student has diverged; lower "):
        train(asked, place("broken"))


def test_numerics_set_threads_random_state_and_precision() -> None:
    prepare(Numerics(), seed=3)
    first = torch.rand(3)
    prepare(Numerics(), seed=3)
    assert torch.equal(torch.rand(3), first)
    assert torch.get_num_threads() == 1
    for matmul in ("medium", "highest"):
        prepare(Numerics(matmul=matmul))  # type: ignore[arg-type]
        assert torch.get_float32_matmul_precision() == matmul
    x, y = torch.randn(2, 2), torch.randn(2, 2)
    for dtype, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(Numerics(dtype=dtype), "cpu"):  # type: ignore[arg-type]
            assert (x @ y).dtype == wanted


def test_a_core_that_is_asked_for_is_used_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    prepare(Numerics(core="native"))
    assert native.in_use()
    prepare(Numerics())
    assert not native.in_use()
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs the compiled core, .* run make build-ext"):
        prepare(Numerics(core="native"))


@pytest.mark.parametrize(("threads", "matmul"), [(1, "highest"), (2, "highest"), (1, "medium"), (2, "medium")])
def test_a_distil_stage_killed_and_resumed_saves_the_same_bytes(
    place: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, matmul: Any
) -> None:
    """Batches so large that two threads do share the work."""
    text = write_tokens(tmp_path / "tokens", train=random_tokens(9000))
    inputs = {"tokens": text, "teacher": tiny_teacher, "parent": tiny_teacher}
    phases = tuple(PhaseSpec(losses=losses, steps=4) for losses in (Losses(mixer_mse=1.0), Losses(kl=1.0, ce=0.1)))
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(0, 2), new_layers=(0, 2), operator=HyenaConfig(), phases=phases,
        batch_size=8, sequence_length=64, first_sequence=4, freeze=(), optimizer=CONFIG,
        numerics=Numerics(threads=threads, matmul=matmul), seed=0,
    )  # fmt: skip
    whole = place("whole", inputs)
    run_stage(spec, whole)
    die_at_the_sixth(monkeypatch, "batch_losses")
    with pytest.raises(Killed):
        run_stage(spec, place("killed", inputs))
    again = place("killed", inputs)
    result = run_stage(spec, again)
    assert (again.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
    assert history(again) == history(whole)
    assert result["operator_trainable"] < result["operator_parameters"] < result["parameters"]
    assert len(load_file(again.out / WEIGHTS)) > 20


def test_a_journal_has_each_step_once_in_order_and_skips_what_is_torn(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == []
    journal = Journal(tmp_path)
    for step in (10, 20):
        journal.write(step, step * 2, {"loss": step / 10})
    journal.close()
    with (tmp_path / NAME).open("ab") as stream:
        stream.write(b'{"step": 30, "tok')  # the power went here
    journal = Journal(tmp_path)
    journal.write(20, 40, {"loss": 99.0})  # told already: what was read once stays
    for step in (30, 40):
        journal.write(step, step * 2, {"loss": step / 10})
    journal.close()
    lines = read_journal(tmp_path)
    assert [(line["step"], line["tokens"], line["metrics"]) for line in lines] == [
        (step, step * 2, {"loss": step / 10}) for step in (10, 20, 30, 40)
    ]
    assert [line["step"] for line in read_journal(tmp_path, after=20)] == [30, 40]


def test_a_journal_holds_finite_numbers_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.write(1, 1, {"loss": float("nan")})
    journal.close()


def test_asked_to_stop_it_writes_a_checkpoint_at_the_next_log_step_and_goes_on_to_the_same_bits(
    place: Any, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    asked, made = training(), place("stopped", checkpoint_seconds=1e9, stop=str(stop))
    loss = asked.loss

    def stopping(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == 4:
            stop.touch()
        return loss(step)

    with pytest.raises(Stopped, match="stopped at step 6 of 11"):
        train(replace(asked, loss=stopping), made)
    assert folders(made) == ["step-000006"]
    assert newest_step(made.work) == 6
    stop.unlink()
    resumed, again = training(), place("stopped")
    assert train(resumed, again)["resumed_at"] == 6
    assert (bits(resumed.model), history(again)) == uninterrupted(place)


def test_asked_to_stop_at_its_last_step_it_is_done(place: Any, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    asked, made = training(), place("late", stop=str(stop))
    loss = asked.loss

    def stopping(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == STEPS - 1:
            stop.touch()
        return loss(step)

    assert train(replace(asked, loss=stopping), made)["tokens"] == STEPS * 10
