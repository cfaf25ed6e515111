"""Students with operators of several kinds: as a stage makes them, saves them and loads them, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig, SkipConfig, WindowConfig
from orchestrator.distill.measuring.throughput import measure_throughput
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.student import load_student, load_teacher
from orchestrator.distill.models.swap import swapped
from orchestrator.distill.stage import run_stage
from orchestrator.study.placing import PerLayer, mapped
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Throughput
from orchestrator.study.spec import BlendSpec, DistilSpec, PhaseSpec, ScoreSpec, ScratchSpec, ThroughputSpec
from orchestrator.study.stages import drawn
from tests.distill.test_export import SHAPE, export, saved
from tests.texts import random_tokens, write_tokens

LENGTH, SEED = 24, 3
POWER = HyenaConfig(heads=4, feature_map="power", normalise=True, filter=ImplicitFilterConfig(positive=True, width=8))
NEAR = WindowConfig(window=4)
TWO = HyenaConfig(filter=ModalFilterConfig(modes=2))
MIXED = PerLayer(default=POWER, layers={"1": NEAR, "2": TWO})
BARE = mapped(MIXED, drawn)
DISTIL = DistilSpec(
    tokens="t", teacher="r", parent="p", layers=(0, 1, 2), new_layers=(0, 1, 2), operator=MIXED, phases=(),
    batch_size=2, sequence_length=LENGTH, first_sequence=0, freeze=(), optimizer=Optimizer(), numerics=Numerics(),
    seed=SEED,
)  # fmt: skip
PHASES = (PhaseSpec(losses=Losses(kl=1.0), steps=2),)
IDS = torch.arange(1, LENGTH + 1)[None]


@pytest.fixture
def inputs(tiny_teacher: Path, tmp_path: Path) -> dict[str, Path]:
    text = write_tokens(
        tmp_path / "tokens", valid=random_tokens(LENGTH * 11, above=6), train=random_tokens(LENGTH * 20)
    )
    return {"tokens": text, "teacher": tiny_teacher, "subject": tiny_teacher, "parent": tiny_teacher}


def distilled(place: Any, inputs: dict[str, Path], name: str, **changes: Any) -> Path:
    made = place(name, inputs)
    run_stage(DISTIL.changed(**changes), made)
    return made.out  # type: ignore[no-any-return]


def tensors(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    saved_ = load_file(folder / "student.safetensors")
    return {name: tensor for name, tensor in saved_.items() if f".layers.{layer}.attention." in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("operator", [POWER, NEAR, TWO], ids=["power", "window", "channels"])
def test_the_same_operator_in_every_layer_has_the_bits_of_the_plain_one(
    place: Any, inputs: dict[str, Path], operator: Any
) -> None:
    uniform = PerLayer(default=operator, layers={"1": operator})
    folders = [distilled(place, inputs, f"{n}", operator=given) for n, given in enumerate((operator, uniform))]
    one, other = ((folder / "student.safetensors").read_bytes() for folder in folders)
    assert one == other


def test_a_layer_starts_as_its_operator_does_alone(place: Any, inputs: dict[str, Path]) -> None:
    """The first of its layers, as those after it draw from the same seed in turn."""
    mixed = distilled(place, inputs, "mixed")
    first = distilled(place, inputs, "first", operator=POWER, layers=(0,), new_layers=(0,))
    assert same(tensors(mixed, 0), tensors(first, 0))
    student = load_student(mixed, load_teacher(inputs["teacher"]))
    assert [type(placed.operator.config) for placed in swapped(student)] == [HyenaConfig, WindowConfig, HyenaConfig]


def test_a_trained_student_of_two_operators_is_loaded_as_it_was_saved(place: Any, inputs: dict[str, Path]) -> None:
    first = distilled(place, inputs, "first", layers=(0, 1), new_layers=(0, 1), phases=PHASES)
    second = distilled(place, {**inputs, "parent": first}, "second", new_layers=(2,), phases=PHASES)
    one, two = (load_student(second, load_teacher(inputs["teacher"])) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert [placed.operator.config.kind for placed in swapped(one)] == ["hyena", "window", "hyena"]
    assert not same(tensors(first, 1), tensors(second, 1))


def test_prepared_operators_are_taken_layer_by_layer(place: Any, inputs: dict[str, Path]) -> None:
    trained = distilled(place, inputs, "trained", phases=PHASES)
    spec = ScoreSpec(
        tokens="t", teacher="r", subject="s", layers=(0, 1, 2), operator=MIXED, sequence_length=LENGTH, batch_size=2,
        text=LENGTH * 5, reported=LENGTH * 4, numerics=Numerics(), seed=SEED,
    )  # fmt: skip
    fresh = run_stage(spec, place("fresh", inputs))
    found = run_stage(spec.changed(prepared="k"), place("prepared", {**inputs, "prepared": trained}))
    assert found["kl"] != fresh["kl"]
    other = spec.changed(prepared="k", operator=PerLayer(default=POWER, layers={"2": TWO}))
    with pytest.raises(ValueError, match="layer 1 was prepared as WindowConfig"):
        run_stage(other, place("other", {**inputs, "prepared": trained}))


def test_blends_scratch_and_speed_take_operators_by_layer(place: Any, inputs: dict[str, Path]) -> None:
    common = {"numerics": Numerics(), "sequence_length": LENGTH}
    blend = BlendSpec(
        tokens="t", teacher="r", subject="s", layers=(0, 1), operator=MIXED, steps=1, batch_size=1, first_sequence=0,
        seed=0, **common,
    )  # fmt: skip
    assert run_stage(blend, place("blend", inputs))["gates"].keys() == {"0", "1"}
    scratch = ScratchSpec(
        tokens="t", teacher=None, architecture=SHAPE, operator=BARE, layers=(0, 2), token_budget=LENGTH, batch_size=1,
        optimizer=Optimizer(), seed=0, **common,
    )  # fmt: skip
    made = place("scratch", inputs)
    run_stage(scratch, made)
    assert len(tensors(made.out, 0)) != len(tensors(made.out, 2)) > 0
    speed = ThroughputSpec(
        teacher="r", operator=BARE, layers=(0, 1, 2), throughput=Throughput(lengths=(16,), decode_tokens=2, repeats=1),
        train_batch_size=1, hardware="h", **common,
    )  # fmt: skip
    assert measure_throughput(speed, place("speed", inputs))["decode_ratio"]["16"] > 0


def test_an_exported_student_of_several_operators_is_the_student_in_memory(tmp_path: Path) -> None:
    student = saved(tmp_path, {0: SkipConfig(), 1: TWO, 2: HyenaConfig(heads=2)})
    folder = export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, student(IDS).logits)
