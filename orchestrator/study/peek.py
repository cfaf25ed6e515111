"""A look at the beginning of every text that a study reads: what is wrong there fails in the plan, not in a stage.

Place in the flow: after `sources`, before the plan. Invariant: cheap; at most a mebibyte of each file is read, and what
lies behind it is found by the stage that reads it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from orchestrator.study.documents import (
    DataError,
    FieldError,
    beginning,
    check_column,
    documents,
    documents_in,
    is_held_out,
    none_held_out,
    place_of,
)
from orchestrator.study.loader import StudyError
from orchestrator.study.pretrained import check_teacher
from orchestrator.study.schema import FileSource, Study
from orchestrator.study.sources import Resolved

PEEK = 1 << 20


def check_files(study: Study, resolved: Resolved) -> None:
    """Raise `StudyError` for text files that cannot be read or are too short, and for a teacher that is not whole."""
    data = study.data
    share = None if resolved.validation is not None else data.validation_share
    for key, source, identity in (
        ("data.train", data.train, resolved.train),
        ("data.validation", data.validation, resolved.validation),
    ):
        if isinstance(source, FileSource) and identity is not None:
            paths = [Path(name) for name in resolved.locations[identity.fingerprint].files]
            _check_source(key, source, paths, data.sequence_length, share)
    if resolved.teacher is not None:
        location = resolved.locations[resolved.teacher]
        for name in location.files if location.gguf is None else ():
            check_teacher(Path(name))


@dataclasses.dataclass
class _Seen:
    """What was found in the files of a source; `whole` where all of them were read to their end."""

    whole: bool = True
    documents: int = 0
    most: int = 0  # tokens there can be
    held: int = 0  # of them, in documents that are held out
    lowest: int = 2**64  # place of the document that is held out first


def _check_source(key: str, source: FileSource, paths: list[Path], sequence_length: int, share: float | None) -> None:
    if source.source == "text" and share is not None and len(paths) < 2:
        raise StudyError(
            f"{key}: {paths[0]} is one document, and none is left to hold out: give data.validation, or the text in "
            "more files"
        )
    seen = _Seen()
    try:
        for path in paths:
            _look(source, path, share or 0.0, seen)
    except FieldError as error:
        raise StudyError(f"{key}.field: {error}") from error
    except DataError as error:
        raise StudyError(f"{key}: {error}") from error
    if not seen.whole:
        return
    if not seen.documents:
        raise StudyError(f"{key}: there is no text: every document is empty: give text")
    if seen.most < sequence_length:
        raise StudyError(_too_short(f"{key}: the text", seen.most, sequence_length))
    if share is None:
        return
    if seen.lowest >= share * 2**64:
        raise StudyError(none_held_out(seen.documents, seen.lowest, share))
    for name, most, remedy in (("held-out", seen.held, "raise"), ("remaining", seen.most - seen.held, "lower")):
        if most < sequence_length:
            told = _too_short(f"data.validation_share: the {name} text", most, sequence_length)
            raise StudyError(f"{told}; or {remedy} data.validation_share, or give data.validation")


def _too_short(what: str, most: int, sequence_length: int) -> str:
    return (
        f"{what} has at most {most} tokens, less than one sequence of {sequence_length}: give more text, or a smaller "
        "data.sequence_length"
    )


def _look(source: FileSource, path: Path, share: float, seen: _Seen) -> None:
    """Read a file's beginning; `DataError` where it cannot be used."""
    if source.source == "parquet":
        check_column(path, source.field)
        if path.stat().st_size > PEEK:
            seen.whole = False
            return
        texts = documents(source.source, source.field, path)
    else:
        stream, cut = beginning(path, PEEK)
        seen.whole &= not cut
        texts = documents_in(source.source, source.field, path, stream, cut)
    for text in filter(None, texts):
        most = len(text.encode()) + 2  # a token is at least a byte; two more for the document's begin and end
        seen.documents += 1
        seen.most += most
        seen.held += most if is_held_out(text, share) else 0
        seen.lowest = min(seen.lowest, place_of(text))
