"""Stages against plain torch, where all is computed once more (`plain`): losses step by step, weights at the end."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill.context import Workplace
from orchestrator.distill.models.student import WEIGHTS
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training.journal import read_journal
from orchestrator.study.recipe import LogitKL, Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import Architecture, DistilSpec, EvaluateSpec, PhaseSpec, ScratchSpec, TeacherSpec
from tests.distill import plain
from tests.distill.plain import Plain, Rates, Taught
from tests.texts import random_tokens, write_tokens

LENGTH, BATCH, WINDOWS, SEED, HEADS = 16, 3, 17, 5, 4
CLIP = 0.6


@pytest.fixture
def text(tmp_path: Path) -> np.ndarray[Any, Any]:
    """Seventeen windows, so that stages read parts of three epochs, and a rest; as stages find it in `tmp_path`."""
    values: np.ndarray[Any, Any] = random_tokens(LENGTH * WINDOWS + 5)
    write_tokens(tmp_path / "tokens", train=values)
    return values


def weights_of(folder: Path) -> plain.Weights:
    """A Hugging Face folder's tensors under the names of the state dict."""
    saved = load_file(folder / "model.safetensors")
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in saved.items()}


def with_dropout(folder: Path, to: Path) -> Path:
    """The same model with dropout in its configuration, which no target of distillation has."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "hidden_dropout": 0.3, "attention_dropout": 0.3}))
    return to


def rates_of(config: Optimizer, freeze: tuple[str, ...] = ()) -> Rates:
    fields = config.model_dump(exclude={"method"})
    return Rates(muon=config.method == "muon", freeze=freeze, **fields)


def agrees(place: Workplace, taught: Taught, tolerance: float) -> None:
    """The journal tells the losses, gradient norms and learning rates of the second computation."""
    told = [line["metrics"] for line in read_journal(place.journal)]
    for name, wanted in (
        ("loss/total", taught.losses),
        ("gradient_norm", taught.norms),
        ("learning_rate_factor", taught.factors),
    ):
        assert [line[name] for line in told] == pytest.approx(wanted, rel=tolerance), name


def moved_alike(found: plain.Weights, wanted: plain.Weights, start: plain.Weights, tolerance: float) -> None:
    """Every tensor moved as far and to the same place; what did not move there did not move here."""
    assert found.keys() == wanted.keys()
    told = []
    for name, tensor in found.items():
        far = (wanted[name] - start[name]).norm() if name in start else wanted[name].norm()
        off = (tensor - wanted[name]).norm()
        if off > tolerance * far:
            told.append(f"{name}: off by {off / far:.2e} of its way")
    assert not told, "\n".join(told)


FREEZE = ("*.query_key_value.bias", "*.layers.0.mlp.*", "lm_head.weight")
ADAMW = Optimizer(
    method="adamw", lr=4e-3, rest_scale=0.4, weight_decay=0.3, betas=(0.7, 0.9), gradient_clip=CLIP,
    warmup=0.4, decay=0.5,
)  # fmt: skip
MUON = ADAMW.model_copy(update={"method": "muon", "matrix_lr": 0.02})
PHASES = (
    PhaseSpec(losses=Losses(mixer_mse=1.5, hidden_mse=0.5), steps=4),
    PhaseSpec(losses=Losses(kl=LogitKL(weight=0.7, temperature=2.0), ce=0.2), steps=5),
)


def distil_spec(
    layers: tuple[int, ...], new: tuple[int, ...], first: int, optimizer: Optimizer, **more: Any
) -> DistilSpec:
    return DistilSpec(
        tokens="t", teacher="r", parent="p", layers=layers, new_layers=new, operator=HyenaConfig(), phases=PHASES,
        batch_size=BATCH, sequence_length=LENGTH, first_sequence=first, freeze=FREEZE, optimizer=optimizer,
        numerics=Numerics(**more), seed=SEED,
    )  # fmt: skip


def loss_of(phase: int, teacher: Plain, student: Plain, ids_BL: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
    """The weighted losses of `PHASES`, written out."""
    if phase == 0:
        mixer = plain.mixer_error(teacher, student, ids_BL, layers)
        return 1.5 * mixer + 0.5 * plain.stream_error(teacher, student, ids_BL, layers)
    return 0.7 * plain.divergence(teacher, student, ids_BL, 2.0) + 0.2 * plain.surprise(student, ids_BL)


def distilled_plainly(
    teacher: Plain, student: Plain, layers: tuple[int, ...], text: Any, first: int, rates: Rates
) -> Taught:
    order = plain.sequences(text, LENGTH, SEED + 1)
    for _ in range(first):
        next(order)

    def loss(step: int) -> torch.Tensor:
        ids_BL = torch.stack([next(order) for _ in range(BATCH)])
        return loss_of(0 if step < 4 else 1, teacher, student, ids_BL, layers)

    return plain.train(student, loss, 9, rates)


@pytest.mark.parametrize(
    ("optimizer", "near", "tolerance"), [(ADAMW, 1e-5, 5e-3), (MUON, 1e-3, 1e-1)], ids=["adamw", "muon"]
)
def test_two_distillation_stages_are_what_plain_torch_computes(
    place: Any, tiny_teacher: Path, tmp_path: Path, text: Any, optimizer: Optimizer, near: float, tolerance: float
) -> None:
    dropping = with_dropout(tiny_teacher, tmp_path / "teacher")
    inputs = {"tokens": tmp_path / "tokens", "teacher": dropping, "parent": dropping}
    weights = weights_of(tiny_teacher)
    teacher, student = Plain(weights, HEADS), Plain(weights, HEADS)
    first = 0
    for stage, (layers, new) in enumerate([((1,), (1,)), ((0, 1), (0,))]):
        made = place(f"stage {stage}", inputs, log_every=1)
        run_stage(distil_spec(layers, new, first, optimizer), made)
        start = dict(student.weights)
        plain.put(student, new, HyenaConfig(), 96, SEED)
        start = {**start, **{k: v for k, v in student.weights.items() if ".operator." in k}}
        taught = distilled_plainly(teacher, student, layers, text, first, rates_of(optimizer, FREEZE))
        agrees(made, taught, near)
        found = {n: t for n, t in weights.items() if n in student.weights} | load_file(made.out / WEIGHTS)
        moved_alike(found, student.weights, start, tolerance)
        assert min(taught.norms) < CLIP < max(taught.norms), taught.norms
        first += 9 * BATCH
        inputs["parent"] = made.out
        if optimizer.method == "muon":  # rounds to bfloat16: 18 steps on, processors differ by more than a fault does
            student.weights |= found


SHAPE = Architecture(layers=2, hidden=64, heads=HEADS, intermediate=48, max_length=32, vocabulary=300)
CONFIG: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip


def random_model(dropout: float = 0.0) -> Plain:
    """What transformers draws from the seed."""
    torch.manual_seed(SEED)
    made = GPTNeoXForCausalLM(GPTNeoXConfig(**CONFIG))
    return Plain(made.state_dict(), HEADS, dropout=dropout)


def models_language(model: Plain, text: Any, order: int, steps: int, optimizer: Optimizer) -> Taught:
    read = plain.sequences(text, LENGTH, order)
    return plain.train(
        model,
        lambda _: plain.surprise(model, torch.stack([next(read) for _ in range(BATCH)])),
        steps,
        rates_of(optimizer),
    )


def without_key_biases(weights: plain.Weights) -> plain.Weights:
    """Softmax does not see a number added to all keys' products, so most key biases are trained by rounding errors."""
    return {
        name: tensor.unflatten(0, (HEADS, 3, -1))[:, [0, 2]] if name.endswith("query_key_value.bias") else tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(
    ("optimizer", "near", "tolerance"), [(ADAMW, 1e-5, 5e-3), (MUON, 1e-3, 1e-1)], ids=["adamw", "muon"]
)
def test_a_new_teacher_is_what_plain_torch_computes(
    place: Any, tmp_path: Path, text: Any, optimizer: Optimizer, near: float, tolerance: float
) -> None:
    made = place(inputs={"tokens": tmp_path / "tokens"}, log_every=1)
    spec = TeacherSpec(
        tokens="t", architecture=SHAPE, token_budget=LENGTH * BATCH * 8 + 1, batch_size=BATCH, sequence_length=LENGTH,
        optimizer=optimizer, numerics=Numerics(), seed=SEED,
    )  # fmt: skip
    run_stage(spec, made)
    model = random_model()
    model.weights["lm_head.weight"].zero_()
    start = dict(model.weights)
    taught = models_language(model, text, SEED, 8, optimizer)
    agrees(made, taught, near)
    found, wanted, before = (without_key_biases(w) for w in (weights_of(made.out), model.weights, start))
    moved_alike(found, wanted, before, tolerance)
    assert taught.losses[0] == pytest.approx(np.log(300))


@pytest.mark.parametrize("dropout", [None, 0.2], ids=["of a new teacher", "of a pretrained one"])
def test_a_student_from_scratch_is_what_plain_torch_computes(
    place: Any, tmp_path: Path, text: Any, dropout: float | None
) -> None:
    """From random weights of its seed, reading as students read, with the dropout of its configuration."""
    inputs = {"tokens": tmp_path / "tokens", "teacher": tmp_path / "teacher"}
    GPTNeoXConfig(**CONFIG, hidden_dropout=dropout or 0.0, architectures=["GPTNeoXForCausalLM"]).save_pretrained(
        inputs["teacher"]
    )
    made = place(inputs=inputs, log_every=1)
    spec = ScratchSpec(
        tokens="t", teacher=None if dropout is None else "r", architecture=SHAPE, operator=HyenaConfig(), layers=(1,),
        token_budget=LENGTH * BATCH * 6, batch_size=BATCH, sequence_length=LENGTH, optimizer=ADAMW, numerics=Numerics(),
        seed=SEED,
    )  # fmt: skip
    run_stage(spec, made)
    model = random_model(dropout or 0.0)
    if dropout is None:
        model.weights["lm_head.weight"].zero_()
    plain.put(model, (1,), HyenaConfig(), 32, SEED)
    start = dict(model.weights)
    agrees(made, models_language(model, text, SEED + 1, 6, ADAMW), 1e-5)
    found, wanted, before = (without_key_biases(w) for w in (load_file(made.out / WEIGHTS), model.weights, start))
    moved_alike(found, wanted, before, 5e-3)


def inputs_of(tmp_path: Path, teacher: Path) -> dict[str, Path]:
    return {"tokens": tmp_path / "tokens", "teacher": teacher, "parent": teacher, "subject": teacher}


def spec_of(kind: str, dtype: Any) -> Any:
    """A short stage of a kind that computes forward passes."""
    common: dict[str, Any] = {"tokens": "t", "sequence_length": LENGTH, "numerics": Numerics(dtype=dtype)}
    trained: dict[str, Any] = {"token_budget": LENGTH * 2, "batch_size": 2, "optimizer": ADAMW, "seed": 0}
    match kind:
        case "teacher":
            return TeacherSpec(**common, **trained, architecture=SHAPE)
        case "scratch":
            return ScratchSpec(
                **common, **trained, architecture=SHAPE, teacher=None, operator=HyenaConfig(), layers=(1,)
            )
        case "distil":
            short = tuple(phase.model_copy(update={"steps": 1}) for phase in PHASES)
            return distil_spec((0, 1), (0, 1), 0, ADAMW, dtype=dtype).model_copy(update={"phases": short})
        case _:
            evaluation = Evaluation(tokens=LENGTH * 2, prompts=0)
            return EvaluateSpec(**common, teacher="r", subject="s", evaluation=evaluation)


@contextlib.contextmanager
def watched(look: Callable[..., None]) -> Iterator[None]:
    """Let `look` see every call of every module."""
    watching = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield
    finally:
        watching.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["teacher", "scratch", "distil", "evaluate"])
