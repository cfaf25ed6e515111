"""A look at a pretrained teacher's folder: what would load as another model than was meant fails in the plan.

transformers fills tensors that a folder lacks with random numbers, leaves out those it knows no place for, and lets a
tokenizer have more entries than the model. Here all of that is an error, known without torch: from the headers of
safetensors files, and from their numbers, which are looked at once for any that are not finite. What lies in pickled
files or on the hub is looked at alike by the stage that imports it, before any other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.study.loader import StudyError
from orchestrator.study.shapes import base_type, sizes

KEY = "teacher.folder"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
BFLOAT16_EXPONENT = 0x7F80
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
AT_ONCE = 1 << 24  # numbers
NAMED = 6  # tensors, in a message
Shapes = dict[str, tuple[int, ...]]


class Tensor(NamedTuple):
    """A tensor in a safetensors file: its kind by the format's name, its shape, and where its first byte lies."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int


def check_teacher(folder: Path, config: dict[str, Any]) -> None:
    """Raise `StudyError` unless the weights in `folder` are those of `config` and its tokenizer fits them."""
    if (folder / "adapter_config.json").exists():
        raise _wrong(f"{folder} is an adapter: merge it into its model (merge_and_unload), and save that")
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise _wrong(f"{folder} holds no weights: save them there with model.save_pretrained")
    check_tokenizer(folder, config)
    tensors = {name: tensor for file in _files(weights) for name, tensor in _header(file).items()}
    if weights.name.startswith("model."):
        if (shapes := SHAPES.get(base_type(config))) is not None:
            _check_tensors(weights, tensors, shapes(config), config)
        _check_numbers(tensors)


def check_precision(config: dict[str, Any]) -> None:
    """Raise `StudyError` for a configuration of quantised weights."""
    told = config.get("quantization_config")
    if told is not None:
        method = told.get("quant_method", "an unnamed method") if isinstance(told, dict) else told
        raise StudyError(
            f"teacher: config.json says that the weights are quantised ({method}): give the model's float weights"
        )


def check_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Raise `StudyError` where the tokenizer can give numbers that the model's embedding lacks."""
    count, first = sizes(config)["vocabulary"], folder / "tokenizer.json"
    ends = config.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if isinstance(end, int) and end >= count:
            raise _wrong(f"eos_token_id {end} in config.json is outside of the model's {count} entries: correct it")
    if not first.exists():
        return  # of an older kind: the stage that imports it looks at it
    entries, settings = _entries(first), _settings(folder)
    own = 1 + max(entries.values(), default=-1)
    kind = str(settings.get("tokenizer_class") or DEFAULT_TOKENIZER.get(base_type(config)))
    defaults = SPECIAL_TOKENS.get(kind.removesuffix("Fast"), {})
    special = {**defaults, **{name: value for name, value in settings.items() if name.endswith("_token")}}
    end_of_text = _text(special.get("eos_token"))
    if end_of_text is None and (kind in PLAIN_TOKENIZERS or defaults):
        raise _wrong(f"the tokenizer in {folder} has no end-of-text token, which separates documents: set eos_token")
    if end_of_text is not None and entries.get(end_of_text, own) >= count:
        raise _wrong(
            f"the end of text {end_of_text!r} is entry {entries.get(end_of_text, own)} of the tokenizer, and the model "
            f"has {count}, from 0: name one of them as eos_token in tokenizer_config.json"
        )
    added = {text for value in special.values() if (text := _text(value)) is not None} - entries.keys()
    if own + len(added) > count:
        behind = f", {', '.join(sorted(added))} added behind them" if added else ""
        raise _wrong(
            f"the tokenizer has {own + len(added)} entries{behind}, and the model has {count}: give the tokenizer that "
            "it was trained with, or resize the model (model.resize_token_embeddings)"
        )


