"""Text -> fixed token files -> batches. One path for every source: documents, tokenizer, two files of tokens.

Invariant: a batch is a pure function of (tokens, seed, position), so a resumed stage sees exactly the text that the
uninterrupted one would have seen.

Shapes: B sequences, L tokens each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.distill.boundaries import Boundaries, boundaries, configurations_in
from orchestrator.distill.context import Workplace
from orchestrator.files import read_json, write_json
from orchestrator.study.documents import DataError, documents, is_held_out, none_held_out, place_of, text_of
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec

END_OF_TEXT = "<|endoftext|>"
STUDENT_ORDER = 1  # added to the seed: students and their control read the text in another order than the teacher did
ENCODE_BATCH = 64
CHARACTERS_PER_TOKEN = 8  # that a tokenizer is trained on: English has 3 to 5 at 2,048 to 65,536 entries, code fewer
LONGEST = 1000  # characters of a word that the tokenizer is trained on: training is quadratic in the longest
# A run of what byte-level BPE takes for one word: letters, digits, other signs or spaces.
LONG = re.compile(rf"[^\W\d_]{{{LONGEST}}}|\d{{{LONGEST}}}|(?:[^\w\s]|_){{{LONGEST}}}|\s{{{LONGEST}}}")


@dataclasses.dataclass
class _Seen:
    """Documents that were shared out to the splits, and the place of the one that is the first to be held out."""

    documents: int = 0
    lowest: int = 2**64


def prepare_tokens(spec: TokensSpec, place: Workplace) -> dict[str, Any]:
    """Write `tokenizer/`, `train.bin`, `valid.bin` and `tokens.json`; return the counts."""
    locations = place.context.locations
    tokenizer = _tokenizer(spec, place)
    tokenizer.save_pretrained(str(place.out / "tokenizer"))
    ends = _boundaries(spec, tokenizer, place)
    width = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    counts: dict[str, Any] = {"dtype": np.dtype(width).name, "vocabulary": len(tokenizer)}
    counts |= {"end_of_text": ends.end, "begin_of_text": ends.begin}
    write = partial(_write, place.out, tokenizer=tokenizer, ends=ends, length=spec.sequence_length, width=width)
    seen = _Seen()
    if spec.validation is None:
        counts |= write(_shared_out(spec, locations, seen), {"train": spec.train.max_tokens, "valid": None})
    else:
        for name, source in (("train", spec.train), ("valid", spec.validation)):
            texts = ((name, text) for text in _documents(source, locations))
            counts |= write(texts, {name: source.max_tokens})
    _check_enough(spec, counts, seen)
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


def batch(
    tokens: np.ndarray[Any, Any], length: int, seed: int, first: int, count: int, limit: int | None = None
) -> torch.Tensor:
    """Sequences `first` .. `first + count - 1` of the endless shuffled text, (B, L) int64.

    The text is cut into windows of `length`; every epoch visits each window once, in an order drawn from
    (seed, epoch). With a limit epochs visit the first so many of the first epoch only.
    """
    windows = len(tokens) // length
    there = windows if limit is None else min(windows, limit)
    rows = []
    for position in range(first, first + count):
        start = _window_at(position, windows, there, seed) * length
        rows.append(np.asarray(tokens[start : start + length], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


def _window_at(position: int, windows: int, there: int, seed: int) -> int:
    """The window that stands at a position of the endless text, of which epochs visit the first `there`."""
    epoch, place = divmod(position, there)
    if there == windows:
        return int(_order(windows, seed, epoch)[place])
    among = _order(there, seed, epoch)[place] if epoch else place
    return int(_order(windows, seed, 0)[among])


def spread_windows(tokens: np.ndarray[Any, Any], length: int, budget: int) -> torch.Tensor:
    """Whole windows of `budget` tokens in all, (B, L) int64, at least one, spread evenly over the text.

    Neighbouring windows come from one document and say the same twice; far ones cover more of the text.
    """
    return _rows(tokens, length, _spread(len(tokens) // length, budget // length))


def choice_windows(tokens: np.ndarray[Any, Any], length: int, reported: int, budget: int) -> torch.Tensor:
    """Whole windows of `budget` tokens in all, (B, L) int64, spread evenly over those that `spread_windows` does not
    give for a budget of `reported`: what is chosen by them is reported on other text.

    Raises `DataError` where the budget is less than two windows, which is too few to tell how sure a mean over windows
    is, or where fewer are left than it asks for.
    """
    windows, count = len(tokens) // length, budget // length
    if count < 2:
        raise DataError(
            f"schedule.choice.texts of {budget} tokens is {count} windows of {length}, and a choice needs at least 2: "
            f"raise it to {2 * length}"
        )
    read = _spread(windows, reported // length)
    left = np.setdiff1d(np.arange(windows), read)
    if len(left) < count:
        raise DataError(
            f"schedule.choice.texts of {budget} tokens is {count} windows of {length}, but of the {windows} windows "
            f"of held-out text evaluations read {len(read)} and {len(left)} are left: lower it to "
            f"{len(left) * length}, lower evaluation.tokens, or hold out more text"
        )
    return _rows(tokens, length, left[_spread(len(left), count)])


def _spread(windows: int, count: int) -> np.ndarray[Any, Any]:
    """At most `count` of the windows, at least one, as far from each other as they can be."""
    return np.linspace(0, windows - 1, min(windows, max(1, count))).round().astype(np.int64)


def _rows(tokens: np.ndarray[Any, Any], length: int, windows: np.ndarray[Any, Any]) -> torch.Tensor:
    """Windows by their numbers, (B, L) int64."""
    rows = [np.asarray(tokens[start : start + length], dtype=np.int64) for start in windows * length]
    return torch.from_numpy(np.stack(rows))


@lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _boundaries(spec: TokensSpec, tokenizer: Any, place: Workplace) -> Boundaries:
    """What stands between documents and before windows; of a teacher's tokenizer, what it lacks is said."""
    if spec.vocabulary is not None:
        return Boundaries(tokenizer.eos_token_id, len(tokenizer))
    found = boundaries(tokenizer, configurations_in(place.inputs["teacher"]))
    for note in found.notes:
        place.say(note)
    return found


