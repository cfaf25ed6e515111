"""The memory that a plan tells of, against modules that are built and what torch keeps."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    OperatorConfig,
    SkipConfig,
    WindowConfig,
)
from operators.mixing.near import ROWS
from operators.registry import build
from orchestrator.distill.measuring.probes import PASSED
from orchestrator.distill.measuring.statistics import EXAMPLES, NUMBERS
from orchestrator.distill.models.student import new_teacher, parameter_count
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training.losses import LOGITS_ELSEWHERE, LOGITS_PER_CHUNK, train_operators_only
from orchestrator.distill.training.optimizers import set_trainable
from orchestrator.study import memory
from orchestrator.study.memory import gathered_bytes, held_bytes, kept_by_layers, passing_bytes, stage_bytes
from orchestrator.study.model_sizes import Operator, operator_parameters, sizes_of
from orchestrator.study.recipe import Average, Losses, Numerics, Optimizer
from orchestrator.study.spec import Architecture, DistilSpec, PhaseSpec
from tests.benchmarks.memory import SHAPES, Case, expected, measured

SHAPE = Architecture(layers=4, hidden=64, heads=4, intermediate=192, max_length=128, vocabulary=500)
POSITIVE = ImplicitFilterConfig(positive=True, width=16, features=9)
POWER = HyenaConfig(
    heads=4, feature_map="power", key_dim=8, normalise=True, key_gate=True, filter=POSITIVE, init="random"
)
OPERATORS: dict[str, OperatorConfig] = {
    "order 2": HyenaConfig(init="random"),
    "order 3": HyenaConfig(order=3, short_taps=5, init="random"),
    "heads": HyenaConfig(heads=4, init="random"),
    "hedgehog": HyenaConfig(heads=4, feature_map="hedgehog", key_gate=True, init="random"),
    "power": POWER,
    "modal": HyenaConfig(filter=ModalFilterConfig(modes=3), init="random"),
    "modal, positive": HyenaConfig(heads=4, filter=ModalFilterConfig(modes=3, positive=True), init="random"),
    "taps": HyenaConfig(filter=FirFilterConfig(taps=4), init="random"),
    "all of the filter": HyenaConfig(filter=ImplicitFilterConfig(train_features=True, depth=1), init="random"),
    "window": dataclasses.replace(POWER, window=16, sinks=4),
    "window, tied": HyenaConfig(
        heads=4, feature_map="power", normalise=True, window=16, tied=True, filter=POSITIVE, init="random"
    ),
    "window, normed": dataclasses.replace(POWER, window=48, near_norm="rms"),
    "window, groups": dataclasses.replace(POWER, window=16, groups=2, near_norm="layer"),
    "window, tied, groups": HyenaConfig(
        heads=4, feature_map="power", normalise=True, window=16, groups=1, tied=True, filter=POSITIVE, init="random"
    ),
    "window alone, groups": WindowConfig(window=16, heads=4, groups=2, init="random"),
    "window alone": WindowConfig(window=16, heads=4, init="random"),
    "window alone, normed": WindowConfig(heads=2, near_norm="layer_all", init="random"),
    "little of the filter": HyenaConfig(filter=ImplicitFilterConfig(train_frequency=False), init="random"),
}


@pytest.mark.parametrize("between", [None, 96])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operators_parameters_are_those_of_the_module(name: str, between: int | None) -> None:
    config = OPERATORS[name]
    made: Any = build(config, 64, 128, between)
    found = operator_parameters(config, 64, 128, between)
    muon = {made.in_proj.weight, made.out_proj.weight}
    trained = {parameter for parameter in made.parameters() if parameter.requires_grad}
    assert found.matrices == sum(p.numel() for p in muon)
    assert found.others == sum(p.numel() for p in trained - muon)
    assert found.fixed == sum(p.numel() for p in made.parameters() if not p.requires_grad)
    assert operator_parameters(SkipConfig(), 64, 128) == Operator()


def test_a_window_alone_has_the_heads_of_the_attention() -> None:
    assert operator_parameters(WindowConfig(), 64, 128, heads=(4, 4)) == operator_parameters(
        WindowConfig(heads=4), 64, 128
    )
    assert operator_parameters(WindowConfig(), 64, 128, heads=(2, 2)) != operator_parameters(
        WindowConfig(heads=4), 64, 128
    )


def test_a_window_shares_keys_and_values_as_the_attention_does() -> None:
    """Where it has as many heads."""
    for config in (WindowConfig(), dataclasses.replace(POWER, window=16, init="transfer")):
        found, shared = (operator_parameters(config, 64, 128, heads=(4, groups)).trained for groups in (4, 2))
        assert found - shared == 2 * 32 * (64 + 1 + config.short_taps + 1)  # rows with their biases and taps
        own = dataclasses.replace(config, heads=8)
        assert operator_parameters(own, 64, 128, heads=(4, 2)) == operator_parameters(own, 64, 128, heads=(4, 4))


def test_sizes_of_a_teacher_that_is_made_here_are_those_of_the_model() -> None:
    model, found = new_teacher(SHAPE, 0), sizes_of(SHAPE)
    attention = sum(p.numel() for name, p in model.named_parameters() if ".0.attention." in name)
    assert (found.parameters, found.attention) == (parameter_count(model), attention)
    assert (found.embedding, found.head, found.gated) == (500 * 64, 500 * 64, False)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 192}),
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 192, "tie_word_embeddings": True}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 192}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 192}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 192}),
        ("gpt_neox", {"intermediate_size": 192}),
        ("gpt2", {"n_inner": 192}),
        ("gpt_bigcode", {"n_inner": 192}),
        ("opt", {"ffn_dim": 192, "word_embed_proj_dim": 64}),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_sizes_of_pretrained_teachers_are_within_a_few_percent_of_the_model(kind: str, more: dict[str, Any]) -> None:
    """Norms, biases and learned positions are more in so small a model than in one that is used."""
    told = {
        "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 16, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        **more,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **told)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = sizes_of(SHAPE, config.to_diff_dict() | {"model_type": kind})
    names = [(name, p.numel()) for name, p in model.named_parameters()]
    attention = sum(count for name, count in names if ".0." in name and "attn" in name.replace("attention", "attn"))
    assert found.parameters == pytest.approx(sum(count for _, count in names), rel=0.03)
    assert found.between == 4 * more.get("head_dim", 16)
    assert found.attention == pytest.approx(attention, rel=0.05)
    head = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert (found.embedding, found.head) == (500 * 64, 500 * 64 * head)
    assert found.gated == any("gate" in name and "router" not in name for name, _ in names)


def kept_bytes(model: Any, ids_BL: Tensor, dtype: str) -> int:
    """What torch keeps for the gradients of a trunk's output, weights and the output aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    narrow = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), narrow:
        output = model.base_model(input_ids=ids_BL, use_cache=False)
    del output
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
@pytest.mark.parametrize(
    "name", ["order 2", "order 3", "heads", "power", "modal", "window", "window, tied", "window alone"]
)
def test_activations_are_about_what_torch_keeps(name: str, rest_scale: float, dtype: Any) -> None:
    shape = SHAPE.model_copy(update={"hidden": 128, "intermediate": 512})
    model, layers = new_teacher(shape, 0).eval(), (1, 3)
    swap(model, layers, OPERATORS[name], torch.Generator().manual_seed(0))
    train_operators_only(model)
    set_trainable(model, rest_scale > 0, ())
    kept = kept_bytes(model, torch.ones(4, 128, dtype=torch.int64), dtype)
    spec = spec_of(OPERATORS[name], rest_scale, dtype)
    sizes = sizes_of(shape)
    found = kept_by_layers(spec, sizes, layers, 4 * 128)
    assert len(found) == (4 if rest_scale else 3), "no gradient goes below the lowest operator"
    assert sum(found) == pytest.approx(kept, rel=0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
@pytest.mark.parametrize("groups", [1, 4])
def test_activations_of_a_llama_are_about_what_torch_keeps(groups: int, rest_scale: float, dtype: Any) -> None:
    told = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    config = LlamaConfig(**told, num_attention_heads=4, num_key_value_heads=groups, max_position_embeddings=128)
    model, layers = LlamaForCausalLM(config).eval(), (1, 3)
    swap(model, layers, POWER, torch.Generator().manual_seed(0))
    train_operators_only(model)
    set_trainable(model, rest_scale > 0, ())
    kept = kept_bytes(model, torch.ones(4, 128, dtype=torch.int64), dtype)
    sizes = sizes_of(SHAPE.model_copy(update={"hidden": 128, "intermediate": 384}), config.to_dict())
    found = kept_by_layers(spec_of(POWER, rest_scale, dtype), sizes, layers, 4 * 128)
    assert sum(found) == pytest.approx(kept, rel=0.1)


def spec_of(operator: Any, rest_scale: float, dtype: Any = "float32", **more: Any) -> DistilSpec:
    return DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(1, 3), new_layers=(1, 3), operator=operator, batch_size=4,
        phases=(PhaseSpec(losses=Losses(kl=1.0), steps=2),), sequence_length=128, first_sequence=0, freeze=(),
        optimizer=Optimizer(rest_scale=rest_scale), seed=0, **{"numerics": Numerics(dtype=dtype), **more},
    )  # fmt: skip


