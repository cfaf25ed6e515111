"""The sizes of any causal language model of transformers, read from its config.json, and which of its layers attend.

Place in the flow: `sources` makes a teacher's `Architecture` of these before any weights are read, without torch.
Whether a model's attention can be swapped is known by its structure, in the stage that imports it; what a
configuration alone rules out is an error here. Invariant: a size is stated by the configuration or by a rule below
that a test holds against transformers' own classes; it is never guessed.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from orchestrator.study.loader import StudyError

SIZES = ("layers", "hidden", "heads", "intermediate", "max_length", "vocabulary")
NAMES = {  # under which configurations state a size, the usual one first
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "n_embed", "d_model", "emb_dim"),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    ),
    "intermediate": (
        "intermediate_size", "n_inner", "ffn_dim", "d_inner", "ffn_hidden_size", "decoder_ffn_dim", "dim_ff", "dff",
        "feed_forward_size", "moe_intermediate_size",
    ),
    "max_length": (
        "max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length", "seq_length",
        "model_max_length", "context_length", "n_ctx",
    ),
    "vocabulary": ("vocab_size",),
}  # fmt: skip
VALUE_WIDTHS = ("v_head_dim", "head_dim", "attention_head_dim", "dim_head", "kv_channels")  # of a head's value
UNSAID = {  # what published folders of a type leave to the defaults of its class
    "gemma3_text": {"heads": 8, "max_length": 131_072, "vocabulary": 262_208},
}
LENGTH_WITHOUT_LIMIT = 2048  # positions asked of a model that states no longest text, such as one with ALiBi
INNER_FACTOR = 4  # of the width, where no width of the feed-forward block is stated
NESTED = ("text_config", "decoder", "generator")  # in the order in which transformers looks for the language model
STUDENT = "layerswap"  # model type of an exported student, which names the type it is made of
ENTRY_POINTS = "layerswap.families"
NO_SOFTMAX = "has no softmax attention that could be swapped"
REFUSED = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), NO_SOFTMAX),
    "blt": "is several models, over bytes and over patches of them",
}
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
)  # fmt: skip
LAYER_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
LAYER_LISTS = ("attn_layer_indices", "full_attn_idxs")
ATTENDS = ("attention", "hybrid", "*")  # in the names of kinds of layers that have softmax attention
BUT_NOT = ("linear", "chunked")  # in those of kinds that sound so, or look at their own chunk of the text only


def sizes(config: dict[str, Any]) -> dict[str, int]:
    """The sizes of the language model that a config.json describes, by the names of `SIZES`.

    The width of the feed-forward block is four times the model's where it is not stated, and the longest text of a
    model without a limit is 2,048 positions.

    Raises `StudyError` for a type that is no decoder of transformers nor of an installed package, and for a size that
    is neither stated nor known.
    """
    kind = check_type(config)
    told = text_config(config)
    unsaid = {"max_length": LENGTH_WITHOUT_LIMIT, **UNSAID.get(base_type(told), {}), **UNSAID.get(kind, {})}
    if (kinds := _kinds(told)) is not None:
        unsaid["layers"] = len(kinds)
    found: dict[str, int] = {}
    for size in SIZES:
        if size == "intermediate":
            unsaid[size] = INNER_FACTOR * found["hidden"]
        value = _stated(told, NAMES[size])
        if value is None:
            value = unsaid.get(size)
        if value is None:
            raise StudyError(
                f"teacher: config.json has no number {NAMES[size][0]}: save the model again with save_pretrained"
            )
        found[size] = value
    return found


def inner_width(config: dict[str, Any], found: dict[str, int]) -> int:
    """Width of what lies between an attention's projections: its heads times the width of a value; `found`: `sizes`."""
    return found["heads"] * (_stated(text_config(config), VALUE_WIDTHS) or found["hidden"] // found["heads"])


def attention_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers that have softmax attention by the configuration; all `layers` where it does not tell them apart.

    Of an exported student those that are not swapped yet.
    """
    told = text_config(config)
    kinds = _kinds(told)
    if kinds is not None:
        found = tuple(layer for layer, kind in enumerate(kinds) if _attends(kind))
    elif isinstance(told.get("block_types"), list) and told["block_types"]:  # repeated, as by RecurrentGemma
        blocks = told["block_types"]
        found = tuple(layer for layer in range(layers) if _attends(blocks[layer % len(blocks)]))
    elif (listed := next((told[name] for name in LAYER_LISTS if isinstance(told.get(name), list)), None)) is not None:
        found = tuple(sorted(listed))
    elif isinstance(told.get("full_attention_interval"), int):
        every = told["full_attention_interval"]
        found = tuple(range(every - 1, layers, every))
    elif isinstance(told.get("attn_layer_period"), int):
        found = tuple(range(int(told.get("attn_layer_offset") or 0), layers, told["attn_layer_period"]))
    else:
        found = tuple(range(layers))
    crossed = told.get("cross_attention_layers") or ()
    swapped = {int(layer) for layer in config.get("operators") or ()} if config.get("model_type") == STUDENT else {}
    return tuple(layer for layer in found if layer < layers and layer not in crossed and layer not in swapped)


def base_type(config: dict[str, Any]) -> str:
    """The model type of a configuration; of an exported student, the type it is made of."""
    kind = config.get("model_type")
    return str(config.get("base_model_type") if kind == STUDENT else kind)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that describes the language model: itself, or one nested in it."""
    return next((config[name] for name in NESTED if isinstance(config.get(name), dict)), config)


def check_type(config: dict[str, Any]) -> str:
    """The model type of a configuration; `StudyError` with the reason where no model of it can be converted."""
    kind = base_type(config)
    told = text_config(config)
    remedy = "give a decoder (a causal language model such as llama, qwen3 or gpt2)"
    if config.get("is_encoder_decoder") is True or told.get("is_encoder_decoder") is True:
        raise StudyError(f"teacher: model type {kind!r} has an encoder, and its decoder looks at it: {remedy}")
    if kind in ENCODERS and told.get("is_decoder") is not True:
        raise StudyError(f"teacher: model type {kind!r} is an encoder, whose attention is not causal: {remedy}")
    if kind in REFUSED:
        raise StudyError(f"teacher: model type {kind!r} {REFUSED[kind]}: {remedy}")
    known = causal_types()
    if kind not in known:
        near = difflib.get_close_matches(kind, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StudyError(
            f"teacher: model type {kind!r} is no causal language model that transformers or an installed package "
            f"knows{hint}: correct model_type in config.json, or install the package whose entry point in the group "
            f"{ENTRY_POINTS} brings it"
        )
    return kind


@lru_cache(maxsize=1)
def causal_types() -> frozenset[str]:
    """The model types that `AutoModelForCausalLM` of the installed transformers knows, and those of entry points.

    transformers' own table is read, not imported: an import brings torch, and takes seconds.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    table = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")], value=ast.Call(args=[pairs])):
                types = {kind for kind, _ in ast.literal_eval(pairs)}
                return frozenset(types | {point.name for point in entry_points(group=ENTRY_POINTS)})
    raise AssertionError(f"{table} has no table of causal language models")


def _stated(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first positive whole number that a configuration has under one of the names."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _kinds(config: dict[str, Any]) -> list[str] | None:
    """The kind of every layer by name, where a configuration lists them."""
    for name in LAYER_KINDS:
        value = config.get(name)
        if isinstance(value, list | str) and value and all(isinstance(kind, str) for kind in value):
            return list(value)
    return None


def _attends(kind: str) -> bool:
    return any(word in kind for word in ATTENDS) and not any(word in kind for word in BUT_NOT)
