"""Whether a pretrained model is whole, and its tokenizer fits it: what would load as another model than was meant.

transformers fills tensors that a folder lacks with random numbers, leaves out those it knows no place for, and lets a
tokenizer have more entries than the model. Here all of that is an error. The answer is the loader's own, for every
type of model: the plan asks it for a model without memory, which takes a moment, the stage that imports for the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from orchestrator.distill.boundaries import Boundaries, boundaries, configurations_in
from orchestrator.distill.models.auto import AutoConfig, AutoModelForCausalLM
from orchestrator.distill.models.sites import sites
from orchestrator.study.shapes import base_type, causal_types

transformers_logging.disable_progress_bar()
NAMED = 6  # tensors, in a message
OUTPUTS = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}  # whatever a folder says


class Given(NamedTuple):
    """A model as it is given: a folder's path or a name on the hub, and a file in it where that is GGUF."""

    name: str
    revision: str | None = None
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for the `from_pretrained` of transformers."""
        return {"revision": self.revision, **({"gguf_file": self.gguf} if self.gguf else {})}


def look(given: Given) -> Boundaries:
    """The boundaries of text by the tokenizer of a folder, whose model is whole and of a known structure.

    Nothing is read but what files say of their tensors. A GGUF file says nothing that transformers could compare, so
    that its tensors are left to the stage that imports it.

    Raises `ValueError` for all that `load_whole` and `load_tokenizer` do, but for numbers that are not finite.
    """
    config = _told(given, AutoConfig.from_pretrained, "configuration")
    if given.gguf is None:
        model, told = _load(given, device_map="meta")
        check_tensors(given.name, model, told)
        sites(model)
    tokenizer = load_tokenizer(given, config)
    return boundaries(tokenizer, {**configurations_in(Path(given.name)), "config.json": config.to_dict()})


def load_whole(given: Given) -> Any:
    """The model in float32; `ValueError` where it is not whole, or not of finite numbers."""
    model, told = _load(given, dtype=torch.float32)
    check_tensors(given.name, model, told)
    for tensor, values in model.state_dict().items():
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise ValueError(f"{wrong} of the {values.numel()} numbers of {tensor} in {given.name} are not finite")
    return model if given.gguf is None else _unquantised(model)


def load_tokenizer(given: Given, config: Any) -> Any:
    """The tokenizer of a model; `ValueError` for one that can give numbers that the model's embedding lacks.

    One that transformers makes of a GGUF file may have an entry more, which the stage that writes tokens looks for.
    """
    tokenizer = _told(given, AutoTokenizer.from_pretrained, "tokenizer")
    text = config.get_text_config(decoder=True)
    count, ends = text.vocab_size, getattr(text, "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if isinstance(end, int) and end >= count:
            raise ValueError(f"eos_token_id {end} in config.json is outside of the model's {count} entries: correct it")
    vocabulary = tokenizer.get_vocab()
    entries = 1 + max(vocabulary.values(), default=-1)
    if entries == 0:
        raise ValueError(f"the tokenizer in {given.name} has no vocabulary: save it again with save_pretrained")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= count:
        raise ValueError(
            f"the end of text {tokenizer.eos_token!r} is entry {tokenizer.eos_token_id} of the tokenizer, and the "
            f"model has {count}, from 0: name one of them as eos_token in tokenizer_config.json"
        )
    if entries > count and given.gguf is None:  # of GGUF transformers makes one, and adds an entry where it likes to
        behind = sorted(token for token, number in vocabulary.items() if number >= count)
        raise ValueError(
            f"the tokenizer has {entries} entries, and the model has {count}, so that {_some(behind)} would have no "
            "place: give the tokenizer that it was trained with, or resize the model (model.resize_token_embeddings)"
        )
    return tokenizer


def check_tensors(name: str, model: Any, told: Mapping[str, Any]) -> None:
    """ValueError for tensors that would be filled at random or left out, as `told` by transformers."""
    lacking, strange = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
    if lacking:
        beginning = strange[0].split(".")[0] if strange else ""
        wrapped = strange and all(each.startswith(f"{beginning}.") for each in strange)
        hint = f"; its names begin with {beginning!r}" if wrapped else ""
        raise ValueError(
            f"{name} lacks {_some(lacking)}, of the {len(model.state_dict())} tensors that config.json tells of{hint}: "
            "save the whole model with model.save_pretrained, not a part of it nor what is wrapped around it"
        )
    if strange:
        raise ValueError(
            f"{name} has {_some(strange)}, for which the model that config.json tells of has no place: correct "
            "config.json, or save the model again with model.save_pretrained"
        )
    for tensor, found, wanted in sorted(told["mismatched_keys"]):
        raise ValueError(
            f"{tensor} has the shape {list(found)} in {name}, and {list(wanted)} by config.json: give the two that "
            "belong together"
        )


def _unquantised(model: Any) -> Any:
    """The same weights in a model that does not remember to have been quantised, which could not be saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _load(given: Given, **how: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model, and what its loader says of tensors that it missed or had no place for."""
    wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True, **OUTPUTS, **how}
    model, told = _told(given, AutoModelForCausalLM.from_pretrained, "model", **wanted)
    check_again(model)
    return model, told


def check_again(model: Any) -> None:
    """ValueError for a model that would not load again, once it is saved alone: some are known within another only."""
    kind = base_type(model.config.to_dict())
    if kind not in causal_types():
        raise ValueError(
            f"its language model is of type {kind!r}, which AutoModelForCausalLM does not load without the model "
            "around it: give another model"
        )


def _told(given: Given, load: Any, what: str, **how: Any) -> Any:
    """What `load` makes of it; whatever transformers stumbles over becomes a line, in the place of its reports."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return load(given.name, **given.options, **how)
    except Exception as error:
        lines = str(error).strip().split("\n")
        reason = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]) or type(error).__name__
        raise ValueError(f"transformers cannot load the {what} in {given.name}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(before)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
