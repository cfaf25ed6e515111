"""Pretrained teachers that cannot be used: rows of `test_bad_inputs`."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs import Make, Row, at, teacher, words

NEOX = {
    "model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 20,
    "intermediate_size": 16, "max_position_embeddings": 128, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SIDES = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {chr(97 + number): number for number in range(20)}, "merges": []},
    "added_tokens": [{"id": 0, "content": "a", "special": True, "normalized": False, **SIDES}],
}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H", "I8": "b", "F8_E4M3": "B"}
LAYER = {
    "attention.dense": [8, 8], "attention.query_key_value": [24, 8], "mlp.dense_4h_to_h": [8, 16],
    "mlp.dense_h_to_4h": [16, 8], "input_layernorm": [8], "post_attention_layernorm": [8],
}  # fmt: skip
Tensors = dict[str, tuple[str, list[int], float]]  # kind, shape and the one number that is everywhere


def tensors() -> Tensors:
    """Those of a model that is `NEOX`."""
    shapes = {"gpt_neox.embed_in.weight": [20, 8], "lm_head.weight": [20, 8]}
    for part in ("weight", "bias"):
        shapes[f"gpt_neox.final_layer_norm.{part}"] = [8]
        for layer in range(2):
            for name, shape in LAYER.items():
                shapes[f"gpt_neox.layers.{layer}.{name}.{part}"] = shape if part == "weight" else shape[:1]
    return {name: ("F32", shape, 0.5) for name, shape in shapes.items()}


def save(file: Path, told: Tensors) -> None:
    """Write a safetensors file, byte by byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (kind, shape, number) in told.items():
        raw = struct.pack(f"<{NUMBERS[kind]}", number) * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def shards(folder: Path, first: Tensors, second: Tensors, named: Tensors | None = None) -> None:
    """Write two shards and their index."""
    places = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(named or second, "model-2.safetensors")
    save(folder / "model-1.safetensors", first)
    save(folder / "model-2.safetensors", second)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def saved(
    edit: Callable[[Tensors], Tensors] = dict,
    spoil: Callable[[Path], Any] = lambda _: None,
    tokenizer: dict[str, Any] | None = None,
    settings: dict[str, Any] = SETTINGS,
    **config: Any,
) -> Make:
    """A study whose teacher is a whole model, but for what is edited or spoilt in its folder."""
    files = {"config__json": {**NEOX, **config}, "tokenizer__json": {**TOKENIZER, **(tokenizer or {})}}
    texts = {name: json.dumps(told) for name, told in {**files, "tokenizer_config__json": settings}.items()}

    def make(folder: Path) -> list[str]:
        given = teacher(**texts)(folder)
        save(folder / "model" / "model.safetensors", edit(tensors()))
        spoil(folder / "model")
        return given

    return make


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda told: {name: each for name, each in told.items() if not any(part in name for part in parts)}


def under(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda told: {prefix + name: each for name, each in told.items()}


def with_(name: str, kind: str = "F32", shape: list[int] | None = None, number: float = 0.5) -> Any:
    return lambda told: {**told, name: (kind, told[name][1] if shape is None else shape, number)}


def only(folder: Path, *names: str) -> None:
    """Rename or remove the one file of weights."""
    found = folder / "model.safetensors"
    found.rename(folder / names[0]) if names else found.unlink()


def cut(length: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:length]
    )


def sharded(first: Any, second: Any, lost: str = "", named: Any = None) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        only(folder)
        shards(folder, first(tensors()), second(tensors()), named and named(tensors()))
        if lost:
            (folder / lost).unlink()

    return spoil