def _gpt_neox_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a GPT-NeoX of this configuration."""
    width, inner, vocabulary = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    biased = config.get("attention_bias", True)
    shapes: Shapes = {"gpt_neox.embed_in.weight": (vocabulary, width)}
    norms = ["gpt_neox.final_layer_norm"]
    for layer in range(config["num_hidden_layers"]):
        place = f"gpt_neox.layers.{layer}"
        norms += [f"{place}.input_layernorm", f"{place}.post_attention_layernorm"]
        for name, rows, columns, bias in (
            ("attention.query_key_value", 3 * width, width, biased),
            ("attention.dense", width, width, biased),
            ("mlp.dense_h_to_4h", inner, width, True),
            ("mlp.dense_4h_to_h", width, inner, True),
        ):
            shapes[f"{place}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{place}.{name}.bias"] = (rows,)
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


SHAPES = {"gpt_neox": _gpt_neox_shapes}
OTHER_NAMES = ((r"^embed_out\.", "lm_head."), (r"^(?=(embed_in|layers|final_layer_norm)\.)", "gpt_neox."))
WITHOUT_USE = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.|^lm_head\.weight$")  # of a head that is tied
DEFAULT_TOKENIZER = {"gpt_neox": "GPTNeoXTokenizer"}
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_END = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>")
SPECIAL_TOKENS = {"GPTNeoXTokenizer": {**_END, "pad_token": "<|padding|>"}, "GPT2Tokenizer": _END}


def _check_tensors(weights: Path, tensors: dict[str, Tensor], wanted: Shapes, config: dict[str, Any]) -> None:
    """Raise `StudyError` unless `tensors` are those that the model wants: by name, shape and kind."""
    names = {name: _modern(name) for name in tensors}
    lacking = sorted(wanted.keys() - names.values())
    strange = sorted(name for name, modern in names.items() if modern not in wanted and not WITHOUT_USE.search(modern))
    if lacking:
        beginning = strange[0].split(".")[0] if strange else ""
        wrapped = strange and all(name.startswith(f"{beginning}.") for name in strange)
        hint = f"; its names begin with {beginning!r}" if wrapped else ""
        raise _wrong(
            f"{weights} lacks {_some(lacking)}, of the {len(wanted)} tensors that config.json tells of{hint}: save the "
            "whole model with model.save_pretrained, not a part of it nor what is wrapped around it"
        )
    if strange:
        raise _wrong(
            f"{weights} has {_some(strange)}, for which a model of {config['num_hidden_layers']} layers has no place: "
            "correct config.json, or save the model again with model.save_pretrained"
        )
    for name, tensor in tensors.items():
        asked = wanted.get(names[name])
        if asked is not None and tensor.shape != asked:
            raise _wrong(
                f"{name} has the shape {list(tensor.shape)} in {tensor.file}, and {list(asked)} by config.json: give "
                "the two that belong together"
            )
        if asked is not None and tensor.kind not in FLOATS:
            raise _wrong(f"{name} is of {tensor.kind} in {tensor.file}: give the model's float weights")


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise `StudyError` for a tensor with numbers that are not finite."""
    import numpy as np  # loaded only by studies of pretrained teachers

    for name, tensor in tensors.items():
        size = math.prod(tensor.shape)
        if tensor.kind not in FLOATS or size == 0:
            continue
        values: Any = np.memmap(tensor.file, FLOATS[tensor.kind], "r", tensor.begin, (size,))
        wrong = 0
        for start in range(0, size, AT_ONCE):
            part = values[start : start + AT_ONCE]
            if tensor.kind == "BF16":
                wrong += int(((part & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).sum())
            else:
                wrong += len(part) - int(np.isfinite(part).sum())
        if wrong:
            raise _wrong(
                f"{wrong} of the {size} numbers of {name} in {tensor.file} are not finite (nan or infinite): give "
                "weights from before the model diverged, or copy the file again"
            )


def _files(weights: Path) -> Iterator[Path]:
    """The safetensors files behind a file of weights, which may be an index; all files that it names are there."""
    if weights.suffix != ".json":
        if weights.suffix == ".safetensors":
            yield weights
        return
    told = _json(weights).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise _wrong(f"{weights} has no weight_map, from tensors to files: save the model again")
    for name in sorted(set(told.values())):
        file = weights.parent / name
        if not file.is_file():
            raise _wrong(f"{weights} names {name}, which is not there: copy all files of the model")
        if file.suffix == ".safetensors":
            absent = sorted({tensor for tensor, place in told.items() if place == name} - _header(file).keys())
            if absent:
                raise _wrong(f"{file} lacks {_some(absent)}, which {weights.name} places there: copy it again")
            yield file


def _header(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by name. `StudyError` where it is torn."""
    whole = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 0 < length <= min(whole - 8, LONGEST_HEADER) else b""
    try:
        told = json.loads(text)
        told.pop("__metadata__", None)
        tensors = {
            name: Tensor(file, str(each["dtype"]), tuple(map(int, each["shape"])), 8 + length + each["data_offsets"][0])
            for name, each in told.items()
        }
        end = max((each["data_offsets"][1] for each in told.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _wrong(f"{file} is no safetensors file, or torn in its header: copy it again") from None
    if 8 + length + end != whole:
        raise _wrong(f"{file} has {whole} bytes and its header tells of {8 + length + end}: copy it again")
    return tensors


def _entries(file: Path) -> dict[str, int]:
    """The number of every entry of a tokenizer.json."""
    told = _json(file)
    model = told.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    entries: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        entries = {text: number for text, number in vocabulary.items() if isinstance(number, int)}
    elif isinstance(vocabulary, list):
        entries = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if not entries:
        raise _wrong(f"{file} has no vocabulary: save the tokenizer again with tokenizer.save_pretrained")
    return entries | {added["content"]: added["id"] for added in told.get("added_tokens") or []}


def _settings(folder: Path) -> dict[str, Any]:
    """What is told of a tokenizer beside its entries."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found |= _json(folder / name)
    return found


def _text(token: Any) -> str | None:
    """A special token's text, of the two ways to write one."""
    told = token.get("content") if isinstance(token, dict) else token
    return told if isinstance(told, str) else None


def _modern(name: str) -> str:
    """A tensor's name as transformers has it now, of the names that it still reads."""
    for old, new in OTHER_NAMES:
        name = re.sub(old, new, name)
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(f"{path} cannot be read as JSON ({error}): save it again") from error
    return told if isinstance(told, dict) else {}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _wrong(told: str) -> StudyError:
    return StudyError(f"{KEY}: {told}")