def test_every_forward_pass_has_the_precision_of_the_study(
    place: Any, tiny_teacher: Path, tmp_path: Path, text: Any, kind: str, dtype: Any
) -> None:
    """Parameters stay float32: what every map of every layer gives has the precision that was asked for."""
    write_tokens(tmp_path / "tokens", valid=text)
    spec, made = spec_of(kind, dtype), place(inputs=inputs_of(tmp_path, tiny_teacher))
    seen: set[torch.dtype] = set()

    def look(module: torch.nn.Module, _: Any, output: Any) -> None:
        of_a_batch = isinstance(module, torch.nn.Linear) and output.ndim == 3 and output.shape[1] == LENGTH
        if of_a_batch and output.shape[2] != 300:  # neither a look at the model beforehand nor an output head
            seen.add(output.dtype)

    with watched(look):
        run_stage(spec, made)
    assert seen == {getattr(torch, dtype)}


def test_an_operator_starts_from_the_attention_on_the_first_text_of_the_path(
    place: Any, tiny_teacher: Path, tmp_path: Path, text: Any
) -> None:
    """Sixteen sequences in the students' order, wherever the path's earlier stages ended; an untrained second stage."""
    positive = ImplicitFilterConfig(positive=True, width=16, features=9)
    power = HyenaConfig(heads=HEADS, feature_map="power", key_dim=3, normalise=True, key_gate=True, filter=positive)
    inputs = {"tokens": tmp_path / "tokens", "teacher": tiny_teacher, "parent": tiny_teacher}
    student, first = Plain(weights_of(tiny_teacher), HEADS), plain.sequences(text, LENGTH, SEED + 1)
    text_BL = torch.stack([next(first) for _ in range(16)])
    for stage, (layers, operator) in enumerate([((0,), HyenaConfig()), ((1, 2), power)]):
        spec = distil_spec(layers, layers, 7 * stage, ADAMW)
        made = place(f"stage {stage}", inputs)
        run_stage(spec.model_copy(update={"phases": (), "operator": operator}), made)
        plain.put(student, layers, operator, 96, SEED, text_BL=text_BL)
        inputs["parent"] = made.out
    found = Plain({n: t for n, t in weights_of(tiny_teacher).items() if n in student.weights}, HEADS)
    found.weights |= load_file(inputs["parent"] / WEIGHTS)
    found.operators = student.operators
    with torch.no_grad():
        wanted_BLV, found_BLV = (plain.run(model, text_BL).logits_BLV for model in (student, found))
    assert found.weights.keys() == student.weights.keys()
    assert (found_BLV - wanted_BLV).abs().max() < 1e-3 * wanted_BLV.abs().max()


@pytest.mark.parametrize("kind", ["teacher", "scratch", "distil"])
def test_training_repeats_its_bits_where_a_device_could_do_otherwise(
    place: Any, tiny_teacher: Path, tmp_path: Path, text: Any, kind: str
) -> None:
    """An operation without a deterministic form is refused in every step, not only warned of."""
    torch.use_deterministic_algorithms(False)
    spec, made = spec_of(kind, "float32"), place(inputs=inputs_of(tmp_path, tiny_teacher))
    seen: list[tuple[bool, bool]] = []

    def look(*_: Any) -> None:
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )

    with watched(look):
        run_stage(spec, made)
    assert set(seen) == {(True, False)}
