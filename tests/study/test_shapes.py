"""The sizes of models read from their configurations alone, against transformers' own classes of every type."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator.study import shapes
from orchestrator.study.loader import StudyError
from orchestrator.study.shapes import (
    ENCODERS,
    REFUSED,
    SIZES,
    UNSAID,
    attention_layers,
    causal_types,
    inner_width,
    sizes,
)

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# What a class asks for that makes no configuration without arguments.
WITHOUT = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
NEEDED: dict[str, Any] = {"gemma4_assistant": {"text_config": WITHOUT}}
TWO_A_LAYER = {"longcat_flash"}  # counts the two attentions of a layer as layers
OF_CLASSES = dict(
    zip(
        SIZES,
        (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "vocab_size",
        ),
        strict=True,
    )
)


def default(kind: str) -> tuple[Any, dict[str, Any]]:
    """The configuration of a type that nobody has set, and what a folder would say of it."""
    config = CONFIG_MAPPING[kind](**NEEDED.get(kind, {}))
    return config, json.loads(config.to_json_string())


def of_class(config: Any) -> dict[str, int]:
    """The sizes that a configuration object has by transformers' names for them."""
    told = config.get_text_config(decoder=True)
    told.allow_global_per_layer_attribute_access = True
    found = {size: getattr(told, name, None) for size, name in OF_CLASSES.items()}
    return {size: value for size, value in found.items() if type(value) is int}


def test_the_types_are_those_of_transformers() -> None:
    assert set(TYPES) <= causal_types()
    assert {*ENCODERS, *REFUSED} <= causal_types()
    assert len(TYPES) >= 180


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_has_the_sizes_of_its_class_or_is_refused_with_a_reason(kind: str) -> None:
    config, told = default(kind)
    if kind in ENCODERS or kind in REFUSED or config.is_encoder_decoder:
        with pytest.raises(StudyError, match=f"model type '{kind}' (is|has) .*: give a decoder"):
            sizes(told)
        return
    found, wanted = sizes(told), of_class(config)
    assert tuple(found) == SIZES
    if kind in TWO_A_LAYER:
        wanted["layers"] //= 2
    assert {size: found[size] for size in wanted} == wanted
    assert {"layers", "hidden", "heads", "vocabulary"} <= wanted.keys()
    assert set(attention_layers(told, found["layers"])) <= set(range(found["layers"]))


def test_an_encoder_that_was_made_a_decoder_is_one() -> None:
    config = CONFIG_MAPPING["bert"](is_decoder=True)
    assert sizes(json.loads(config.to_json_string()))["heads"] == 12


@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind in UNSAID for size in UNSAID[kind]])
def test_what_folders_leave_unsaid_is_the_default_of_the_class(kind: str, size: str) -> None:
    config, told = default(kind)
    assert UNSAID[kind][size] == of_class(config)[size]
    del told[OF_CLASSES[size]]
    assert sizes(told)[size] == UNSAID[kind][size]


PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "bloom of old": (
        {"model_type": "bloom", "n_layer": 24, "n_embed": 1024, "n_head": 16, "seq_length": 2048, "vocab_size": 250880},
        (24, 1024, 16, 4096, 2048, 250880),
    ),
    "falcon without its length": (
        {"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71,
         "vocab_size": 65024},
        (32, 4544, 71, 18176, 2048, 65024),
    ),
    "gemma 3 with pictures": (
        {"model_type": "gemma3", "vision_config": {"num_hidden_layers": 27, "hidden_size": 1152},
         "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560,
                         "intermediate_size": 10240}},
        (34, 2560, 8, 10240, 131072, 262208),
    ),
    "mpt": (
        {"model_type": "mpt", "n_layers": 32, "d_model": 4096, "n_heads": 32, "max_seq_len": 2048, "vocab_size": 50432},
        (32, 4096, 32, 16384, 2048, 50432),
    ),
    "gpt2 without an inner width": (
        {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "n_ctx": 512,
         "n_inner": None, "vocab_size": 50257},
        (12, 768, 12, 3072, 1024, 50257),
    ),
    "an exported student": (
        {"model_type": "layerswap", "base_model_type": "gpt_neo", "num_layers": 4, "hidden_size": 8, "num_heads": 2,
         "max_position_embeddings": 64, "vocab_size": 30},
        (4, 8, 2, 32, 64, 30),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("told", "wanted"), PUBLISHED.values(), ids=PUBLISHED)
def test_configurations_as_they_are_published(told: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert tuple(sizes(told).values()) == wanted


HYBRIDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "none tells them apart": ({}, tuple(range(8))),
    "kinds": ({"layer_types": ["linear_attention", "full_attention", "conv", "sliding_attention"] * 2}, (1, 3, 5, 7)),
    "kinds that look at their own chunk": ({"layer_types": ["chunked_attention", "full_attention"] * 4}, (1, 3, 5, 7)),
    "kinds of more layers": ({"layer_types": ["full_attention"] * 12}, tuple(range(8))),
    "kinds in letters": ({"hybrid_override_pattern": "M-M*-M*E"}, (3, 6)),
    "both in a layer": ({"layers_block_type": ["mamba", "hybrid"] * 4}, (1, 3, 5, 7)),
    "blocks that repeat": ({"block_types": ["recurrent", "recurrent", "attention"]}, (2, 5)),
    "an interval": ({"full_attention_interval": 4}, (3, 7)),
    "a period with an offset": ({"attn_layer_period": 3, "attn_layer_offset": 1}, (1, 4, 7)),
    "a list": ({"attn_layer_indices": [6, 2, 9]}, (2, 6)),
    "a list of another name": ({"full_attn_idxs": [0, 4]}, (0, 4)),
    "some look at pictures": ({"cross_attention_layers": [3]}, (0, 1, 2, 4, 5, 6, 7)),
    "nested": ({"text_config": {"full_attention_interval": 2}}, (1, 3, 5, 7)),
}


@pytest.mark.parametrize(("told", "wanted"), HYBRIDS.values(), ids=HYBRIDS)
def test_layers_with_softmax_attention(told: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert attention_layers(told, 8) == wanted


WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "qwen3_next": {"head_dim": 16, "full_attention_interval": 1},
    "zamba": {"attention_head_dim": 16},
}


@pytest.mark.parametrize(("kind", "more"), WIDTHS.items(), ids=WIDTHS)
def test_the_width_between_projections_is_that_of_the_output_projection(kind: str, more: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[kind](
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32, vocab_size=64,
        **({"layers_block_type": ["hybrid", "hybrid"]} if kind == "zamba" else {}), **more,
    )  # fmt: skip
    told = json.loads(config.to_json_string())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {part.in_features for name, part in model.named_modules() if name.endswith("self_attn.o_proj")}
    assert found == {inner_width(told, sizes(told))}


def test_a_type_of_an_entry_point_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "my_model"

    told = {**PUBLISHED["mpt"][0], "model_type": "my_model"}
    with pytest.raises(StudyError, match="model type 'my_model' is no causal language model"):
        sizes(told)
    shapes.causal_types.cache_clear()
    monkeypatch.setattr(shapes, "entry_points", lambda *, group: [Point()] if group == "layerswap.families" else [])
    try:
        assert sizes(told)["layers"] == 32
    finally:
        shapes.causal_types.cache_clear()
