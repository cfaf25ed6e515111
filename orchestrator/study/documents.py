"""Files -> documents: the one way in which text is read, by the look at its beginning and by the stage that reads all.

Place in the flow: `peek` reads the beginning of every file, `distill.data` all of it. Invariant: a document is the
text that a file holds, or an error that says where it is none. Nothing is guessed or replaced, and nothing is left out
but records whose text is empty or null.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PACKED = {  # how a file begins -> what packed it
    b"\x1f\x8b": "gzip", b"\x1f\x9d": "compress", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "lzma", b"LZIP\x01": "lzip", b"\x04\x22\x4d\x18": "lz4", b"\xff\x06\x00\x00sNaPpY": "snappy",
    b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"x\x9c": "zlib", b"x\xda": "zlib",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
}  # fmt: skip
TAR = slice(257, 262)  # where a tar archive says "ustar"
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_LITERAL = 9  # of JSON, "-Infinity"
DECODER = json.JSONDecoder()


class DataError(ValueError):
    """Text that cannot be used; the message names the source, the rule and the remedy."""


class FieldError(DataError):
    """Records without the field that the study names, or with something in it that is no text."""


def documents(kind: str, field: str | None, path: Path) -> Iterator[str]:
    """The texts of a file of this kind, empty ones too; `DataError` where something in it is no text."""
    if kind == "parquet":
        yield from _columns(path, str(field))
        return
    with opened(path) as stream:
        yield from documents_in(kind, field, path, stream)


def documents_in(kind: str, field: str | None, path: Path, stream: IO[bytes], cut: bool = False) -> Iterator[str]:
    """The texts in the unpacked bytes of a file; what is incomplete at its end is no error where it is `cut` there."""
    if kind in ("json", "jsonl"):
        for line, record in _records(path, stream, cut):
            yield text_of(record, str(field), f"{path}, line {line}")
        return
    raw = stream.read()
    if kind == "python-stdlib":  # as the interpreter ships it
        yield raw.decode("utf-8", errors="replace")
        return
    if b"\0" in raw:
        raise DataError(
            f"{path} is no plain text (a byte 0 in line {raw.count(10, 0, raw.index(0)) + 1}): convert it, for "
            "example with iconv -f UTF-16 -t UTF-8, or leave it out"
        )
    text = _decoded(path, raw.removeprefix(codecs.BOM_UTF8), 1, cut)
    if not cut:
        yield text


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its name ends in .gz; `DataError` where it is packed otherwise or torn."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(512)
            _check_kind(path, head, packed)
            stream.seek(0)
            yield stream  # type: ignore[misc] # gzip's type is of its own
    except (OSError, EOFError, zlib.error) as error:
        remedy = "pack it again with gzip, or give the plain file" if packed else "check its permissions"
        raise DataError(f"{path} cannot be {'unpacked' if packed else 'read'} ({error}): {remedy}") from error


def _packer(head: bytes) -> str | None:
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def _check_kind(path: Path, head: bytes, unpacked: bool) -> None:
    packer = _packer(head)
    if packer is not None and unpacked:
        raise DataError(f"{path} is compressed twice (gzip of {packer}): unpack it, and pack it with gzip once or not")
    if packer == "gzip":
        raise DataError(f"{path} is compressed (gzip) and its name does not end in .gz: unpack it, or name it so")
    if packer is not None:
        raise DataError(f"{path} is compressed ({packer}): unpack it, or pack it with gzip and name it .gz")
    if head[TAR] == b"ustar" and b"\0" in head:
        raise DataError(f"{path} is a tar archive: unpack it and name the files that were in it")
    if head.startswith(b"PAR1") and b"\0" in head:
        raise DataError(f"{path} is a parquet file: write source: parquet")


def _decoded(path: Path, raw: bytes, line: int, cut: bool = False) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise DataError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line}): convert it, for "
            "example with iconv -t UTF-8"
        ) from error


def _records(path: Path, stream: IO[bytes], cut: bool) -> Iterator[tuple[int, Any]]:
    """(line, value) of JSON records: objects on lines, or one after the other, or in lists, over one line or many."""
    first, head = 1, stream.readline().removeprefix(codecs.BOM_UTF8)
    while head and not head.strip():
        first, head = first + 1, stream.readline()
    by_lines = head.endswith(b"\n") or not cut
    try:
        for _ in _values(_decoded(path, head, first, not by_lines)):
            pass
    except (ValueError, RecursionError):  # a record goes on over more lines, or is wrong
        by_lines = False
    if not by_lines:
        text = _decoded(path, head + stream.read(), first, cut)
        yield from _told(path, text, first, cut)
        return
    for line, raw in enumerate(itertools.chain([head], stream), first):
        if raw.endswith(b"\n") or not cut:
            yield from _told(path, _decoded(path, raw, line), line)


def _told(path: Path, text: str, line: int, cut: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, value) of the JSON values in a text that begins at a line of a file."""
    at = 0
    try:
        for start, value in _values(text):
            line, at = line + text.count("\n", at, start), start
            yield line, value
    except (ValueError, RecursionError) as error:
        where = error.pos if isinstance(error, json.JSONDecodeError) else at
        if cut and (str(error).startswith("Unterminated string") or where >= len(text) - LONGEST_LITERAL):
            return
        if str(error).startswith("Expecting ','"):  # it is missing where the value before it ends
            where = len(text[:where].rstrip())
        line += text.count("\n", at, where)
        said = re.sub("( starting)? at$", "", error.msg) if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{path}, line {line}, is no JSON record ({said}): write one object a line, or a list of objects"
        ) from error


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """(position, value) of every JSON value of a text, of a list its members; `ValueError` where it is none."""
    at, inside = _skip(text, 0), False
    while at < len(text):
        if not inside and text[at] == "[":
            at, inside = _skip(text, at + 1), True
            if text[at : at + 1] == "]":
                at, inside = _skip(text, at + 1), False
            continue
        value, end = DECODER.raw_decode(text, at)
        yield at, value
        at = _skip(text, end)
        if inside:
            follows = text[at : at + 1]
            if follows not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at, inside = _skip(text, at + 1), follows == ","
    if inside:
        raise json.JSONDecodeError("Expecting ']'", text, len(text))


