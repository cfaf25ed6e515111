"""Blends of attention and operator: exact at both ends, held to a mean of 1/2, the same after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from operators.config import HyenaConfig, SkipConfig
from orchestrator.distill.choosing import blend as module
from orchestrator.distill.choosing.blend import blend_layers, gates, set_gates
from orchestrator.distill.data import batch, load_tokens
from orchestrator.distill.models.student import load_student, load_teacher, sharing
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.journal import read_journal
from orchestrator.distill.training.loop import autocast
from orchestrator.files import read_json
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import BlendSpec, DistilSpec
from tests.distill.students import llama
from tests.texts import random_tokens, write_tokens

LENGTH, SEED, STEPS = 16, 3, 8
LAYERS = (0, 1, 2)
BLEND = BlendSpec(
    tokens="t", teacher="r", subject="s", layers=LAYERS, operator=HyenaConfig(heads=4), steps=STEPS, batch_size=2,
    sequence_length=LENGTH, first_sequence=4, numerics=Numerics(), seed=SEED,
)  # fmt: skip


@pytest.fixture(params=["neox", "llama"])
def folder(request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path: Path) -> Path:
    """A teacher of either kind."""
    if request.param == "neox":
        return tiny_teacher
    llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def inputs_of(teacher: Path, tmp_path: Path) -> dict[str, Path]:
    text = write_tokens(tmp_path / "tokens", train=random_tokens(LENGTH * 40))
    return {"tokens": text, "teacher": teacher, "subject": teacher}


@pytest.fixture
def inputs(tiny_teacher: Path, tmp_path: Path) -> dict[str, Path]:
    return inputs_of(tiny_teacher, tmp_path)


def distilled(place: Any, inputs: dict[str, Path], layers: tuple[int, ...], operator: Any) -> Path:
    """The folder of a student that was not trained."""
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=layers, new_layers=layers, operator=operator, phases=(),
        batch_size=2, sequence_length=LENGTH, first_sequence=0, freeze=(), optimizer=Optimizer(), numerics=Numerics(),
        seed=SEED,
    )  # fmt: skip
    made = place("student", {**inputs, "parent": inputs["subject"]})
    run_stage(spec, made)
    return made.out  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", [BLEND.operator, SkipConfig()], ids=["hyena", "skip"])
def test_shut_it_is_the_teacher_and_open_the_swapped_student(
    place: Any, folder: Path, tmp_path: Path, ids: torch.Tensor, operator: Any, dtype: Any
) -> None:
    inputs, spec, layers = inputs_of(folder, tmp_path), BLEND.changed(operator=operator), (0, 2)
    teacher = load_teacher(folder)
    made = sharing(teacher)
    blends = blend_layers(made, spec.changed(layers=layers), place("blend", inputs))
    student = load_student(distilled(place, inputs, layers, operator), sharing(teacher)).eval()
    wanted = {0.0: teacher, 1.0: student}
    with torch.no_grad(), autocast(Numerics(dtype=dtype), "cpu"):
        logits = {gate: model(ids, use_cache=False).logits for gate, model in wanted.items()}
        for gate, theirs in logits.items():
            for each in blends.values():
                each.gate = torch.tensor(gate)
            assert torch.equal(made(ids, use_cache=False).logits, theirs)
        blends[0].gate = torch.tensor(0.0)
        between = made(ids, use_cache=False).logits
    assert not any(torch.equal(between, theirs) for theirs in logits.values())


def test_a_layer_gives_the_mixture_of_both(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    made = sharing(teacher)
    [mixed] = blend_layers(made, BLEND.changed(layers=(1,)), place("blend", inputs)).values()
    x_BLD, attention = torch.randn(2, 9, 32), teacher.gpt_neox.layers[1].attention
    angles = teacher.gpt_neox.rotary_emb(x_BLD, torch.arange(9)[None])
    given = {"attention_mask": None, "position_embeddings": angles}
    mixed.gate = torch.tensor(0.3)
    with torch.no_grad():
        wanted = 0.7 * attention(x_BLD, **given)[0] + 0.3 * mixed.placed.operator(x_BLD)
        found, weights = mixed(x_BLD, **given)
    torch.testing.assert_close(found, wanted)
    assert weights is None


@pytest.mark.parametrize(
    "numbers", [[0.0, 0.0], [3.0, -1.0, 0.2], [-5.0, -7.0, -9.0, -30.0], [40.0, -40.0, 0.0], [2.0]]
)
def test_the_mean_gate_is_a_half_and_gates_are_in_the_order_of_their_numbers(numbers: list[float]) -> None:
    found = gates(torch.tensor(numbers))
    assert float(found.double().mean()) == pytest.approx(0.5, abs=1e-6)
    assert found.argsort().tolist() == torch.tensor(numbers).argsort().tolist()
    odds = (found.double() / (1 - found.double())).log()  # sigmoid(a + c): the same c for all
    inside = (odds - torch.tensor(numbers).double())[odds.abs() < 10]
    assert torch.allclose(inside, inside[0], atol=1e-4)


def test_gradients_of_gates_are_those_of_all_numbers() -> None:
    numbers = torch.tensor([0.4, -1.3, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gates, numbers, eps=1e-5, atol=1e-6)


def test_far_apart_numbers_have_finite_gradients() -> None:
    numbers = torch.tensor([500.0, -500.0], requires_grad=True)
    gates(numbers)[0].backward()
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [0.0, 0.0]


def test_only_the_numbers_train(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    made = sharing(teacher)
    blends = blend_layers(made, BLEND, place("blend", inputs))
    trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert trained == [f"gpt_neox.layers.{layer}.attention.number" for layer in LAYERS]
    set_gates(blends)
    assert [each.gate.item() for each in blends.values()] == [0.5] * 3
    assert not any(each.training for each in made.modules())


def test_a_layer_that_does_without_its_attention_opens(
    place: Any, tiny_teacher: Path, tmp_path: Path, teacher: Any
) -> None:
    """Of a teacher whose attention in layer 1 gives nothing, nothing in its place costs nothing."""
    for parameter in teacher.gpt_neox.layers[1].attention.dense.parameters():
        parameter.data.zero_()
    teacher.save_pretrained(tmp_path / "teacher")
    made = place("blend", inputs_of(tmp_path / "teacher", tmp_path))
    found = run_stage(BLEND.changed(operator=SkipConfig(), steps=60), made)
    assert found["gates"]["1"] > 0.8 > 0.4 > max(found["gates"]["0"], found["gates"]["2"])
    assert sum(found["gates"].values()) == pytest.approx(1.5, abs=1e-5)
    assert (found["tokens"], found["resumed_at"]) == (60 * 2 * LENGTH, 0)
    assert read_json(made.out / "gates.json") == found["gates"]
    first, last = (read_journal(made.journal)[at]["metrics"]["loss/kl"] for at in (0, -1))
    assert last < first
    assert found["kl"] == pytest.approx(last, rel=0.5)


def test_the_first_step_goes_down_the_gradient_of_the_divergence_on_the_text_of_its_place(
    place: Any, inputs: dict[str, Path], teacher: Any
) -> None:
    """Adam's first step is the rate times the signs of the gradient, which is taken here from all logits."""
    at = place("blend", inputs)
    found = run_stage(BLEND.changed(steps=1), at)
    made = sharing(teacher)
    blends = blend_layers(made, BLEND, place("other", inputs))
    numbers = [each.number for each in blends.values()]

    def divergence(first: int) -> torch.Tensor:
        ids_BL = batch(load_tokens(inputs["tokens"], "train"), LENGTH, SEED + 1, first, 2)
        set_gates(blends)
        with torch.no_grad():
            wanted = teacher(ids_BL).logits[:, :-1].log_softmax(-1)
        own = made(ids_BL, use_cache=False).logits[:, :-1].log_softmax(-1)
        return (wanted.exp() * (wanted - own)).sum(-1).mean()

    before = divergence(4)
    before.backward()
    assert read_journal(at.journal)[0]["metrics"]["loss/kl"] == pytest.approx(before.item(), rel=1e-4)
    moved = torch.stack([-0.05 * number.grad.sign() for number in numbers])  # type: ignore[union-attr]
    assert list(found["gates"].values()) == pytest.approx(gates(moved).tolist(), abs=1e-5)
    assert len(set(moved.tolist())) == 2, "some open and some shut"
    with torch.no_grad():
        for number, value in zip(numbers, moved, strict=True):
            number.copy_(value)
        assert found["kl"] == pytest.approx(divergence(4 + 2).item(), rel=1e-4)


