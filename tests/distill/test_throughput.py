"""Training speed is that of what the study trains; decoding and ratios are pinned in test_golden_speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, OperatorConfig, SkipConfig
from orchestrator.distill.measuring import throughput as module
from orchestrator.distill.measuring.throughput import measure_throughput
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import attention_of, swap, swapped
from orchestrator.distill.training.optimizers import make_optimizers
from orchestrator.study.schema import Numerics, Optimizer, Throughput
from orchestrator.study.spec import ThroughputSpec

LAYERS = (1, 2)
Seen = dict[str, tuple[set[str], set[str]]]


def spec_of(operator: OperatorConfig, rest_trains: bool, freeze: tuple[str, ...] = ()) -> ThroughputSpec:
    return ThroughputSpec(
        teacher="r", operator=operator, layers=LAYERS, train_batch_size=2, sequence_length=12, hardware="h",
        throughput=Throughput(lengths=(16,), decode_tokens=2, repeats=1), numerics=Numerics(),
        rest_trains=rest_trains, freeze=freeze,
    )  # fmt: skip


def measured(place: Any, folder: Path, spec: ThroughputSpec, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """By model: which parameters, and which layers' inputs, got a gradient in its training."""
    seen: Seen = {}
    real = module.next_token_loss

    def looking(model: Any, ids_BL: Tensor) -> Tensor:
        parameters, inputs = seen.setdefault("student" if swapped(model) else "teacher", (set(), set()))
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: parameters.add(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        entered: list[Tensor] = []
        handles += [
            layer.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
            for layer in model.gpt_neox.layers
        ]
        loss = real(model, ids_BL)
        for index, x_BLD in enumerate(entered):
            if x_BLD.requires_grad:
                x_BLD.register_hook(lambda _, index=index: inputs.add(str(index)))
        for handle in handles[-len(entered) :]:
            handle.remove()
        return loss

    monkeypatch.setattr(module, "next_token_loss", looking)
    result = measure_throughput(spec, place(inputs={"teacher": folder}))
    assert result["train_ratio"] > 0 and result["train_tokens_per_s"] > 0
    return seen


@pytest.mark.parametrize("freeze", [(), ("*.layers.0.*", "*operator.direct", "lm_head.*")], ids=["all", "globs"])
@pytest.mark.parametrize("rest_scale", [0.3, 0.0])
def test_gradients_are_those_that_the_stages_take(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, rest_scale: float, freeze: tuple[str, ...]
) -> None:
    seen = measured(place, tiny_teacher, spec_of(HyenaConfig(), rest_scale > 0, freeze), monkeypatch)
    teacher, student = load_teacher(tiny_teacher), load_teacher(tiny_teacher)
    swap(student, LAYERS, HyenaConfig(), torch.Generator())
    make_optimizers(student, Optimizer(rest_scale=rest_scale), freeze)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert seen["student"][0] == trained
    attention = {id(p) for layer in LAYERS for p in attention_of(teacher, layer).parameters()}
    both = {name for name in trained if ".operator." not in name}
    assert seen["teacher"][0] == both | {name for name, p in teacher.named_parameters() if id(p) in attention}


def test_with_the_rest_frozen_no_gradient_goes_below_the_lowest_swapped_layer(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measured(place, tiny_teacher, spec_of(HyenaConfig(), False), monkeypatch)
    assert seen["student"][1] == seen["teacher"][1] == {"2"}


def test_a_skipped_layer_with_the_rest_frozen_has_the_gradient_that_any_operator_there_needs(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measured(place, tiny_teacher, spec_of(SkipConfig(), False), monkeypatch)
    assert seen["student"] == (set(), {"1", "2"})
