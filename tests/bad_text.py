"""Text that cannot be used: rows of `test_bad_inputs`."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib

from tests.bad_inputs import Row, archive, at, parquet, source, study, words

PACKED = gzip.compress(b"a text that was packed and then cut\n" * 50)
TEXT: list[Row] = [
    ("no text file", study(("text/*.txt", "gone/*.txt")), at % r"11:\d+" + r"data.train.files.0: no file at .*gone/\*.txt: give a path relative to"),
    ("empty text file", source("text", "e.txt", b""), at % r"11:\d+" + "data.train.files.0: .*e.txt is empty: leave it out or fill it"),
    ("text that is not UTF-8", source("text", "l.txt", b"caf\xe9 " * 50), at % "11:3" + "data.train: .*l.txt is not UTF-8 text .byte 0xe9 in line 1.: convert it, .*iconv"),
    ("text too short", source("text", "s.txt", b"short"), at % "11:3" + "data.train: the text has at most 7 tokens, less than one sequence of 32: give more"),
    ("one document", study(("text/*.txt", "text/a.txt")), at % "11:3" + "data.train: .*a.txt is one document, and none is left to hold out: give data.validation"),
    ("text that is not packed", source("text", "n.txt.gz", b"plain text"), at % "11:3" + "data.train: .*n.txt.gz cannot be unpacked .*: pack it again"),
    ("packed text cut", source("text", "c.txt.gz", PACKED[:-9]), at % "11:3" + "data.train: .*c.txt.gz cannot be unpacked .*end-of-stream.*: pack it again"),
    ("packed text flipped", source("text", "f.txt.gz", PACKED[:20] + b"\xff\xff" + PACKED[22:]), at % "11:3" + "data.train: .*f.txt.gz cannot be unpacked .*: pack it again"),
    ("records without the field", source("jsonl", "r.jsonl", b'{"body": "x"}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 1, has no field 'text': name the one .*, of body"),
    ("another field", source("json", "r.json", b'[{"text": "x"}]', field="body"), at % r"11:\d+" + "data.train.field: .*r.json, line 1, has no field 'body': name the one .*, of text"),
    ("records that are no JSON", source("jsonl", "r.jsonl", b"{text: x}\n"), at % "11:3" + "data.train: .*r.jsonl, line 1, is no JSON record .*: write one object a line"),
    ("records that are texts", source("json", "r.json", b'["x"]'), at % "11:3" + "data.train: .*r.json, line 1, is \"x\": a record is an object with"),
    ("parquet that is none", source("parquet", "p.parquet", b"PAR1 and no more"), at % "11:3" + "data.train: .*p.parquet cannot be read as parquet .*: write it again"),
    ("field that is a list", source("jsonl", "r.jsonl", b'{"text": "good"}\n{"text": ["a", "b"]}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 2, holds .\"a\", \"b\". in 'text', which is no text: name a field that"),
    ("field of messages", source("json", "r.json", b'[\n{"text": [{"role": "user", "content": "x"}]}\n]'), at % r"11:\d+" + "data.train.field: .*r.json, line 2, holds .*role.* which is no text: name"),
    ("field that is a mapping", source("jsonl", "r.jsonl", b'{"text": {"en": "x"}}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 1, holds {\"en\": \"x\"} in 'text', which is no text: name"),
    ("field that is a number", source("jsonl", "r.jsonl", b'{"text": 0}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 1, holds 0 in 'text', which is no text: name"),
    ("field that is true", source("jsonl", "r.jsonl", b'{"text": true}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 1, holds true in 'text', which is no text: name"),
    ("field that is null", source("jsonl", "r.jsonl", b'{"text": null}\n{"text": ""}\n'), at % "11:3" + "data.train: there is no text: every document is empty: give text"),
    ("record without the field among others", source("jsonl", "r.jsonl", b'{"text": "x"}\n{"body": "x"}\n'), at % r"11:\d+" + "data.train.field: .*r.jsonl, line 2, has no field 'text': name .*, of body"),
    ("half a character", source("jsonl", "r.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n'), at % "11:3" + r"data.train: .*r.jsonl, line 2, holds half a character \(.ud83d\) in 'text': write both"),
    ("second record cut", source("jsonl", "r.jsonl", b'{"text": "x"}\n{"text": "x"\n{"text": "x"}\n'), at % "11:3" + "data.train: .*r.jsonl, line 2, is no JSON record .*: write one"),
    ("parquet of lists", parquet(text=[["a"], ["b", "c"]]), at % r"11:\d+" + "data.train.field: .*p.parquet holds list<.*> in 'text', which is no text: name"),
    ("parquet of structs", parquet(text=[{"en": "a"}]), at % r"11:\d+" + "data.train.field: .*p.parquet holds struct<.*> in 'text', which is no text: name"),
    ("parquet of numbers", parquet(text=[1, 2]), at % r"11:\d+" + "data.train.field: .*p.parquet holds int64 in 'text', which is no text: name"),
    ("parquet of bytes that are no text", parquet(text=[b"good", b"\xff\xd8\xff"]), at % r"11:\d+" + "data.train.field: .*p.parquet, row 2, holds bytes in 'text' that are no UTF-8 text"),
    ("parquet of nothing", parquet(text=[None, None]), at % "11:3" + "data.train: there is no text: every document is empty"),
    ("parquet without the field", parquet(body=["a"]), at % r"11:\d+" + "data.train.field: .*p.parquet has no field 'text': name the one .*, of body"),
    ("parquet as jsonl", source("jsonl", "p.jsonl", b"PAR1\x15\x04\0\0"), at % "11:3" + "data.train: .*p.jsonl is a parquet file: write source: parquet"),
    ("gzip without the ending", source("text", "p.txt", PACKED), at % "11:3" + "data.train: .*p.txt is compressed .gzip. and its name does not end in .gz: unpack it, or name it so"),
    ("gzip in capitals", source("jsonl", "p.jsonl.GZ", PACKED), at % "11:3" + "data.train: .*p.jsonl.GZ is compressed .gzip. and its name does not end in .gz"),
    ("bzip2", source("jsonl", "p.jsonl.bz2", bz2.compress(b"x")), at % "11:3" + "data.train: .*p.jsonl.bz2 is compressed .bzip2.: unpack it, or pack it with gzip and name it .gz"),
    ("xz", source("text", "p.txt.xz", lzma.compress(b"x")), at % "11:3" + "data.train: .*p.txt.xz is compressed .xz.: unpack it, or pack it with gzip"),
    ("lzma", source("text", "p.txt", lzma.compress(b"x", lzma.FORMAT_ALONE)), at % "11:3" + "data.train: .*p.txt is compressed .lzma.: unpack it, or pack it with gzip"),
    ("zstd", source("jsonl", "p.jsonl.zst", b"\x28\xb5\x2f\xfd\x24\0"), at % "11:3" + "data.train: .*p.jsonl.zst is compressed .zstd.: unpack it, or pack it with gzip"),
    ("zlib", source("jsonl", "p.jsonl", zlib.compress(b"x")), at % "11:3" + "data.train: .*p.jsonl is compressed .zlib.: unpack it, or pack it with gzip"),
    ("zip", source("text", "p.zip", b"PK\x03\x04\x14\0"), at % "11:3" + "data.train: .*p.zip is compressed .zip.: unpack it, or pack it with gzip"),
    ("packed twice", source("text", "p.txt.gz", gzip.compress(bz2.compress(b"x"))), at % "11:3" + "data.train: .*p.txt.gz is compressed twice .gzip of bzip2.: unpack it"),
    ("parquet that is packed", source("parquet", "p.parquet.gz", PACKED), at % "11:3" + "data.train: .*p.parquet.gz is compressed .gzip.: unpack it; parquet compresses what is in it"),
    ("archive", source("text", "p.tar", archive()), at % "11:3" + "data.train: .*p.tar is a tar archive: unpack it and name the files"),
    ("packed archive", source("text", "p.tar.gz", gzip.compress(archive())), at % "11:3" + "data.train: .*p.tar.gz is a tar archive: unpack it and name the files"),
    ("UTF-16 without a mark", source("text", "u.txt", "two\nlines".encode("utf-16-le")), at % "11:3" + "data.train: .*u.txt is no plain text .a byte 0 in line 1.: convert it"),
    ("UTF-16 with a mark", source("text", "u.txt", "two lines".encode("utf-16")), at % "11:3" + "data.train: .*u.txt is no plain text .a byte 0 in line 1.: convert it, .* iconv -f UTF-16"),
    ("share that holds nothing out", words("--set", "data.validation_share=1e-6"), r"^--set .*: data.validation_share: 1e-06 holds out none of the 2 documents, so .*: raise data.validation_share to 0\.\d+, give data.validation, or"),
    ("share that holds out all", study(("length: 32", "length: 32\n  validation_share: 0.999999")), at % "13:3" + "data.validation_share: the remaining text has at most 0 tokens, .*; or lower data.validation_share"),
    ("a folder as text", study(('"text/*.txt"', "text")), at % r"11:\d+" + r"data.train.files.0: no file at .*text \(a folder: write text/\*\)"),
]  # fmt: skip
