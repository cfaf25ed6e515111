"""What a recipe may ask for beside losses and rates, against plain torch: averages, rates by depth, hits, epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill import start
from orchestrator.distill.data import batch
from orchestrator.distill.models.student import WEIGHTS
from orchestrator.distill.stage import run_stage
from orchestrator.study.recipe import Average, LogitKL, Losses, Numerics, Optimizer
from orchestrator.study.spec import DistilSpec, PhaseSpec, ScratchSpec
from tests.distill import plain
from tests.distill.plain import Plain
from tests.distill.test_golden import (
    ADAMW,
    BATCH,
    HEADS,
    LENGTH,
    MUON,
    SEED,
    SHAPE,
    WINDOWS,
    agrees,
    moved_alike,
    random_model,
    rates_of,
    weights_of,
    without_key_biases,
)
from tests.texts import write_tokens

LAYERS, STEPS, LIMIT, HIT = (0, 1), 7, 5, 4.0  # 21 windows of which five are different: more than four epochs
EMA, LAST = Average(ema=0.7), Average(last=0.4)  # the last three of seven


@pytest.fixture
def text(tmp_path: Path) -> np.ndarray[Any, Any]:
    """Of four tokens, so that windows have hits and misses."""
    values: np.ndarray[Any, Any] = np.random.default_rng(1).integers(0, 4, LENGTH * WINDOWS)
    write_tokens(tmp_path / "tokens", train=values)
    return values


def spec_of(optimizer: Optimizer) -> DistilSpec:
    losses = Losses(kl=LogitKL(weight=0.7, temperature=2.0), ce=0.2, hit_weight=HIT)
    return DistilSpec(
        tokens="t", teacher="r", parent="p", layers=LAYERS, new_layers=LAYERS, operator=HyenaConfig(),
        phases=(PhaseSpec(losses=losses, steps=STEPS),), batch_size=BATCH, sequence_length=LENGTH, first_sequence=0,
        text_windows=LIMIT, freeze=(), optimizer=optimizer, numerics=Numerics(), seed=SEED,
    )  # fmt: skip


@pytest.mark.parametrize("average", [EMA, LAST], ids=["ema", "last"])
@pytest.mark.parametrize(
    ("optimizer", "near", "tolerance"), [(ADAMW, 1e-5, 5e-3), (MUON, 1e-3, 1e-1)], ids=["adamw", "muon"]
)
def test_a_stage_with_all_of_them_is_what_plain_torch_computes(
    place: Any,
    tiny_teacher: Path,
    tmp_path: Path,
    text: Any,
    average: Average,
    optimizer: Optimizer,
    near: float,
    tolerance: float,
) -> None:
    optimizer = optimizer.model_copy(update={"layer_decay": 0.5, "average": average})
    made = place(inputs={"tokens": tmp_path / "tokens", "teacher": tiny_teacher, "parent": tiny_teacher}, log_every=1)
    run_stage(spec_of(optimizer), made)
    weights = weights_of(tiny_teacher)
    teacher, student = Plain(weights, HEADS), Plain(weights, HEADS)
    plain.put(student, LAYERS, HyenaConfig(), 96, SEED)
    start, read = dict(student.weights), plain.sequences(text, LENGTH, SEED + 1, LIMIT)

    def loss(_: int) -> torch.Tensor:
        ids_BL = torch.stack([next(read) for _ in range(BATCH)])
        kl = plain.divergence(teacher, student, ids_BL, 2.0, HIT)
        return 0.7 * kl + 0.2 * plain.surprise(student, ids_BL, HIT)

    taught = plain.train(student, loss, STEPS, rates_of(optimizer))
    agrees(made, taught, near)
    found = {n: t for n, t in weights.items() if n in student.weights} | load_file(made.out / WEIGHTS)
    moved_alike(*(without_key_biases(w) for w in (found, student.weights, start)), tolerance)


def test_a_student_from_scratch_reads_the_same_few_windows_and_ends_with_the_average(
    place: Any, tmp_path: Path, text: Any
) -> None:
    optimizer = ADAMW.model_copy(update={"average": EMA})
    made = place(inputs={"tokens": tmp_path / "tokens"}, log_every=1)
    spec = ScratchSpec(
        tokens="t", teacher=None, architecture=SHAPE, operator=HyenaConfig(), layers=(1,),
        token_budget=LENGTH * BATCH * STEPS, batch_size=BATCH, sequence_length=LENGTH, text_windows=LIMIT,
        optimizer=optimizer, numerics=Numerics(), seed=SEED,
    )  # fmt: skip
    run_stage(spec, made)
    model, read = random_model(), plain.sequences(text, LENGTH, SEED + 1, LIMIT)
    model.weights["lm_head.weight"].zero_()
    plain.put(model, (1,), HyenaConfig(), 32, SEED)
    start = dict(model.weights)
    steps = (lambda _: plain.surprise(model, torch.stack([next(read) for _ in range(BATCH)])), STEPS)
    agrees(made, plain.train(model, *steps, rates_of(optimizer)), 1e-5)
    found, wanted, before = (without_key_biases(w) for w in (load_file(made.out / WEIGHTS), model.weights, start))
    moved_alike(found, wanted, before, 5e-3)


def test_epochs_of_few_windows_have_each_of_the_first_ones_once() -> None:
    tokens = np.arange(LENGTH * WINDOWS)
    whole = batch(tokens, LENGTH, SEED, 0, LIMIT).tolist()
    found = batch(tokens, LENGTH, SEED, 0, 3 * LIMIT, LIMIT).tolist()
    assert found[:LIMIT] == whole
    for epoch in (1, 2):
        again = found[epoch * LIMIT : (epoch + 1) * LIMIT]
        assert sorted(again) == sorted(whole)
        assert again != found[(epoch - 1) * LIMIT : epoch * LIMIT]


def test_statistics_are_of_the_same_few_windows(
    place: Any, tiny_teacher: Path, tmp_path: Path, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = start.attention_statistics

    def looked(model: Any, layers: Any, ids_BL: torch.Tensor, **more: Any) -> Any:
        seen.append(ids_BL)
        return real(model, layers, ids_BL, **more)

    monkeypatch.setattr(start, "attention_statistics", looked)
    operator = HyenaConfig(heads=HEADS, filter=ImplicitFilterConfig(positive=True, width=16, features=9))
    inputs = {"tokens": tmp_path / "tokens", "teacher": tiny_teacher, "parent": tiny_teacher}
    run_stage(spec_of(ADAMW).changed(operator=operator, phases=()), place(inputs=inputs))
    read = plain.sequences(text, LENGTH, SEED + 1, LIMIT)
    assert torch.equal(seen[0], torch.stack([next(read) for _ in range(16)]))


@pytest.mark.parametrize("limit", [None, WINDOWS, WINDOWS + 1])
def test_a_limit_that_holds_nothing_back_changes_nothing(limit: int | None) -> None:
    tokens, count = np.arange(LENGTH * WINDOWS), 2 * WINDOWS + 6
    read = plain.sequences(tokens, LENGTH, SEED)
    assert torch.equal(batch(tokens, LENGTH, SEED, 0, count, limit), torch.stack([next(read) for _ in range(count)]))
