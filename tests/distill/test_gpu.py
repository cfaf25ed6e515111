"""Stages on a GPU: killed and started again, or simply again, they end with the same bits; a student lives there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from operators.config import FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from orchestrator.distill.measuring.generation import continued
from orchestrator.distill.models.student import WEIGHTS, load_student, load_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.loop import train
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.spec import Architecture, DistilSpec, PhaseSpec, TeacherSpec
from tests.distill.test_train import Killed, bits, die_at_the_sixth, history, training
from tests.texts import random_tokens, write_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
POWER = HyenaConfig(
    heads=4, feature_map="power", degree=4, key_dim=8, normalise=True, key_gate=True,
    filter=ImplicitFilterConfig(positive=True, width=64, features=9),
)  # fmt: skip
OPERATORS = {
    "order 2": HyenaConfig(),
    "heads": HyenaConfig(heads=4),
    "power": POWER,
    "modal": HyenaConfig(heads=4, filter=ModalFilterConfig(modes=4)),
    "order 2, modal": HyenaConfig(filter=ModalFilterConfig(modes=4)),
    "order 2, short": HyenaConfig(filter=FirFilterConfig(taps=64)),
}
LENGTH = 1024  # so long that attention's gradients are sums over blocks, whose order must not change


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens", train=random_tokens(90_000))


@pytest.fixture(params=["float32", "bfloat16"])
def numerics(request: pytest.FixtureRequest) -> Numerics:
    return Numerics(dtype=request.param)


def teacher_spec(numerics: Numerics) -> TeacherSpec:
    shape = Architecture(layers=3, hidden=256, heads=4, intermediate=512, max_length=LENGTH, vocabulary=300)
    return TeacherSpec(
        tokens="t", architecture=shape, token_budget=8 * 4 * LENGTH, batch_size=4, sequence_length=LENGTH,
        optimizer=Optimizer(), numerics=numerics, seed=0,
    )  # fmt: skip


def saved(made: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.out.glob("*.safetensors")}


def killed_and_again(name: str, place: Any, spec: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The workplace of a stage whose process died at its sixth batch and that went on from its checkpoint."""
    with monkeypatch.context() as patched:
        die_at_the_sixth(patched, "batch")
        with pytest.raises(Killed):
            run_stage(spec, place(name, inputs, device="cuda"))
    again = place(name, inputs, device="cuda")
    assert run_stage(spec, again)["resumed_at"] == 4
    return again


def test_the_random_state_of_the_gpu_is_in_the_checkpoint(place: Any) -> None:
    whole = training(device="cuda")
    train(whole, place("whole", device="cuda"))
    with pytest.raises(Killed):
        train(training(killed_at=6, device="cuda"), place("killed", device="cuda"))
    torch.cuda.manual_seed(99)
    resumed = training(device="cuda")
    torch.cuda.manual_seed(98)
    train(resumed, place("killed", device="cuda"))
    assert bits(resumed.model) == bits(whole.model)


def test_a_teacher_repeats_to_the_bit(
    place: Any, text: Path, numerics: Numerics, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, inputs = teacher_spec(numerics), {"tokens": text}
    whole, second = place("whole", inputs, device="cuda"), place("second", inputs, device="cuda")
    run_stage(spec, whole), run_stage(spec, second)
    again = killed_and_again("killed", place, spec, inputs, monkeypatch)
    assert saved(whole) == saved(second) == saved(again)
    assert history(whole) == history(second) == history(again)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_student_repeats_to_the_bit_and_decodes_as_it_reads(
    place: Any, text: Path, numerics: Numerics, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = place("teacher", {"tokens": text}, device="cuda")
    run_stage(teacher_spec(numerics), taught)
    inputs = {"tokens": text, "teacher": taught.out, "parent": taught.out}
    phases = tuple(PhaseSpec(losses=losses, steps=4) for losses in (Losses(mixer_mse=1.0), Losses(kl=1.0, ce=0.1)))
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(0, 2), new_layers=(0, 2), operator=OPERATORS[operator],
        phases=phases, batch_size=4, sequence_length=LENGTH, first_sequence=4, freeze=(),
        optimizer=Optimizer(rest_scale=0.3), numerics=numerics, seed=0,
    )  # fmt: skip
    whole = place("whole", inputs, device="cuda")
    run_stage(spec, whole)
    again = killed_and_again("killed", place, spec, inputs, monkeypatch)
    assert (whole.out / WEIGHTS).read_bytes() == (again.out / WEIGHTS).read_bytes()
    assert history(whole) == history(again)
    student = load_student(whole.out, load_teacher(taught.out)).to("cuda").eval()
    prompts_BL = torch.randint(1, 300, (2, 40), device="cuda")
    written_BL = continued(student, prompts_BL, 24)
    with torch.no_grad():
        logits = student(input_ids=torch.cat([prompts_BL, written_BL], 1), use_cache=False).logits[:, 39:-1]
    assert (logits.argmax(-1) == written_BL).float().mean() > 0.95


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("kept", ["offloaded", "offloaded_static"])
def test_a_student_decodes_from_a_cache_that_lies_on_the_cpu(tiny_teacher: Path, layers: list[int], kept: str) -> None:
    student = load_teacher(tiny_teacher).to("cuda")
    for placed in swap(student, layers, HyenaConfig(heads=4), torch.Generator().manual_seed(0)):
        assert {parameter.device.type for parameter in placed.parameters()} == {"cuda"}
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    prompts_BL = torch.randint(1, 300, (2, 40), device="cuda")
    written_BL = student.generate(prompts_BL, cache_implementation=kept, **settings)
    assert torch.equal(written_BL, student.generate(prompts_BL, use_cache=False, **settings))