def test_killed_and_resumed_is_uninterrupted_to_the_bit(
    place: Any, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for a process that ends without a chance to tidy up."""

    whole = run_stage(BLEND, place("whole", inputs))
    real, calls = module.batch, iter(range(100))

    def dying(*words: Any) -> Any:
        if next(calls) == 5:
            raise Killed
        return real(*words)

    monkeypatch.setattr(module, "batch", dying)
    with pytest.raises(Killed):
        run_stage(BLEND, place("killed", inputs))
    torch.manual_seed(99)
    found = run_stage(BLEND, place("killed", inputs))
    assert (whole["resumed_at"], found["resumed_at"]) == (0, 4)
    assert (found["gates"], found["kl"]) == (whole["gates"], whole["kl"])
    assert len(set(found["gates"].values())) == 3


def test_prepared_operators_are_blended(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    prepared = distilled(place, inputs, LAYERS, BLEND.operator)
    made = sharing(teacher)
    spec = BLEND.changed(layers=(1,), prepared="k", seed=SEED + 1)
    [mixed] = blend_layers(made, spec, place("blend", {**inputs, "prepared": prepared})).values()
    student = load_student(prepared, load_teacher(inputs["teacher"]))
    wanted = student.gpt_neox.layers[1].attention.operator.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in mixed.placed.operator.state_dict().items())