def test_activations_made_again_grow_with_a_layer_only() -> None:
    few, many = (sizes_of(SHAPE.model_copy(update={"layers": layers})) for layers in (4, 40))
    kept, again = (
        [passing_bytes(spec_of(POWER, 0.1, checkpoint_activations=c), sizes, (1, 3)) for sizes in (few, many)]
        for c in (False, True)
    )
    assert again[1] - again[0] == 36 * 4 * 4 * 128 * 64, "the residual stream"
    assert again[1] - again[0] < (kept[1] - kept[0]) / 10


@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
def test_what_is_spread_is_divided_and_layers_are_whole_one_by_one(rest_scale: float) -> None:
    sizes, operator = sizes_of(SHAPE), operator_parameters(POWER, 64, 128)
    whole, spread = (
        spec_of(POWER, rest_scale, numerics=Numerics(world_size=2, sharding=sharding)) for sharding in ("none", "full")
    )
    assert held_bytes(spread, sizes, (1, 3)) == held_bytes(whole, sizes, (1, 3)) // 2  # type: ignore[operator]
    assert gathered_bytes(whole, sizes, (1, 3)) == 0
    tables, layer = 2 * 500 * 64, sizes.blocks // 4 - sizes.attention + operator.trained
    own = 3 * tables + 2 * layer if rest_scale else 2 * operator.trained  # weights of tables, gradients and their copy
    assert gathered_bytes(spread, sizes, (1, 3)) == 4 * (tables + 3 * layer + own)
    passing = passing_bytes(spread, sizes, (1, 3))
    most = held_bytes(spread, sizes, (1, 3)) + passing + 4 * (tables + 3 * layer + own)  # type: ignore[operator]
    assert stage_bytes(spread, sizes, (1, 3)) == round(memory.PROCESS["cpu"] + memory.SLACK * most)


