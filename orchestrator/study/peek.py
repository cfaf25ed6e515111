"""A look at the beginning of every file that a study reads: what is wrong there fails in the plan, not in a stage.

Place in the flow: after `sources`, before the plan. Invariant: cheap; at most a mebibyte of each file is read, and what
lies behind it is found by the stage that reads it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from orchestrator.study.loader import StudyError
from orchestrator.study.schema import FileSource, Study
from orchestrator.study.sources import Resolved

PEEK = 1 << 20


def check_files(study: Study, resolved: Resolved) -> None:
    """Raise `StudyError` for text files that cannot be read or are too short, and for a teacher without weights."""
    sources = {"data.train": (study.data.train, resolved.train), "data.validation": (study.data.validation, None)}
    if resolved.validation is not None:
        sources["data.validation"] = (study.data.validation, resolved.validation)
    for key, (source, identity) in sources.items():
        if isinstance(source, FileSource) and identity is not None:
            names = resolved.locations[identity.fingerprint].files
            _check_source(key, source, [Path(name) for name in names], study.data.sequence_length)
    if isinstance(study.data.train, FileSource) and study.data.train.source == "text" and resolved.validation is None:
        names = resolved.locations[resolved.train.fingerprint].files
        if len(names) < 2:
            raise StudyError(
                f"data.train: {names[0]} is one document, and none is left to hold out: give data.validation, or the "
                "text in more files"
            )
    if resolved.teacher is not None:
        for name in resolved.locations[resolved.teacher].files:
            if not [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]:
                raise StudyError(f"teacher.folder: {name} holds no weights: save them there with model.save_pretrained")


def _check_source(key: str, source: FileSource, paths: list[Path], sequence_length: int) -> None:
    if source.source == "parquet":
        for path in paths:
            _check_field(key, source.field, path, _columns(key, path))
        return
    most = 0
    for path in paths:
        head = _head(key, path)
        whole = len(head) < PEEK
        text = _decoded(key, path, head, whole)
        if source.source != "text":
            record = _first_record(key, path, text, whole)
            if record is not None:
                _check_field(key, source.field, path, record)
        most += len(head) + 2  # a token is at least a byte; two more for the document's begin and end
        if not whole:
            return
    if source.source == "text" and most < sequence_length:
        raise StudyError(
            f"{key}: the text has at most {most} tokens, less than one sequence of {sequence_length}: give more text, "
            "or a smaller data.sequence_length"
        )


def _head(key: str, path: Path) -> bytes:
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            return stream.read(PEEK)
    except (OSError, EOFError, zlib.error) as error:
        remedy = "pack it again with gzip, or give the plain file" if packed else "check its permissions"
        raise StudyError(f"{key}: {path} cannot be {'unpacked' if packed else 'read'} ({error}): {remedy}") from error


def _decoded(key: str, path: Path, head: bytes, whole: bool) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{key}: {path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at position {error.start}): "
            "convert it, for example with iconv -t UTF-8"
        ) from error


def _columns(key: str, path: Path) -> list[str]:
    import pyarrow.parquet  # loaded only by sources that need it

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise StudyError(f"{key}: {path} cannot be read as parquet ({reason}): write it again") from error


def _first_record(key: str, path: Path, text: str, whole: bool) -> Any:
    """The first record of JSON lines, of an array or of an object; None where it is longer than what was read."""
    start = text.lstrip().removeprefix("[").lstrip()
    try:
        return json.JSONDecoder().raw_decode(start)[0]
    except ValueError as error:
        if not whole:
            return None
        raise StudyError(
            f"{key}: {path} does not begin with a JSON record ({error}): write one object a line, or a list of objects"
        ) from error


def _check_field(key: str, field: str, path: Path, record: Any) -> None:
    if not isinstance(record, dict | list):
        told = json.dumps(record)[:40]
        raise StudyError(f"{key}: the first record of {path} is {told}: a record is an object with the field {field!r}")
    if field not in record:
        raise StudyError(
            f"{key}.field: {path} has no field {field!r}: name the one that holds the text, of {', '.join(record)}"
        )
