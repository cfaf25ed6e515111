"""Text -> fixed token files -> batches. One path for every source: documents, tokenizer, two files of tokens.

Invariant: a batch is a pure function of (tokens, seed, position), so a resumed stage sees exactly the text that the
uninterrupted one would have seen.

Shapes: B sequences, L tokens each.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.distill.context import Workplace
from orchestrator.files import read_json, write_json
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec

END_OF_TEXT = "<|endoftext|>"
ENCODE_BATCH = 64


class DataError(ValueError):
    """Text that cannot be used; the message names the source, the rule and the remedy."""


def prepare_tokens(spec: TokensSpec, place: Workplace) -> dict[str, Any]:
    """Write `tokenizer/`, `train.bin`, `valid.bin` and `tokens.json`; return the counts."""
    locations = place.context.locations
    tokenizer = _tokenizer(spec, place)
    tokenizer.save_pretrained(str(place.out / "tokenizer"))
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the teacher's tokenizer has no end-of-text token, which separates documents: set eos_token")
    width = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    documents = _documents(spec.train, locations)
    held_out: Iterator[str]
    if spec.validation is None:
        share = spec.validation_share or 0.0
        held_out = (text for text in _documents(spec.train, locations) if _is_held_out(text, share))
        documents = (text for text in documents if not _is_held_out(text, share))
    else:
        held_out = _documents(spec.validation, locations)
    counts: dict[str, Any] = {"dtype": np.dtype(width).name, "vocabulary": len(tokenizer)}
    for name, texts, limit in (
        ("train", documents, spec.train.max_tokens),
        ("valid", held_out, spec.validation.max_tokens if spec.validation else None),
    ):
        counts[name] = _write(place.out / f"{name}.bin", texts, tokenizer, int(end), width, limit)
        if counts[name] < spec.sequence_length:
            raise DataError(
                f"the {name} text has {counts[name]} tokens, less than one sequence of {spec.sequence_length}: "
                "give more text, or a smaller data.sequence_length"
            )
    write_json(place.out / "tokens.json", counts)
    return {f"{name}_tokens": counts[name] for name in ("train", "valid")}


def load_tokens(folder: Path, split: str) -> np.ndarray[Any, Any]:
    """The token file of a split ("train" or "valid"), memory-mapped, (tokens,)."""
    dtype = read_json(folder / "tokens.json")["dtype"]
    return np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that made a token file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def batch(tokens: np.ndarray[Any, Any], length: int, seed: int, first: int, count: int) -> torch.Tensor:
    """Sequences `first` .. `first + count - 1` of the endless shuffled text, (B, L) int64.

    The text is cut into windows of `length`; every epoch visits each window once, in an order drawn from
    (seed, epoch).
    """
    windows = len(tokens) // length
    rows = []
    for position in range(first, first + count):
        start = int(_order(windows, seed, position // windows)[position % windows]) * length
        rows.append(np.asarray(tokens[start : start + length], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


def spread_windows(tokens: np.ndarray[Any, Any], length: int, budget: int) -> torch.Tensor:
    """Whole windows of `budget` tokens in all, (B, L) int64, at least one, spread evenly over the text.

    Neighbouring windows come from one document and say the same twice; far ones cover more of the text.
    """
    windows = len(tokens) // length
    count = min(windows, max(1, budget // length))
    chosen = np.linspace(0, windows - 1, count).round().astype(np.int64)
    rows = [np.asarray(tokens[start : start + length], dtype=np.int64) for start in chosen * length]
    return torch.from_numpy(np.stack(rows))


@lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _tokenizer(spec: TokensSpec, place: Workplace) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if spec.vocabulary is None:
        return AutoTokenizer.from_pretrained(place.inputs["teacher"])
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    share = spec.validation_share or 0.0
    texts = (text for text in _documents(spec.train, place.context.locations) if not _is_held_out(text, share))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def _documents(source: SourceIdentity, locations: Any) -> Iterator[str]:
    location: Location = locations[source.fingerprint]
    if source.source in ("python-stdlib", "text"):
        texts: Iterable[str] = (_read(Path(name)) for name in location.files)
    else:
        texts = _records(source, location)
    empty = True
    for text in texts:
        if text:
            empty = False
            yield text
    if empty:
        raise DataError(f"the {source.source} source holds no text: every document is empty")


def _read(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", errors="replace")


def _records(source: SourceIdentity, location: Location) -> Iterator[str]:
    import datasets  # loaded only by sources that need it

    datasets.disable_progress_bars()
    try:
        if source.source == "hub":
            rows = datasets.load_dataset(
                str(location.hub), location.configuration, revision=location.revision, split=location.split,
                streaming=True,
            )  # fmt: skip
        else:
            builder = "parquet" if source.source == "parquet" else "json"
            rows = datasets.load_dataset(builder, data_files=list(location.files), split="train", streaming=True)
        for row in rows:
            if source.field not in row:
                raise DataError(f"a record has no field {source.field!r}; it has {', '.join(map(str, row))}")
            yield str(row[source.field] or "")
    except DataError:
        raise
    except Exception as error:
        where = location.hub or ", ".join(location.files)
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source.source} data at {where} cannot be read: {reason}") from error


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _write(path: Path, texts: Iterator[str], tokenizer: Any, end: int, width: Any, limit: int | None) -> int:
    written = 0
    with path.open("wb") as stream:
        while chunk := list(itertools.islice(texts, ENCODE_BATCH)):
            for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                array = np.asarray([*ids, end], dtype=width)
                array = array if limit is None else array[: limit - written]
                array.tofile(stream)
                written += len(array)
            if limit is not None and written >= limit:
                break
    return written
