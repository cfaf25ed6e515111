"""Teachers that the plan lets pass: every way to save a whole model. What it refuses is in `tests/bad_teachers.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from orchestrator.distill.models.whole import Given, look
from orchestrator.study.pretrained import check_teacher
from tests.bad_teachers import (
    HALF,
    NEOX,
    REST,
    SETTINGS,
    SIDES,
    TOKENIZER,
    Tensors,
    save,
    sharded,
    tensors,
    with_,
    without,
)

DENSE = "gpt_neox.layers.1.attention.dense.weight"
TABLES = ("gpt_neox.embed_in.weight", "lm_head.weight")
TIED = {"tie_word_embeddings": True}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda told: {name.replace(old, new): each for name, each in told.items()}


def trunk(told: Tensors) -> Tensors:
    return renamed("gpt_neox.", "")(without("lm_head")(told))


def of_old(told: Tensors) -> Tensors:
    """With the buffers that older versions saved."""
    for layer in range(2):
        place = f"gpt_neox.layers.{layer}.attention"
        more = {"bias": [1, 1, 8, 8], "masked_bias": [], "rotary_emb.inv_freq": [1]}
        told |= {f"{place}.{name}": ("F32", shape, 0.5) for name, shape in more.items()}
    return told


WHOLE: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "as it is": (dict, {}),
    "head of old": (renamed("lm_head", "embed_out"), {}),
    "buffers of old": (of_old, {}),
    "tied": (without("lm_head"), TIED),
    "tied, and the head too": (dict, TIED),
    "trunk, tied": (trunk, TIED),
    "without biases": (without("attention.dense.bias", "query_key_value.bias"), {"attention_bias": False}),
    "half": (with_(DENSE, "F16", number=0.5), {}),
    "bfloat16": (with_(DENSE, "BF16", number=0x7F7F), {}),
    "double": (with_(DENSE, "F64", number=1e300), {}),
    "no end of text of its own": (dict, {"eos_token_id": None}),
}


def check(folder: Path, **config: Any) -> None:
    """All that the plan does with a folder, its config.json changed by `config`."""
    (folder / "config.json").write_text(json.dumps({**NEOX, **config}))
    check_teacher(folder)
    look(Given(str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, told in (("config", NEOX), ("tokenizer", TOKENIZER), ("tokenizer_config", SETTINGS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    save(tmp_path / "model.safetensors", tensors())
    return tmp_path


@pytest.mark.parametrize(("edit", "config"), WHOLE.values(), ids=WHOLE)
def test_a_whole_model_passes(folder: Path, edit: Any, config: dict[str, Any]) -> None:
    save(folder / "model.safetensors", edit(tensors()))
    check(folder, **config)


def test_shards_that_are_all_there_pass(folder: Path) -> None:
    sharded(HALF, REST)(folder)
    check(folder)


def test_pickled_weights_pass(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pickled = shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("pickled") / "model")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    check_teacher(pickled)
    assert look(Given(str(pickled))).end == 0


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        {**SETTINGS, "pad_token": {"content": "b", "__type": "AddedToken", **SIDES}},
        {**SETTINGS, "pad_token": "[PAD]"},
        {**SETTINGS, "eos_token": "<end>", "bos_token": "<end>"},
        {"eos_token": "a"},
        {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "a", "bos_token": "a", "unk_token": "a", "pad_token": "a"},
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "a"},
        {"tokenizer_class": "TokenizersBackend", "eos_token": "b", "mask_token": "<m>"},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items())[:90],
)
@pytest.mark.parametrize("vocabulary", [20, 21, 22])
def test_the_plan_counts_the_entries_that_a_tokenizer_has_when_it_is_loaded(
    folder: Path, settings: dict[str, Any], vocabulary: int
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    save(folder / "model.safetensors", {**tensors(), **{n: ("F32", [vocabulary, 8], 0.5) for n in TABLES}})
    if max(loaded.get_vocab().values()) < vocabulary:
        check(folder, vocab_size=vocabulary)
    else:
        with pytest.raises(ValueError, match=f"the model has {vocabulary}"):
            check(folder, vocab_size=vocabulary)
