"""The history of a stage: one JSON line every few steps, appended by the stage, read by whoever records it.

Invariant: a step is told once. A resumed stage writes again the steps after its checkpoint; they are the same numbers,
and the reader keeps the first line of a step and skips a torn last one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class Journal:
    """Appends to a stage's journal; a line is out of the process when `write` returns, on disk after `sync`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = (folder / NAME).open("a+b")
        self._stream.seek(0, os.SEEK_END)
        if self._stream.tell() > 0:
            self._stream.seek(-1, os.SEEK_END)
            if self._stream.read(1) != b"\n":  # a torn line stays behind as one that cannot be read
                self._stream.write(b"\n")

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Tell the metrics of a step; `tokens` were trained by this stage so far."""
        line = {"step": step, "tokens": tokens, "time": round(time.time(), 3), "metrics": metrics}
        self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._stream.flush()

    def sync(self) -> None:
        """Make all lines durable."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Make all lines durable and let go of the file."""
        self.sync()
        self._stream.close()


def read_journal(folder: Path, after: int = -1) -> list[dict[str, Any]]:
    """The lines of steps beyond `after`, each step once, in order; none where there is no journal."""
    try:
        raw = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in raw.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value["step"] > after:
            found.setdefault(int(value["step"]), value)
    return [found[step] for step in sorted(found)]
