"""Training speed is that of what the study trains; decoding and ratios are pinned in test_golden_speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, OperatorConfig, SkipConfig
from orchestrator.distill import stage
from orchestrator.distill.measuring import throughput as module
from orchestrator.distill.measuring.throughput import measure_throughput
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap, swapped
from orchestrator.distill.training import memory
from orchestrator.distill.training.optimizers import make_optimizers
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.schema import Throughput
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


@pytest.mark.parametrize("built", [True, False])
def test_prefill_and_decode_run_through_the_core_where_there_is_one_and_training_as_the_study_says(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    used, seen, halves = [False], {}, set()

    def use(on: bool) -> bool:
        used[0] = on and built
        return used[0]

    def noted(name: str) -> Any:
        real = getattr(module, name)

        def call(*words: Any) -> Any:
            seen.setdefault(name, set()).add((used[0], torch.get_num_threads()))
            halves.add(float(torch.tensor(1e-40) * 0.5))
            return real(*words)

        return call

    monkeypatch.setattr(module.native, "use", use)
    for name in ("_prefill", "_decode", "_train"):
        monkeypatch.setattr(module, name, noted(name))
    spec = spec_of(HyenaConfig(), True).model_copy(update={"numerics": Numerics(threads=2)})
    result = measure_throughput(spec, place(inputs={"teacher": tiny_teacher}))
    assert result["core"] == ("native" if built else "torch")
    assert seen == {"_prefill": {(built, 2)}, "_decode": {(built, 2)}, "_train": {(False, 2)}}
    assert halves == {0.0}, "random filters were measured with the smallest numbers"
    assert float(torch.tensor(1e-40) * 0.5) > 0.0, "and what comes after has lost them"


def test_the_core_is_as_it_was_after_a_measurement_and_after_any_stage(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.native, "available", lambda: True)
    monkeypatch.setattr(module.native, "_used", False)
    spec = spec_of(HyenaConfig(), True)
    monkeypatch.setattr(module, "_compare", lambda *_: {"{}_ratio": module.native.in_use()})
    monkeypatch.setattr(module, "_cache_mb", lambda *_: 0.0)
    found = measure_throughput(spec, place(inputs={"teacher": tiny_teacher}))
    assert found["decode_ratio"] == {"16": True} and found["train_ratio"] is False
    assert not module.native.in_use()
    monkeypatch.setitem(stage.STAGES, "throughput", lambda *_: module.native.use(True))
    assert stage.run_stage(spec, place()) and not module.native.in_use()
    monkeypatch.setattr(module.native, "_used", True)
    monkeypatch.setitem(stage.STAGES, "throughput", lambda *_: module.native.use(False))
    assert not stage.run_stage(spec, place()) and module.native.in_use()
    monkeypatch.setattr(module.native, "_used", False)


def test_a_clock_waits_for_the_device_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    with module._clock("cuda:0"):
        assert len(waited) == 1
    assert len(waited) == 2
    with module._clock("cpu"):
        pass
    assert len(waited) == 2


def test_the_peak_of_a_gpu_is_what_its_allocator_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [5 * 2**20]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 2**20))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    assert memory.peak_mb("cuda") == 5.0
    memory.reset_peak("cuda")
    assert memory.peak_mb("cuda") == 1.0


def test_the_peak_of_a_process_is_told_in_megabytes_since_it_was_forgotten() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not let a process forget its peak")
    torch.ones(100 * 2**18)
    memory.reset_peak("cpu")
    before = memory.peak_mb("cpu")
    held = torch.ones(50 * 2**18)  # of 4 bytes
    after = memory.peak_mb("cpu")
    assert 45 <= after - before <= 60 and len(held)
    del held
    assert memory.peak_mb("cpu") == pytest.approx(after, abs=5)  # a peak, not what is held now; Linux counts roughly
