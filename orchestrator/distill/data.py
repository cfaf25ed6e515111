"""Text -> fixed token files -> batches. One path for every source: documents, tokenizer, two files of tokens.

Invariant: a batch is a pure function of (tokens, seed, position), so a resumed stage sees exactly the text that the
uninterrupted one would have seen.

Shapes: B sequences, L tokens each.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.distill.context import Workplace
from orchestrator.files import read_json, write_json
from orchestrator.study.documents import DataError, documents, is_held_out, none_held_out, place_of, text_of
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec

END_OF_TEXT = "<|endoftext|>"
ENCODE_BATCH = 64
LONGEST = 1000  # characters of a word that the tokenizer is trained on: training is quadratic in the longest
# A run of what byte-level BPE takes for one word: letters, digits, other signs or spaces.
LONG = re.compile(rf"[^\W\d_]{{{LONGEST}}}|\d{{{LONGEST}}}|(?:[^\w\s]|_){{{LONGEST}}}|\s{{{LONGEST}}}")


@dataclasses.dataclass
class _Split:
    """Documents of one split as they are read: how many there were on either side, and which is the first to go."""

    share: float
    held_out: bool
    inside: int = 0
    outside: int = 0
    lowest: int = 2**64

    def of(self, texts: Iterator[str]) -> Iterator[str]:
        """The texts that belong to the split."""
        for text in texts:
            self.lowest = min(self.lowest, place_of(text))
            if is_held_out(text, self.share) is self.held_out:
                self.inside += 1
                yield text
            else:
                self.outside += 1


def prepare_tokens(spec: TokensSpec, place: Workplace) -> dict[str, Any]:
    """Write `tokenizer/`, `train.bin`, `valid.bin` and `tokens.json`; return the counts."""
    locations = place.context.locations
    tokenizer = _tokenizer(spec, place)
    tokenizer.save_pretrained(str(place.out / "tokenizer"))
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the teacher's tokenizer has no end-of-text token, which separates documents: set eos_token")
    width = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    texts, held_out = _documents(spec.train, locations), _documents(spec.validation or spec.train, locations)
    split = None
    if spec.validation is None:
        split = _Split(spec.validation_share or 0.0, held_out=True)
        texts, held_out = _training(spec, texts), split.of(held_out)
    counts: dict[str, Any] = {"dtype": np.dtype(width).name, "vocabulary": len(tokenizer)}
    for name, read, limit in (
        ("train", texts, spec.train.max_tokens),
        ("valid", held_out, spec.validation.max_tokens if spec.validation else None),
    ):
        counts[name] = _write(place.out / f"{name}.bin", read, tokenizer, int(end), width, limit)
        if name == "valid" and split is not None and not split.inside:
            raise DataError(none_held_out(split.outside, split.lowest, split.share))
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

    texts = _training(spec, _documents(spec.train, place.context.locations))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def _training(spec: TokensSpec, texts: Iterator[str]) -> Iterator[str]:
    """Of the source's texts those that are not held out."""
    share = 0.0 if spec.validation is not None else spec.validation_share or 0.0
    return (text for text in texts if not is_held_out(text, share))


def _cut(text: str) -> Iterator[str]:
    """The text in pieces, so that none of its words is longer than `LONGEST`; a text without such a word as it is."""
    start = 0
    for match in LONG.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _documents(source: SourceIdentity, locations: Any) -> Iterator[str]:
    location: Location = locations[source.fingerprint]
    texts: Iterable[str] = (
        text for name in location.files for text in documents(source.source, source.field, Path(name))
    )
    if source.source == "hub":
        texts = _hub_texts(source, location)
    empty = True
    for text in texts:
        if text:
            empty = False
            yield text
    if empty:
        raise DataError(f"the {source.source} source holds no text: every document is empty")


def _hub_texts(source: SourceIdentity, location: Location) -> Iterator[str]:
    import datasets  # loaded only by studies that use the hub

    datasets.disable_progress_bars()
    where = f"hub data at {location.hub}"
    try:
        rows = datasets.load_dataset(
            str(location.hub), location.configuration, revision=location.revision, split=location.split, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield text_of(row, str(source.field), f"{where}, record {number}")
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{where} cannot be read: {reason}") from error


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