@pytest.mark.parametrize("rest_scale", [0.0, 0.1], ids=["operators alone train", "all trains"])
def test_an_average_is_as_large_as_what_trains(rest_scale: float) -> None:
    sizes = sizes_of(SHAPE)
    plain, averaged = (
        spec_of(POWER, rest_scale).changed(optimizer=Optimizer(rest_scale=rest_scale, average=average))
        for average in (None, Average(ema=0.9))
    )
    rest = sizes.blocks - 2 * sizes.attention + sizes.embedding + sizes.head if rest_scale else 0
    trained = 2 * operator_parameters(POWER, 64, 128).trained + rest
    assert held_bytes(averaged, sizes, (1, 3)) == held_bytes(plain, sizes, (1, 3)) + 4 * trained  # type: ignore[operator]


def test_a_process_of_many_begins_with_the_whole_teacher() -> None:
    sizes = sizes_of(SHAPE.model_copy(update={"layers": 400}))
    for numerics, width in ({}, 4), ({"dtype": "bfloat16", "teacher_dtype": "bfloat16"}, 2):
        spec = spec_of(
            POWER, 0.0, numerics=Numerics(world_size=100, sharding="full", **numerics), checkpoint_activations=True
        )
        least = memory.PROCESS["cuda"] + memory.SLACK * width * sizes.parameters
        assert stage_bytes(spec, sizes, (1, 3), "cuda") == round(least)


def test_pieces_are_as_large_as_the_stages_take_them() -> None:
    """The plan must not import what they are stated by: it imports torch."""
    assert {"cpu": LOGITS_PER_CHUNK, "cuda": LOGITS_ELSEWHERE} == memory.LOGITS
    assert (memory.WEIGHTS, memory.EXAMPLES, memory.NEAR_ROWS) == (NUMBERS, EXAMPLES, ROWS)
    assert memory.PASSED == PASSED


LARGER = Architecture(layers=6, hidden=384, heads=4, intermediate=1536, max_length=512, vocabulary=12_000)
PEAKS = {
    "all trained": Case(LARGER, rest_scale=0.1, numerics=Numerics(), length=512),
    "operators trained, teacher in bfloat16": Case(SHAPES["57 M"]),
    "activations made again": Case(LARGER, rest_scale=0.1, numerics=Numerics(), length=512, again=True),
    "evaluation": Case(LARGER, kind="evaluate", numerics=Numerics(), length=512, batch=2),
    "probes": Case(LARGER, kind="probes", numerics=Numerics(), length=512),
    "teacher": Case(LARGER, kind="teacher", numerics=Numerics(), length=256, batch=2),
}


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is that of the whole process elsewhere")
@pytest.mark.parametrize("name", ["all trained", *(pytest.param(n, marks=pytest.mark.slow) for n in list(PEAKS)[1:])])
def test_the_peak_of_a_process_is_told_to_15_percent(name: str) -> None:
    process = memory.PROCESS["cpu"]
    assert process + expected(PEAKS[name]) == pytest.approx(process + measured(PEAKS[name])["peak"], rel=0.15)