def _tokenizer(spec: TokensSpec, place: Workplace) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if spec.vocabulary is None:
        return AutoTokenizer.from_pretrained(place.inputs["teacher"])
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    shared = _shared_out(spec, place.context.locations, _Seen())
    texts: Iterator[str] = (text for split, text in shared if split == "train")
    if spec.train.max_tokens is not None:
        texts = _first_characters(texts, CHARACTERS_PER_TOKEN * spec.train.max_tokens)
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


def _shared_out(spec: TokensSpec, locations: Any, seen: _Seen) -> Iterator[tuple[str, str]]:
    """The documents of the training source, each with the split it belongs to."""
    share = 0.0 if spec.validation is not None else spec.validation_share or 0.0
    for text in _documents(spec.train, locations):
        seen.documents += 1
        seen.lowest = min(seen.lowest, place_of(text))
        yield ("valid" if is_held_out(text, share) else "train"), text


def _cut(text: str) -> Iterator[str]:
    """The text in pieces, so that none of its words is longer than `LONGEST`; a text without such a word as it is."""
    start = 0
    for match in LONG.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _first_characters(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Whole texts up to the one that brings their characters to `limit`."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def _check_enough(spec: TokensSpec, counts: Mapping[str, int], seen: _Seen) -> None:
    """Raise `DataError` where a split has less than one sequence."""
    for name in ("train", "valid"):
        if counts[name] >= spec.sequence_length:
            continue
        key, source = ("validation", spec.validation) if name == "valid" and spec.validation else ("train", spec.train)
        shared = (name, key) == ("valid", "train")
        remedy = "give more text"
        if source.max_tokens is not None and counts["train" if key == "train" else "valid"] == source.max_tokens:
            remedy = f"raise data.{key}.max_tokens{' or data.validation_share' if shared else ''}"
        elif shared and counts[name] == 0:
            raise DataError(none_held_out(seen.documents, seen.lowest, spec.validation_share or 0.0))
        raise DataError(
            f"the {name} text has {counts[name]} tokens, less than one sequence of {spec.sequence_length}: "
            f"{remedy}, or a smaller data.sequence_length"
        )


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


def _write(
    folder: Path,
    texts: Iterator[tuple[str, str]],
    limits: Mapping[str, int | None],
    *,
    tokenizer: Any,
    ends: Boundaries,
    length: int,
    width: Any,
) -> dict[str, int]:
    """Append each text's tokens to the file of the split that it comes with; return the tokens of each split.

    The splits are those of `limits`. Reading ends where one has as many tokens as its limit says. Every window of
    `length` tokens begins with the beginning of text, where there is one. Raises `DataError` for a token that the
    model does not have.
    """
    written = dict.fromkeys(limits, 0)
    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in limits}
        while chunk := list(itertools.islice(texts, ENCODE_BATCH)):
            encoded = tokenizer([text for _, text in chunk], add_special_tokens=False, verbose=False)["input_ids"]
            for (name, _), ids in zip(chunk, encoded, strict=True):
                limit = limits[name]
                if (highest := max(ids, default=0)) >= ends.entries:
                    token = tokenizer.convert_ids_to_tokens(highest)
                    raise DataError(f"the text holds {token!r}, for which the model has no entry: take it out")
                array = np.asarray([*ids, ends.end], dtype=width)
                if ends.begin is not None:
                    array = _with_beginnings(array, ends.begin, written[name], length)
                array = array if limit is None else array[: limit - written[name]]
                array.tofile(streams[name])
                written[name] += len(array)
                if written[name] == limit:
                    return written
    return written


def _with_beginnings(tokens: np.ndarray[Any, Any], begin: int, place: int, length: int) -> np.ndarray[Any, Any]:
    """Tokens that stand from `place` on in a file, and `begin` before each that would be the first of a window."""
    first = (length - place % length) % length  # of the tokens, how many belong to the window that has begun
    return np.insert(tokens, np.arange(first, len(tokens), length - 1), begin)
