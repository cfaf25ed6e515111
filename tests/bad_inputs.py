"""How inputs that are wrong are made, for the tables of them: a row is a name, a maker and what must be told.

A maker makes the input in the working directory and returns the words of the command.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

STUDY = """\
study: tiny
teacher:
  kind: pretrain
  layers: 6
  hidden: 64
  heads: 4
  max_length: 128
  tokens: 4096
  threads: 1
data:
  train: {source: text, files: ["text/*.txt"]}
  sequence_length: 32
operator:
  kind: hyena
  heads: 4
schedule:
  layer_order: bottom_up
  keep: []
recipe:
  batch_size: 2
  phases:
    - losses: {kl: 1.0}
      tokens_per_layer: 640
  optimizer: {lr: 3e-3}
evaluation: {prompts: 2, prompt_tokens: 16, new_tokens: 8}
throughput: {lengths: [64], decode_tokens: 8}
search:
  method: grid
  space: {}
"""
Make = Callable[[Path], list[str]]
Row = tuple[str, Make, str]


def study(*edits: tuple[str, str], command: str = "plan", words: tuple[str, ...] = ()) -> Make:
    """A study file with `old` replaced by `new`, each once."""

    def make(_: Path) -> list[str]:
        text = STUDY
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        Path("study.yaml").write_text(text, encoding="utf-8")
        return [command, "study.yaml", *words]

    return make


def words(*given: str, command: str = "plan") -> Make:
    return study(command=command, words=given)


def content(raw: bytes) -> Make:
    """A study file of these bytes."""

    def make(_: Path) -> list[str]:
        Path("study.yaml").write_bytes(raw)
        return ["plan", "study.yaml"]

    return make


def source(kind: str, name: str, raw: bytes, field: str = "") -> Make:
    """A study whose training text is one file of these bytes, beside a good validation text."""
    more = f", field: {field}" if field else ""
    made = f'train: {{source: {kind}, files: ["{name}"]{more}}}\n  validation: {{source: text, files: ["text/a.txt"]}}'

    def make(folder: Path) -> list[str]:
        Path(name).write_bytes(raw)
        return study((TRAIN, made))(folder)

    return make


def parquet(**columns: list[Any]) -> Make:
    """A study whose training text is a parquet file of these columns."""
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return source("parquet", "p.parquet", stream.getvalue())


def archive() -> bytes:
    """A tar archive of one text."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        told = tarfile.TarInfo("a.txt")
        told.size = 4
        tar.addfile(told, io.BytesIO(b"text"))
    return stream.getvalue()


def teacher(**files: str) -> Make:
    """A study whose teacher is a folder with these files, dots written as double underscores."""
    pretrained = ("  kind: pretrain\n", "  kind: pretrained\n  folder: model\n")
    gone = [(line, "") for line in re.findall(r"^  (?:layers|hidden|max_length|tokens|threads): .*\n", STUDY, re.M)]

    def make(folder: Path) -> list[str]:
        Path("model").mkdir()
        for name, text in files.items():
            Path("model", name.replace("__", ".")).write_text(text)
        return study(pretrained, ("  heads: 4\n  max_length", "  max_length"), *gone)(folder)

    return make


def home(prepare: Callable[[Path], Any], *given: str) -> Make:
    """A good study and a home that was prepared."""

    def make(folder: Path) -> list[str]:
        prepare(folder / "home")
        return study(command=given[0], words=given[1:])(folder)

    return make


def store_of(version: str) -> Callable[[Path], Any]:
    def prepare(root: Path) -> None:
        (root / "store").mkdir(parents=True)
        (root / "store" / "VERSION").write_text(version)

    return prepare


TRAIN = 'train: {source: text, files: ["text/*.txt"]}'
LOSSES = "losses: {kl: 1.0}"
at = r"^study\.yaml:%s: "
