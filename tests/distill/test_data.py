"""One path for every source of text, and batches that are a pure function of seed and position."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import torch

from orchestrator.distill.context import Workplace
from orchestrator.distill.data import (
    DataError,
    _first_characters,
    batch,
    load_tokenizer,
    load_tokens,
    prepare_tokens,
    spread_windows,
)
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec

TEXTS = [f"def f{i}(x):\n    return x + {i * i}  # é {'word ' * (i % 5)}\n" for i in range(40)]


def write(folder: Path, source: str) -> list[Path]:
    """`TEXTS` in files of this kind."""
    rows = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"texts.{source}"
    match source:
        case "text":
            paths = [folder / f"{i:02d}.txt" for i in range(len(TEXTS))]
            for one, text in zip(paths, TEXTS, strict=True):
                one.write_text(text, encoding="utf-8")
            return paths
        case "text.gz":
            paths = [folder / f"{i:02d}.txt.gz" for i in range(len(TEXTS))]
            for one, text in zip(paths, TEXTS, strict=True):
                one.write_bytes(gzip.compress(text.encode()))
            return paths
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            pyarrow.parquet.write_table(pa.table({"text": TEXTS, "number": list(range(len(TEXTS)))}), path)
    return [path]


def spec_of(kind: str = "text", *, field: str | None = "text", **fields: Any) -> TokensSpec:
    limit = fields.pop("max_tokens", None)
    train = SourceIdentity(source=kind, fingerprint="train", field=field, max_tokens=limit)  # type: ignore[arg-type]
    told: dict[str, Any] = {"validation": None, "validation_share": 0.2, "sequence_length": 16, "vocabulary": 300}
    return TokensSpec(train=train, teacher=None, **(told | fields))


def prepared(place: Any, spec: TokensSpec, files: list[Path], **more: Any) -> Workplace:
    locations = {"train": Location(files=tuple(map(str, files)))}
    made: Workplace = place(locations={**locations, **more.pop("locations", {})}, **more)
    prepare_tokens(spec, made)
    return made


def tokens_of(made: Workplace) -> dict[str, list[int]]:
    return {split: load_tokens(made.out, split).tolist() for split in ("train", "valid")}


def test_the_same_texts_give_the_same_tokens_from_every_source(place: Any, tmp_path: Path) -> None:
    wanted = tokens_of(prepared(place, spec_of(), write(tmp_path, "text")))
    assert len(wanted["train"]) > len(wanted["valid"]) > 16
    for source in ("text.gz", "json", "jsonl", "jsonl.gz", "parquet"):
        made = prepared(place, spec_of(source.removesuffix(".gz")), write(tmp_path, source))
        assert tokens_of(made) == wanted, source


def test_tokens_are_the_documents_with_an_end_each_held_out_or_not(place: Any, tmp_path: Path) -> None:
    made = prepared(place, spec_of(), write(tmp_path, "text"))
    tokenizer, tokens = load_tokenizer(made.out), tokens_of(made)
    read = {split: tokenizer.decode(ids).split("<|endoftext|>")[:-1] for split, ids in tokens.items()}
    assert sorted(read["train"] + read["valid"]) == sorted(TEXTS)
    assert read["train"] == [text for text in TEXTS if text not in read["valid"]]
    assert load_tokens(made.out, "train").dtype == np.uint16


def test_the_tokenizer_learns_from_the_training_text_and_has_the_entries_asked_for(place: Any, tmp_path: Path) -> None:
    """The same documents beside others that are held out make the same tokenizer; its first entry ends a text."""
    files = write(tmp_path, "text")
    made = prepared(place, spec_of(), files)
    tokenizer = load_tokenizer(made.out)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (300, 0, 0)
    held_out = tokenizer.decode(tokens_of(made)["valid"]).split("<|endoftext|>")[:-1]
    mine = [path for path in files if path.read_text(encoding="utf-8") not in held_out]
    assert len(mine) < len(files)
    source = SourceIdentity(source="text", fingerprint="valid")
    where = {"valid": Location(files=(str(files[0]),))}
    whole = prepared(place, spec_of(validation=source, validation_share=None), mine, locations=where)
    assert load_tokenizer(whole.out).get_vocab() == tokenizer.get_vocab()


def test_text_of_exactly_one_sequence_is_enough(place: Any, tmp_path: Path) -> None:
    shortest = len(tokens_of(prepared(place, spec_of(), write(tmp_path, "text")))["valid"])
    assert len(tokens_of(prepared(place, spec_of(sequence_length=shortest), write(tmp_path, "text")))["valid"])
    with pytest.raises(DataError, match=rf"^the valid text has {shortest} tokens, less than one sequence of"):
        prepared(place, spec_of(sequence_length=shortest + 1), write(tmp_path, "text"))


def test_a_document_is_held_out_whatever_stands_beside_it(place: Any, tmp_path: Path) -> None:
    files = write(tmp_path, "text")
    whole, part = prepared(place, spec_of(), files), prepared(place, spec_of(), files[::2])
    held = [load_tokenizer(made.out).decode(tokens_of(made)["valid"]) for made in (whole, part)]
    assert set(held[1].split("<|endoftext|>")) <= set(held[0].split("<|endoftext|>"))


def test_validation_text_of_its_own_leaves_the_training_text_whole(place: Any, tmp_path: Path) -> None:
    files = write(tmp_path, "text")
    spec = spec_of(validation=SourceIdentity(source="text", fingerprint="valid"), validation_share=None)
    made = prepared(place, spec, files, locations={"valid": Location(files=(str(files[3]),))})
    decode = load_tokenizer(made.out).decode
    assert decode(tokens_of(made)["train"]) == "".join(f"{text}<|endoftext|>" for text in TEXTS)
    assert decode(tokens_of(made)["valid"]) == f"{TEXTS[3]}<|endoftext|>"


def test_a_pretrained_teacher_brings_its_tokenizer(place: Any, tmp_path: Path, tiny_teacher: Path) -> None:
    spec = spec_of(vocabulary=None)
    made = prepared(place, spec, write(tmp_path, "text"), inputs={"teacher": tiny_teacher})
    assert load_tokenizer(made.out).get_vocab() == load_tokenizer_of(tiny_teacher).get_vocab()
    assert sum(ids.count(0) for ids in tokens_of(made).values()) == len(TEXTS)


def test_a_tokenizer_that_begins_texts_adds_nothing_to_documents(
    place: Any, tmp_path: Path, tiny_teacher: Path
) -> None:
    """Documents are packed: what some tokenizers put before every text would stand in the middle of windows."""
    begins = load_tokenizer_of(tiny_teacher)
    begins.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", 0)]
    )
    begins.save_pretrained(shutil.copytree(tiny_teacher, tmp_path / "begins"))
    assert load_tokenizer_of(tmp_path / "begins")("x")["input_ids"][0] == 0
    made = prepared(place, spec_of(vocabulary=None), write(tmp_path, "text"), inputs={"teacher": tmp_path / "begins"})
    assert sum(ids.count(0) for ids in tokens_of(made).values()) == len(TEXTS)


def load_tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "content", "told"),
    [
        (
            "text",
            "short",
            r"^the train text has \d tokens, less than one sequence of 16: give more text, or a smaller ",
        ),
        ("text", "", "^the text source holds no text: every document is empty"),
        ("jsonl", '{"body": "x"}\n', r"texts\.jsonl, line 1, has no field 'text': name the one .*, of body"),
        ("jsonl", '{"text": "x"}\n\n{"text": [1]}\n', r"texts\.jsonl, line 3, holds \[1\] in 'text', which is no text"),
        ("jsonl", '{"text": ""}\n{"text": null}\n', "^the jsonl source holds no text: every document is empty"),
        ("jsonl", '{"text": "x"\n', r"texts\.jsonl, line 1, is no JSON record \(Expecting ',' delimiter\): write"),
        ("parquet", "no parquet", r"texts\.parquet cannot be read as parquet \("),
    ],
)
def test_text_that_cannot_be_used_is_told_so(place: Any, tmp_path: Path, kind: str, content: str, told: str) -> None:
    path = tmp_path / f"texts.{kind}"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        prepared(place, spec_of(kind, validation_share=0.0), [path])


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_share_that_holds_nothing_out_is_told_with_one_that_does(place: Any, tmp_path: Path, share: float) -> None:
    lowest = min(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 for text in TEXTS)
    assert 0.0 < lowest < 0.01
    told = "holds out none of the 40 documents, .*: raise data.validation_share to 0.01, give data.validation, or the "
    with pytest.raises(DataError, match=told):
        prepared(place, spec_of(validation_share=share), write(tmp_path, "text"))
    prepared(place, spec_of(validation_share=0.01, sequence_length=1), write(tmp_path, "text"), name="enough")


def test_an_error_in_the_second_file_names_it_and_its_line(place: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    first.write_text("\n".join(lines))
    second.write_text("\n".join([*lines[:20], lines[20][:-5], *lines[21:]]))
    with pytest.raises(DataError) as caught:
        prepared(place, spec_of("jsonl"), [first, second])
    assert str(caught.value).startswith(f"{second}, line 21, is no JSON record (")


LONG_WORDS = ["a" * 2500, "x" + "7" * 2500, "-" * 2500 + "x", " " * 2500 + "x", "a b" + "é" * 2500 + "c d", "\n" * 2500]


@pytest.mark.parametrize("text", LONG_WORDS, ids=lambda text: repr(text[-2:]))
def test_no_word_is_longer_than_the_tokenizer_is_trained_on(place: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "held.txt").write_text("held out")
    held = SourceIdentity(source="text", fingerprint="held")
    where = {"held": Location(files=(str(tmp_path / "held.txt"),))}
    spec = spec_of(validation=held, validation_share=None, sequence_length=2)
    made = prepared(place, spec, [tmp_path / "long.txt"], locations=where)
    tokenizer = load_tokenizer(made.out)
    assert 500 <= max(map(len, tokenizer.get_vocab())) <= 1000 * len("é".encode())
    assert tokenizer.decode(tokens_of(made)["train"]) == f"{text}<|endoftext|>"


def test_ordinary_text_gives_the_tokenizer_of_the_text_itself(place: Any, tmp_path: Path) -> None:
    texts = [*TEXTS, "a" * 999 + " " + "b" * 999 + "7" * 999 + " " * 999 + "x", "-" * 999 + "c1" * 2000]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    (tmp_path / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    held = SourceIdentity(source="json", fingerprint="train", field="text")
    made = prepared(place, spec_of("json", validation=held, validation_share=None), [tmp_path / "texts.json"])
    assert load_tokenizer(made.out).get_vocab() == bpe.get_vocab()
    assert tokens_of(made)["train"] == [i for text in texts for i in [*bpe.encode(text).ids, 0]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """A hub with a long data set: what it was `asked`, and the number of each record it has `given`."""
    found: dict[str, list[Any]] = {"asked": [], "given": []}

    def records() -> Iterator[dict[str, str]]:
        for i in range(10_000):
            found["given"].append(i)
            yield {"body": f"{TEXTS[i % len(TEXTS)]}# {i}"}

    def load_dataset(*words: Any, **options: Any) -> Any:
        found["asked"].append((words, options))
        return records()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


HUB = {name: Location(hub="a/b", configuration="c", revision="d", split=name) for name in ("train", "valid")}


def test_a_hub_data_set_is_streamed_until_it_has_enough_tokens(
    place: Any, hub: dict[str, list[Any]], tiny_teacher: Path
) -> None:
    validation = SourceIdentity(source="hub", fingerprint="valid", field="body", max_tokens=200)
    spec = spec_of("hub", field="body", max_tokens=500, vocabulary=None, validation_share=None, validation=validation)
    made = place(locations=HUB, inputs={"teacher": tiny_teacher})
    assert prepare_tokens(spec, made) == {"train_tokens": 500, "valid_tokens": 200}
    assert len(hub["given"]) < 200
    assert (("a/b", "c"), {"revision": "d", "split": "train", "streaming": True}) in hub["asked"]


@pytest.mark.parametrize("vocabulary", [None, 300], ids=["teacher's tokenizer", "a tokenizer trained here"])
def test_a_hub_data_set_that_holds_out_its_own_validation_is_not_read_to_its_end(
    place: Any, hub: dict[str, list[Any]], tiny_teacher: Path, vocabulary: int | None
) -> None:
    spec = spec_of("hub", field="body", max_tokens=3000, vocabulary=vocabulary)
    made = place(locations=HUB, inputs={"teacher": tiny_teacher})
    prepare_tokens(spec, made)
    assert len(hub["given"]) < (200 if vocabulary is None else 1200)
    tokens, decode = tokens_of(made), load_tokenizer(made.out).decode
    assert len(tokens["train"]) == 3000
    train, valid = (
        decode(tokens[split]).split("<eos>" if vocabulary is None else "<|endoftext|>")[:-1] for split in tokens
    )
    last = len(train) + len(valid)  # the document that is cut is the next one
    texts = [f"{TEXTS[i % len(TEXTS)]}# {i}" for i in range(last)]
    assert sorted(train + valid) == sorted(texts)
    assert 0.1 < len(valid) / last < 0.3


def test_a_held_out_share_without_one_sequence_names_what_to_raise(
    place: Any, hub: dict[str, list[Any]], tiny_teacher: Path
) -> None:
    made = place(locations=HUB, inputs={"teacher": tiny_teacher})
    told = r"^the valid text has \d+ tokens, .* of 16: raise data\.train\.max_tokens or data\.validation_share, or "
    with pytest.raises(DataError, match=told):
        prepare_tokens(spec_of("hub", field="body", max_tokens=40, vocabulary=None, validation_share=0.01), made)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (
            (10, None),
            r"^the train text has 10 tokens, less .* of 16: raise data\.train\.max_tokens, or a smaller ",
        ),
        (
            (99, 10),
            r"^the valid text has 10 tokens, less .* of 16: raise data\.validation\.max_tokens, or a ",
        ),
    ],
)
def test_text_that_its_own_limit_makes_too_short_names_that_limit(
    place: Any, tmp_path: Path, limits: tuple[int, int | None], told: str
) -> None:
    files = write(tmp_path, "text")
    validation = SourceIdentity(source="text", fingerprint="valid", max_tokens=limits[1])
    spec = spec_of(validation=validation, validation_share=None, max_tokens=limits[0])
    with pytest.raises(DataError, match=told):
        prepared(place, spec, files, locations={"valid": Location(files=(str(files[3]),))})


class Silent(Exception):
    """Says nothing."""


@pytest.mark.parametrize(
    ("third", "told"),
    [
        ({"text": "x"}, r"^hub data at a/b, record 3, has no field 'body': "),
        (OSError("the line is down\nbecause of the weather"), r"^hub data at a/b cannot be read: the line is down$"),
        (Silent(), r"^hub data at a/b cannot be read: Silent$"),
    ],
)
def test_what_is_wrong_with_hub_data_is_told_with_the_record(
    place: Any, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Path, third: Any, told: str
) -> None:
    def records() -> Iterator[Any]:
        yield from [{"body": "one"}, {"body": "two"}]
        if isinstance(third, Exception):
            raise third
        yield third

    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: records())
    datasets.enable_progress_bars()
    with pytest.raises(DataError, match=told):
        prepare_tokens(spec_of("hub", field="body"), place(locations=HUB, inputs={"teacher": tiny_teacher}))
    assert datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (99, 3)])
def test_the_first_characters_are_whole_texts_up_to_the_limit(limit: int, taken: int) -> None:
    texts = ["ab", "cde", "f"]
    assert list(_first_characters(iter(texts), limit)) == texts[:taken]


@pytest.mark.parametrize("length", [4, 7])
def test_every_window_comes_once_an_epoch_in_an_order_of_the_seed(length: int) -> None:
    tokens = np.arange(50, dtype=np.uint16)
    windows = 50 // length
    epochs = [batch(tokens, length, 3, epoch * windows, windows).tolist() for epoch in range(3)]
    wanted = [list(range(start, start + length)) for start in range(0, windows * length, length)]
    assert [sorted(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch(tokens, length, 4, 0, windows).tolist() != epochs[0]


def test_a_batch_is_a_pure_function_of_seed_and_position() -> None:
    tokens = np.arange(200, dtype=np.uint32)
    stream = batch(tokens, 8, 0, 0, 60)
    assert stream.dtype == torch.int64
    for first in (0, 7, 23, 50):
        batch(tokens, 8, 5, 3, 4)  # another one between
        assert torch.equal(batch(tokens, 8, 0, first, 10), stream[first : first + 10])


@pytest.mark.parametrize(
    ("budget", "starts"),
    [(1, [0]), (8, [0]), (17, [0, 88]), (31, [0, 48, 88]), (10_000, list(range(0, 96, 8)))],
)
def test_validation_reads_distinct_whole_windows_from_all_of_the_text(budget: int, starts: list[int]) -> None:
    found = spread_windows(np.arange(100, dtype=np.uint16), 8, budget)
    assert found.tolist() == [list(range(start, start + 8)) for start in starts]