HALF = without("layers.1", "lm_head")
REST = without("layers.0", "embed_in", "final")
DENSE = "gpt_neox.layers.1.attention.dense.weight"
folder = at % "4:3" + "teacher.folder: "
TEACHERS: list[Row] = [
    ("no teacher folder", words("--set", "teacher={kind: pretrained, folder: gone}"), "teacher.folder: .*gone holds no config.json: give the folder of a saved model"),
    ("a teacher that is to be fetched", words("--set", "teacher={kind: pretrained, folder: gone, fetched_by: make teacher-a}"), "teacher.folder: .*gone holds no config.json: run `make teacher-a`, which brings it"),
    ("a GGUF file that is to be fetched", words("--set", "teacher={kind: pretrained, folder: gone, gguf: a.gguf, fetched_by: make teacher-a}"), "teacher.gguf: .*gone holds no a.gguf: run `make teacher-a`, which brings it"),
    ("no GGUF file", words("--set", "teacher={kind: pretrained, folder: ., gguf: a.gguf}"), "teacher.gguf: .* holds no a.gguf: give the folder of a saved model"),
    ("a GGUF file that is none", words("--set", "teacher={kind: pretrained, folder: text, gguf: a.txt}"), "teacher.gguf: .*a.txt is no GGUF file, or torn .*: copy it again"),
    ("a GGUF file of the hub", words("--set", "teacher={kind: pretrained, hub: a/b, gguf: c}"), "^--set .*: teacher.gguf: gguf c is a file of a folder: give folder instead of hub"),
    ("teacher without config", teacher(tokenizer__json="{}"), folder + ".*model holds no config.json: give the folder of a saved model"),
    ("teacher without tokenizer", teacher(config__json=json.dumps(NEOX)), folder + ".*model holds no tokenizer: save it there"),
    ("teacher of no type", saved(model_type=None), at % "2:1" + "teacher: model type 'None' is no causal language model that transformers or an installed package knows: correct model_type"),
    ("teacher of an unknown type", saved(model_type="llamma"), at % "2:1" + "teacher: model type 'llamma' is no causal .*; did you mean 'llama'.: correct model_type in config.json, or install the package"),
    ("teacher that is an encoder", saved(model_type="bert"), at % "2:1" + "teacher: model type 'bert' is an encoder, whose attention is not causal: give a decoder"),
    ("teacher with an encoder", saved(model_type="bart", is_encoder_decoder=True), at % "2:1" + "teacher: model type 'bart' has an encoder, and its decoder looks at it: give a decoder"),
    ("teacher without softmax", saved(model_type="mamba2"), at % "2:1" + "teacher: model type 'mamba2' has no softmax attention that could be swapped: give a decoder"),
    ("teacher without attention", saved(model_type="granitemoehybrid", layer_types=["mamba", "mamba"]), at % "2:1" + "teacher: by config.json no layer has softmax attention: give"),
    ("teacher with a torn config", teacher(config__json='{"model', tokenizer__json="{}"), at % "2:1" + "teacher: .*config.json is not JSON .*: save the model again"),
    ("teacher with half a config", teacher(config__json='{"model_type": "gpt_neox", "num_hidden_layers": 2}', tokenizer__json="{}"), at % "2:1" + "teacher: config.json has no number hidden_size: save the model again"),
    ("teacher of no layers", saved(num_hidden_layers=0), at % "2:1" + "teacher: config.json has no number num_hidden_layers: save"),
    ("teacher of true layers", saved(num_hidden_layers=True), at % "2:1" + "teacher: config.json has no number num_hidden_layers: save"),
    ("both hub and folder", words("--set", "teacher={kind: pretrained, folder: a, hub: b}"), "^--set .*: teacher: exactly one of hub and folder is needed"),
    ("teacher in four bits", saved(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), at % "2:1" + r"teacher: config.json says that the weights are quantised \(bitsandbytes\): give the model's float weights"),
    ("teacher by gptq", saved(quantization_config={"quant_method": "gptq", "bits": 4}), at % "2:1" + r"teacher: config.json .* quantised \(gptq\): give"),
    ("teacher quantised somehow", saved(quantization_config={"bits": 4}), at % "2:1" + r"teacher: config.json .* quantised \(an unnamed method\): give"),
    ("teacher of whole numbers", saved(with_(DENSE, "I8", number=1)), folder + f"{DENSE} is of I8 in .*model.safetensors: give the model's float weights"),
    ("teacher of eight bits", saved(with_(DENSE, "F8_E4M3", number=1)), folder + f"{DENSE} is of F8_E4M3 in .*: give the model's float weights"),
    ("teacher without weights", saved(spoil=only), folder + ".*model holds no weights: save them there with model.save_pretrained"),
    ("weights of another name", saved(spoil=lambda path: only(path, "weights.safetensors")), folder + ".*model holds no weights: save them"),
    ("an adapter", saved(spoil=lambda path: (path / "adapter_config.json").write_text("{}")), folder + ".*model is an adapter: merge it into its model"),
    ("weights behind module.", saved(under("module.")), folder + ".*model lacks gpt_neox.embed_in.weight, .* and 22 more, of the 28 tensors .*; its names begin with 'module': save the whole"),
    ("weights behind _orig_mod.", saved(under("_orig_mod.")), folder + ".*lacks gpt_neox.embed_in.weight, .*; its names begin with '_orig_mod': save the whole"),
    ("weights without the head", saved(without("lm_head")), folder + ".*model lacks lm_head.weight, of the 28 tensors that config.json tells of: save the whole model"),
    ("weights of the trunk", saved(lambda told: {name.removeprefix("gpt_neox."): each for name, each in without("lm_head")(told).items()}), folder + ".*lacks lm_head.weight, of the 28"),
    ("weights without a layer", saved(without("layers.1.")), folder + r".*lacks gpt_neox.layers.1.attention.dense.bias, .* and 6 more, of the 28 tensors that config.json tells of: save"),
    ("weights without a bias", saved(without("1.mlp.dense_h_to_4h.bias")), folder + ".*lacks gpt_neox.layers.1.mlp.dense_h_to_4h.bias, of the 28"),
    ("weights of more layers", saved(num_hidden_layers=1), folder + ".*has gpt_neox.layers.1.attention.dense.bias, .* and 6 more, for which the model that config.json tells of has no place: correct config.json"),
    ("weights with an adapter", saved(with_("gpt_neox.layers.0.attention.dense.lora_A.weight", shape=[2, 8])), folder + ".*has gpt_neox.layers.0.attention.dense.lora_A.weight, for which"),
    ("weights of another vocabulary", saved(vocab_size=24), folder + r"gpt_neox.embed_in.weight has the shape \[20, 8\] in .*model, and \[24, 8\] by config.json: give the two"),
    ("a head of another shape", saved(with_("lm_head.weight", shape=[18, 8])), folder + r"lm_head.weight has the shape \[18, 8\] in .*, and \[20, 8\] by config.json"),
    ("weights transposed", saved(with_("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", shape=[8, 16])), folder + r"gpt_neox.layers.0.mlp.dense_h_to_4h.weight has the shape \[8, 16\] in .*, and \[16, 8\]"),
    ("weights that are no number", saved(with_(DENSE, number=math.nan)), folder + f"64 of the 64 numbers of {DENSE} in .*model.safetensors are not finite .nan or infinite.: give weights"),
    ("infinite weights", saved(with_(DENSE, number=-math.inf)), folder + f"64 of the 64 numbers of {DENSE} in .* are not finite"),
    ("infinite half-precision weights", saved(with_(DENSE, "F16", number=math.inf)), folder + f"64 of the 64 numbers of {DENSE} in .* are not finite"),
    ("infinite bfloat16 weights", saved(with_(DENSE, "BF16", number=0xFF80)), folder + f"64 of the 64 numbers of {DENSE} in .* are not finite"),
    ("bfloat16 weights that are no number", saved(with_(DENSE, "BF16", number=0x7FC0)), folder + f"64 of the 64 numbers of {DENSE} in .* are not finite"),
    ("weights cut in their numbers", saved(spoil=cut(-1)), folder + ".*model.safetensors has [0-9]+ bytes and its header tells of [0-9]+: copy it again"),
    ("weights cut in their header", saved(spoil=cut(100)), folder + ".*model.safetensors is no safetensors file, or torn in its header: copy it again"),
    ("weights cut to nothing", saved(spoil=cut(0)), folder + ".*model.safetensors is no safetensors file, or torn in its header"),
    ("weights that are a page", saved(spoil=lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)), folder + ".*is no safetensors file, or torn"),
    ("a shard that is lost", saved(spoil=sharded(HALF, REST, "model-2.safetensors")), folder + ".*model.safetensors.index.json names model-2.safetensors, which is not there: copy all files"),
    ("a shard that lacks a tensor", saved(spoil=sharded(HALF, without("layers.0", "embed_in", "final", "lm_head"), named=REST)), folder + ".*model-2.safetensors lacks lm_head.weight, which model.safetensors.index.json places there: copy"),
    ("shards that lack a layer", saved(spoil=sharded(HALF, without("layers", "embed_in", "final"))), folder + ".*model lacks gpt_neox.layers.1.attention.dense.bias, .* of the 28"),
    ("an index of nothing", saved(spoil=lambda path: (only(path), (path / "model.safetensors.index.json").write_text("{}"))), folder + ".*index.json has no weight_map, from tensors to files: save"),
    ("an index that is torn", saved(spoil=lambda path: (only(path), (path / "model.safetensors.index.json").write_text('{"weight'))), folder + ".*index.json cannot be read as JSON .*: save it again"),
    ("a pickled shard that is lost", saved(spoil=lambda path: (only(path), (path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}'))), folder + ".*names b.bin, which is not there"),
    ("more entries than the model", saved(tokenizer={"added_tokens": [{"id": 20 + more, "content": f"<{more}>", "special": False, "normalized": False, **SIDES} for more in range(4)]}), folder + "the tokenizer has 24 entries, and the model has 20, so that <0>, <1>, <2>, <3> would have no place: give the tokenizer that it was"),
    ("a vocabulary above the model's", saved(tokenizer={"model": {"vocab": [["a", 0.0]] + [[f"<{n}>", -1.0] for n in range(24)]}}), folder + "the tokenizer has 25 entries, and the model has 20"),
    ("a padding that is added", saved(settings={**SETTINGS, "pad_token": {"content": "[PAD]", "__type": "AddedToken", **SIDES}}), folder + r"the tokenizer has 21 entries, and the model has 20, so that \[PAD\] would have no place: give"),
    ("an end of text that is added", saved(settings={**SETTINGS, "eos_token": "<end>"}), folder + "the end of text '<end>' is entry 20 of the tokenizer, and the model has 20, from 0: name one of them as eos_token"),
    ("the usual end of text, added", saved(settings={}), folder + r"the end of text '<\|endoftext\|>' is entry 20 of the tokenizer, and the model has 20, from 0"),
    ("the usual padding, added", saved(settings={"tokenizer_class": "GPTNeoXTokenizerFast", "eos_token": "a", "bos_token": "a", "unk_token": "a"}), folder + r"the tokenizer has 21 entries, and the model has 20, so that <\|padding\|> would have no place"),
    ("no end of text", saved(settings={"tokenizer_class": "TokenizersBackend"}, eos_token_id=None), folder + "the teacher's tokenizer has no end-of-text token, which separates documents: set eos_token"),
    ("an end of text of the model's that is none", saved(eos_token_id=[0, 20]), folder + "eos_token_id 20 in config.json is outside of the model's 20 entries: correct it"),
    ("a tokenizer that is torn", saved(spoil=lambda path: (path / "tokenizer.json").write_text('{"model')), folder + "transformers cannot load the tokenizer in .*model: Unterminated string"),
    ("a tokenizer of nothing", saved(tokenizer={"model": {}}), folder + "transformers cannot load the tokenizer in .*model: data did not match"),
    ("settings of a tokenizer that are torn", saved(spoil=lambda path: (path / "tokenizer_config.json").write_text("eos")), folder + "transformers cannot load the tokenizer in .*model: Expecting value"),
]  # fmt: skip
