"""Durable files: what a power cut or `kill -9` at any moment leaves is either the old state or the new one.

What all the rest stands on: it knows nothing of stages. Invariant: a name appears at its final place only
after its bytes are on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces; NaN and infinities raise `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value and, as `sha256`, the digest of its canonical text."""
    return {**value, "sha256": hashlib.sha256(canonical_json(value).encode()).hexdigest()}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """A value without its digest, or as it is where it has none; `ValueError` where the digest is another's."""
    whole = {key: inner for key, inner in value.items() if key != "sha256"}
    if "sha256" in value and sealed(whole) != value:
        raise ValueError("it does not have the digest that it states")
    return whole


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(root: Path) -> None:
    """Make every file and directory below `root` durable, `root` included."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_directory(Path(folder))


def share_tree(root: Path) -> None:
    """Let whoever may read a folder read all files below it: safetensors 0.8 makes files that only their user may."""
    rights = root.stat().st_mode & 0o666
    for path in below(root):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode | rights != mode:
            with contextlib.suppress(OSError):  # a file system without such rights
                path.chmod(mode | rights)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Replace a JSON file atomically and durably; NaN and infinities raise `ValueError`."""
    write_text(path, json_text(value, sort_keys=sort_keys) + "\n")


def json_text(value: Any, *, sort_keys: bool = True) -> str:
    """JSON as people read it; NaN and infinities raise `ValueError`."""
    return json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False)


def below(root: Path) -> Iterator[Path]:
    """Every file and folder below a folder, but for what vanishes meanwhile: `rglob` raises where a folder does."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            yield Path(folder) / name


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; on success it becomes `target`, durably, and on failure it is removed.

    A directory that stands at `target` already is replaced: whoever calls this owns it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        share_tree(temporary)
        fsync_tree(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(target.parent)