def _skip(text: str, at: int) -> int:
    return SPACE.match(text, at).end()  # type: ignore[union-attr] # matches everywhere


def text_of(record: Any, field: str, where: str) -> str:
    """The text of a record, empty where it is null; `DataError` that begins with `where` where it has none."""
    if not isinstance(record, dict):
        told = json.dumps(record, default=str)[:40]
        raise DataError(f"{where}, is {told}: a record is an object with the field {field!r}")
    if field not in record:
        raise FieldError(_no_field(where + ",", field, record))
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        told = json.dumps(value, default=str)[:40]
        raise FieldError(_no_text(f"{where}, holds {told}", field))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise DataError(f"{where}, holds half a character ({half}) in {field!r}: write both halves") from error
    return value


def _no_field(where: str, field: str, fields: Any) -> str:
    return f"{where} has no field {field!r}: name the one that holds the text, of {', '.join(map(str, fields))}"


def _no_text(what: str, field: str) -> str:
    return f"{what} in {field!r}, which is no text: name a field that holds a text, or write it as one"


def check_column(path: Path, field: str) -> None:
    """Raise `DataError` where a file is no parquet, and `FieldError` where its field is absent or no text."""
    _parquet(path, field)


def _parquet(path: Path, field: str) -> Any:
    import pyarrow
    import pyarrow.parquet  # loaded only by sources that need it

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        with path.open("rb") as stream:
            packer = _packer(stream.read(16))
        if packer is not None:
            raise DataError(f"{path} is compressed ({packer}): unpack it; parquet compresses what is in it") from error
        raise _not_parquet(path, error) from error
    names = file.schema_arrow.names
    if field not in names:
        raise FieldError(_no_field(str(path), field, names))
    kind, told = file.schema_arrow.field(field).type, file.schema_arrow.field(field).type
    kind = getattr(kind, "storage_type", kind)
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    if str(kind) not in texts:
        raise FieldError(_no_text(f"{path} holds {told}", field))
    return file


def _columns(path: Path, field: str) -> Iterator[str]:
    file, row = _parquet(path, field), 0
    try:
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield value.decode() if isinstance(value, bytes) else value or ""
    except UnicodeDecodeError as error:
        raise FieldError(f"{path}, row {row}, holds bytes in {field!r} that are no UTF-8 text: write text") from error
    except (OSError, ValueError) as error:
        raise _not_parquet(path, error) from error
    finally:
        file.close()


def _not_parquet(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"{path} cannot be read as parquet ({reason}): write it again")


def place_of(text: str) -> int:
    """Where chance puts a document, from 0 to 2^64: those below the share that is held out are for validation."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:8], "big")


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation, whatever stands beside it."""
    return place_of(text) < share * 2**64


def none_held_out(count: int, lowest: int, share: float) -> str:
    """What to say where none of `count` documents is held out, the lowest of which is at that place."""
    enough = (100 * lowest // 2**64 + 1) / 100
    raised = f"raise data.validation_share to {enough:g}, give" if count > 1 and enough < 1 else "give"
    return (
        f"data.validation_share: {share:g} holds out none of the {count} documents, so there is no validation text: "
        f"{raised} data.validation, or the text in more documents"
    )


def beginning(path: Path, limit: int) -> tuple[io.BytesIO, bool]:
    """The first bytes of a file, unpacked, and whether more follow."""
    with opened(path) as stream:
        head = stream.read(limit + 1)
    return io.BytesIO(head[:limit]), len(head) > limit
