"""What stands between documents and before windows, by whatever a tokenizer has and lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from orchestrator.distill.data import batch, load_tokenizer, load_tokens
from orchestrator.study.documents import DataError
from tests.distill.test_data import TEXTS, prepared, spec_of, tokens_of, write


def changed(teacher: Path, folder: Path, config: dict[str, Any], **settings: Any) -> Path:
    """A copy of a teacher's folder with other settings of its tokenizer and other values in its config.json."""
    shutil.copytree(teacher, folder)
    for name, more in (("tokenizer_config.json", settings), ("config.json", config)):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, **more}))
    (folder / "generation_config.json").unlink()
    return folder


def test_a_tokenizer_without_an_end_of_text_is_refused(place: Any, tmp_path: Path, tiny_teacher: Path) -> None:
    folder = changed(tiny_teacher, tmp_path / "teacher", {"eos_token_id": None}, eos_token=None)
    with pytest.raises(DataError, match="has no end-of-text token, which separates documents: set eos_token"):
        prepared(place, spec_of(vocabulary=None), write(tmp_path, "text"), inputs={"teacher": folder})


@pytest.mark.parametrize(
    ("config", "settings", "end", "told"),
    [
        ({"eos_token_id": 7}, {}, 0, None),
        ({"eos_token_id": 7}, {"eos_token": None, "bos_token": "<eos>"}, 7, "the eos_token_id of config.json"),
        ({"eos_token_id": [9, 7]}, {"eos_token": None}, 9, "the eos_token_id of config.json"),
        ({"eos_token_id": 300}, {"eos_token": None, "sep_token": "<eos>"}, 0, "its separator"),
        ({"eos_token_id": None}, {"eos_token": None, "bos_token": "<eos>"}, 0, "its beginning of text"),
    ],
    ids=["its own", "the model's", "the model's first", "none of the vocabulary", "beginning"],
)
def test_what_stands_in_for_an_end_of_text_is_used_and_said(
    place: Any, tmp_path: Path, tiny_teacher: Path, said: list[str], config: Any, settings: Any, end: int, told: Any
) -> None:
    folder = changed(tiny_teacher, tmp_path / "teacher", config, **settings)
    made = prepared(place, spec_of(vocabulary=None), write(tmp_path, "text"), inputs={"teacher": folder})
    tokens = tokens_of(made)
    documents = sum(split.count(end) for split in tokens.values())
    assert documents >= len(TEXTS) and tokens["train"][-1] == tokens["valid"][-1] == end
    assert json.loads((made.out / "tokens.json").read_text())["end_of_text"] == end
    about_end = [line for line in said if "end of text" in line]
    if told is None:
        assert about_end == []
    else:
        text = load_tokenizer(made.out).convert_ids_to_tokens(end)
        assert about_end == [f"the tokenizer has no end of text: documents are separated by {text!r}, {told}"]


def with_beginning(folder: Path) -> Path:
    """Let the tokenizer of a folder begin every text with entry 5, as Llama's do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin = tokenizer.convert_ids_to_tokens(5)
    tokenizer.add_special_tokens({"bos_token": begin})
    post = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 5)])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(folder)
    return folder


def test_windows_begin_as_the_tokenizer_begins_a_text(
    place: Any, tmp_path: Path, tiny_teacher: Path, said: list[str]
) -> None:
    texts = write(tmp_path, "text")
    plain = tokens_of(prepared(place, spec_of(vocabulary=None), texts, inputs={"teacher": tiny_teacher}))
    assert said == ["the tokenizer has no padding token: windows are full, so a study needs none"]
    folder = with_beginning(changed(tiny_teacher, tmp_path / "begins", {}))
    begun = prepared(place, spec_of(vocabulary=None), texts, inputs={"teacher": folder})
    assert said[1] == f"the tokenizer begins a text with {load_tokenizer(begun.out).bos_token!r}: so does every window"
    for split, tokens in tokens_of(begun).items():
        windows = [tokens[start : start + 16] for start in range(0, len(tokens), 16)]
        assert {window[0] for window in windows} == {5}
        assert [token for window in windows for token in window[1:]] == plain[split]
    assert (batch(load_tokens(begun.out, "train"), 16, 0, 0, 40)[:, 0] == 5).all()


@pytest.mark.parametrize("limit", [40, 48, 49])
def test_a_limit_of_tokens_counts_beginnings(place: Any, tmp_path: Path, tiny_teacher: Path, limit: int) -> None:
    folder = with_beginning(changed(tiny_teacher, tmp_path / "begins", {}))
    spec = spec_of(vocabulary=None, max_tokens=limit)
    made = prepared(place, spec, write(tmp_path, "text"), inputs={"teacher": folder})
    tokens = tokens_of(made)["train"]
    assert len(tokens) == limit
    assert [place for place, token in enumerate(tokens) if token == 5] == list(range(0, limit, 16))
