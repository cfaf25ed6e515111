"""Files give the texts that they hold, each once and in order, or an error that says where."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from orchestrator.study.documents import DataError, FieldError, documents, documents_in, is_held_out, none_held_out

TEXTS = [
    "one\nline",
    "",
    "two \u00e9 \u2028 \U0001f600",
    'with "quotes" \\ and [brackets], {braces}',
    "\x00 and \t control",
    "last",
]
ROWS = [{"id": i, "text": text, "more": {"text": "another"}} for i, text in enumerate(TEXTS)]
LAYOUTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines without a last end": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "Windows lines": "\r\n".join(json.dumps(row) for row in ROWS),
    "empty lines": "\n\n".join(["", *(json.dumps(row) for row in ROWS), " "]),
    "one line": " ".join(json.dumps(row) for row in ROWS),
    "a list": json.dumps(ROWS),
    "a list over lines": json.dumps(ROWS, indent=2),
    "a list with a row a line": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "lists on lines": "\n".join(json.dumps(ROWS[i : i + 2]) for i in range(0, len(ROWS), 2)),
    "objects over lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "a mark at the beginning": "\ufeff" + json.dumps(ROWS),
}


def read(raw: bytes, kind: str = "jsonl", cut: bool = False) -> list[str]:
    return list(documents_in(kind, "text", Path("f"), io.BytesIO(raw), cut))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_records_of_every_layout_are_the_same_texts(layout: str, kind: str) -> None:
    assert read(LAYOUTS[layout].encode(), kind) == TEXTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_beginning_of_a_file_gives_the_first_texts_wherever_it_ends(layout: str) -> None:
    raw = LAYOUTS[layout].encode()
    counts = [0]
    for end in range(1, len(raw)):
        found = read(raw[:end], cut=True)
        assert found == TEXTS[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    if layout not in ("a list", "one line", "a mark at the beginning"):
        return
    assert counts[-1] >= len(TEXTS) - 1


@pytest.mark.parametrize(
    ("raw", "line", "said"),
    [
        (b'{"text": "x"}\n{"text": "x"\n{"text": "x"}\n', 2, "Expecting ',' delimiter"),
        (b'{"text": "x"}\n{"text": "x\n{"text": "x"}\n', 2, "Invalid control character)"),
        (b'{"text": "x"}\n\n\n{"text" "x"}', 4, "Expecting ':' delimiter"),
        (b'{"text": "x"}\nplain words\n', 2, "Expecting value"),
        (b'{"text": "x"} {"text": "x"}, {"text": "x"}\n', 1, "Expecting value"),
        (b'{"text": "x"\n{"text": "x"}\n', 1, "Expecting ',' delimiter"),
        (b'[\n{"text": "x"},\n{"text": "x"}\n{"text": "x"}\n]', 3, "Expecting ',' or ']'"),
        (b'[\n{"text": "x"},\n{"text": "x"}\n', 3, "Expecting ',' or ']'"),
        (b'[\n{"text": "x"},\n', 3, "Expecting ']'"),
        (b'[{"text": "x"},]', 1, "Expecting value"),
        (b'{"text": "x"}\n{"text": ' + b"[" * 100_000, 2, "maximum recursion depth exceeded"),
        (b'{"text": "x"}\n{"text": ' + b"1" * 5000 + b"}", 2, "Exceeds the limit"),
    ],
)
def test_what_is_no_record_is_told_with_its_line(raw: bytes, line: int, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(raw)
    assert str(caught.value).startswith(f"f, line {line}, is no JSON record ({said}")
    assert str(caught.value).endswith("): write one object a line, or a list of objects")


@pytest.mark.parametrize("value", [["x"], [], {}, {"x": 1}, 0, 7, -1.5, True, False, [{"role": "user"}]])
@pytest.mark.parametrize("layout", ["{}\n{}\n", "[{},\n{}]", "{}\n[{}]"])
def test_a_value_that_is_no_text_is_told_with_its_line(value: Any, layout: str) -> None:
    raw = layout.replace("{}", "%s") % (json.dumps({"text": "x"}), json.dumps({"text": value}))
    with pytest.raises(FieldError) as caught:
        read(raw.encode())
    told = f"f, line 2, holds {json.dumps(value)} in 'text', which is no text: name a field that holds a text, or "
    assert str(caught.value) == f"{told}write it as one"


def test_null_is_an_empty_text_and_a_missing_field_is_not() -> None:
    assert read(b'{"text": null}\n{"text": "x"}') == ["", "x"]
    with pytest.raises(
        FieldError, match=r"f, line 2, has no field 'text': name the one that holds the text, of txt, id"
    ):
        read(b'{"text": "x"}\n{"txt": "x", "id": 1}')


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_bytes_that_are_no_text_are_told_with_their_line(kind: str) -> None:
    with pytest.raises(DataError, match=r"f is not UTF-8 text .byte 0xe9 in line 3.: convert it"):
        read(b'{"text": "x"}\n{"text": "x"}\n{"text": "caf\xe9"}\n', kind)
    with pytest.raises(DataError, match=r"f is not UTF-8 text .byte 0xc3 in line 1.: convert it"):
        read(b'{"text": "caf\xc3', kind)
    assert read(b'{"text": "caf\xc3', kind, cut=True) == []


def test_a_text_is_the_file_without_the_mark_at_its_beginning() -> None:
    assert read("\ufeffone\r\ntwo\n\ufeff".encode(), "text") == ["one\r\ntwo\n\ufeff"]
    assert read(b"begins as a tex", "text", cut=True) == []  # a text that was cut is not the text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_files_are_read_as_they_lie(tmp_path: Path, name: str) -> None:
    raw = LAYOUTS["lines"].encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert list(documents("jsonl", "text", tmp_path / name)) == TEXTS


COLUMNS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]


@pytest.mark.parametrize("kind", [*COLUMNS, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_of_every_kind_of_column_are_read(tmp_path: Path, kind: Any) -> None:
    values = [*TEXTS, None]
    given = [None if value is None else value.encode() for value in values] if "binary" in str(kind) else values
    column = pa.array(given, pa.string()).dictionary_encode() if "dictionary" in str(kind) else pa.array(given, kind)
    pyarrow.parquet.write_table(
        pa.table({"other": list(range(len(values))), "text": column}), tmp_path / "a", row_group_size=2
    )
    assert list(documents("parquet", "text", tmp_path / "a")) == [*TEXTS, ""]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_may_differ_in_all_but_the_text(tmp_path: Path, kind: str) -> None:
    shards: list[list[dict[str, Any]]] = [
        [{"text": "a", "score": None, "tags": []}],
        [{"score": 1.5, "text": "b", "tags": {"x": 1}, "extra": "c"}],
        [{"text": "d", "score": "high"}],
    ]
    found = []
    for number, rows in enumerate(shards):
        path = tmp_path / f"{number}.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        found += documents(kind, "text", path)
    assert found == ["a", "b", "d"]


@pytest.mark.parametrize(("share", "held"), [(0.0, False), (0.2426, False), (0.2428, True), (1.0, True)])
def test_a_text_is_held_out_where_its_digest_is_below_the_share(share: float, held: bool) -> None:
    assert is_held_out("b", share) is held  # the SHA-256 of "b" begins with 3e23e816: 0.24273 of the way


def test_the_least_share_that_holds_a_document_out_is_told() -> None:
    told = "data.validation_share: 0.05 holds out none of the 3 documents, so there is no validation text: "
    last = "give data.validation, or the text in more documents"
    assert none_held_out(3, 2**63, 0.05) == f"{told}raise data.validation_share to 0.51, {last}"
    assert none_held_out(3, 2**62 - 1, 0.05) == f"{told}raise data.validation_share to 0.25, {last}"
    assert none_held_out(3, 2**64 - 1, 0.05) == f"{told}{last}"
