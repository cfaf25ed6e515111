"""Which tokens stand between documents and at the beginning of a window, and what a study says about it.

Place in the flow: told by the plan before a run, used by the stage that writes the tokens. Invariant: a tokenizer that
lacks a token is answered by a rule of this file, and whatever is used in its place is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.files import read_json
from orchestrator.study.documents import DataError
from orchestrator.study.shapes import sizes, text_config

CONFIGURATIONS = ("generation_config.json", "config.json")
NO_END = "the teacher's tokenizer has no end-of-text token, which separates documents: set eos_token"


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """Tokens at boundaries of text.

    Attributes:
        end: follows every document.
        begin: stands at the first position of every window, where the tokenizer begins a text with it by itself.
        entries: of the model; no token of a text is above them.
        notes: what is used in the place of what the tokenizer lacks, for people.
    """

    end: int
    entries: int
    begin: int | None = None
    notes: tuple[str, ...] = ()


def boundaries(tokenizer: Any, configurations: Mapping[str, Mapping[str, Any]]) -> Boundaries:
    """The boundaries of a tokenizer; `configurations` are the model's, by the names of their files.

    The end of a document is the tokenizer's end of text, else the one that the model's configuration names, else the
    tokenizer's separator or beginning of text. Windows begin with the beginning of text where the tokenizer puts it
    before a text by itself: then the model was trained so, and attends to it from everywhere.

    Raises `DataError` where nothing could stand between documents.
    """
    end, *notes = _end(tokenizer, configurations)
    begin = None
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        begin = int(tokenizer.bos_token_id)
        notes.append(f"the tokenizer begins a text with {tokenizer.bos_token!r}: so does every window")
    if tokenizer.pad_token_id is None:
        notes.append("the tokenizer has no padding token: windows are full, so a study needs none")
    return Boundaries(end, sizes(dict(configurations["config.json"]))["vocabulary"], begin, tuple(notes))


def configurations_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder says of a model and of generation, by the names of the files."""
    return {name: read_json(folder / name) for name in CONFIGURATIONS if (folder / name).exists()}


def _end(tokenizer: Any, configurations: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """The token that ends a document, and, where it is not the tokenizer's own end of text, what to say of it."""
    if tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)
    for what, token in _others(tokenizer, configurations):
        text = tokenizer.convert_ids_to_tokens(token)
        return token, f"the tokenizer has no end of text: documents are separated by {text!r}, {what}"
    raise DataError(NO_END)


def _others(tokenizer: Any, configurations: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for name in CONFIGURATIONS:
        whole = dict(configurations.get(name, {}))
        told = whole.get("eos_token_id", text_config(whole).get("eos_token_id"))
        for token in told if isinstance(told, list) else [told]:
            if type(token) is int and 0 <= token < len(tokenizer):
                yield f"the eos_token_id of {name}", token
    for what, token in (("separator", tokenizer.sep_token_id), ("beginning of text", tokenizer.bos_token_id)):
        if token is not None:
            yield f"its {what}", int(token)
