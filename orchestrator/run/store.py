"""The store: stage key -> specification, journal, checkpoints, artefacts, result. The only truth about what is done.

    store/ab/<key>/spec.json          the specification, written first
                   lock               held by whoever computes the stage; lease.json where leases are used
                   attempt.json       who computes it since when, and which attempt this is
                   failure.json       why the last attempt failed
                   log.txt            what its attempts wrote to stdout and stderr
                   work/step-000120/  checkpoints of an unfinished stage
                   journal.jsonl      its history
                   artefacts/         what it made
                   DONE.json          result and checksums, its own included; written last: without it nothing is done
    store/said.log                    what a worker found damaged, for whoever drives a run

Invariant: publishing is atomic and the first writer wins; stages are deterministic, so a second writer had the same.
Nothing depends on the order of clock times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.files import below, read_json, sealed, sha256_file, unsealed, write_json, write_text
from orchestrator.run.claims import ATTEMPT, DONE, states
from orchestrator.run.lease import State
from orchestrator.run.lock import exclusively
from orchestrator.study.spec import place_of, short

VERSION = "1"  # of the store's layout
FAILURE = "failure.json"
SAID = "said.log"


class StoreError(ValueError):
    """A directory that cannot be used as a store, or not any more."""


class Store:
    """A directory of stages. Opening one to write creates it; `StoreError` where it cannot be used."""

    def __init__(self, root: Path, *, write: bool = True) -> None:
        self.root = root
        marker = root / "VERSION"
        try:
            above = next(path for path in (root, *root.parents) if path.exists())
            if not above.is_dir():
                raise StoreError(f"the store {root} cannot be made: {above} is a file: give a directory as --home")
            if write:
                root.mkdir(parents=True, exist_ok=True)
                if not marker.exists():
                    write_text(marker, VERSION)
            version = marker.read_text(errors="replace") if marker.exists() else VERSION
        except OSError as error:
            told = f"the store {root} cannot be {'made' if write else 'read'} ({error.strerror})"
            room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(f"{told}: {'free space, or ' if room else ''}give another --home") from error
        if write and not os.access(root, os.W_OK):
            raise StoreError(f"the store {root} cannot be written: give another --home")
        if version != VERSION:
            raise StoreError(
                f"the store {root} has layout {version!r}, this program writes {VERSION!r}: use the program "
                "that wrote it, or give another --home"
            )

    def folder(self, key: str) -> Path:
        """Where a stage lives."""
        return self.root / place_of(key)

    def finished(self, key: str) -> bool:
        """Whether the stage's result is there."""
        return (self.folder(key) / DONE).is_file()

    def done(self, key: str) -> dict[str, Any]:
        """The manifest of a finished stage: `result`, `seconds` and `core_seconds` (of processor time) of its last
        attempt, `machine` it ran on, `finished` (time), `files` with their digests.

        Raises `ValueError` where it is torn or altered, `OSError` where it is gone.
        """
        return unsealed(read_json(self.folder(key) / DONE))

    def result(self, key: str) -> dict[str, Any]:
        """What the stage function returned."""
        result: dict[str, Any] = self.done(key)["result"]
        return result

    def artefacts(self, key: str) -> Path:
        """The directory a finished stage published."""
        return self.folder(key) / "artefacts"

    def attempt(self, key: str) -> dict[str, Any] | None:
        """Who computes an unfinished stage since when, or did so last."""
        return _maybe(self.folder(key) / ATTEMPT)

    def begun(self, key: str) -> bool:
        """Whether an attempt at the stage was made here, or what a mirror had of it was brought here."""
        return self.finished(key) or self.attempt(key) is not None

    def failure(self, key: str) -> dict[str, Any] | None:
        """Why the last attempt failed, and when in seconds since 1970, if it ended by an error."""
        path = self.folder(key) / FAILURE
        failure = _maybe(path)
        if failure is not None and "time" not in failure:  # of an earlier version
            with contextlib.suppress(OSError):
                failure["time"] = path.stat().st_mtime
        return failure

    def locked(self, key: str) -> bool:
        """Whether somebody computes the stage at this moment."""
        return self.states([key])[key] == "held"

    def states(self, keys: Iterable[str]) -> dict[str, State]:
        """Whether somebody computes stages at this moment, or died over them; leases of other machines take time."""
        folders = {key: self.folder(key) for key in keys}
        found = states(folders.values())
        return {key: found[folder] for key, folder in folders.items()}

    def withdraw_damaged(self, keys: Iterable[str], *, needed: bool = False) -> list[str]:
        """Let finished stages whose files are not what was published count as not finished; a line for each.

        With `needed` that goes for stages whose weights were dropped too: somebody is about to read them.
        """
        said = []
        for key in keys:
            if not self.finished(key):
                continue
            bad = self.damaged(key)
            told = f"{bad} is damaged or gone" if bad else "its weights were dropped and are needed"
            if bad or (needed and self.dropped(key)):
                (self.folder(key) / DONE).unlink(missing_ok=True)
                said.append(self.say(key, f"{told}: the stage is computed again"))
        return said

    def dropped(self, key: str) -> tuple[str, ...]:
        """The artefacts of a finished stage that were dropped to save room, its result kept."""
        return tuple(self.done(key).get("dropped", ()))

    def drop(self, key: str) -> int:
        """Drop the artefacts of a finished stage and keep its result; returns the bytes freed.

        0 where it is being computed, not finished or dropped already. What needs the artefacts computes them again.
        """
        if self.locked(key):
            return 0
        with exclusively(self.folder(key)) as ours:
            if not ours or not self.finished(key):
                return 0
            done = self.done(key)
            names = sorted(done["files"])
            freed = tree_bytes(self.artefacts(key))
            # First what is told, then the files: a death in between leaves files that nobody asks for.
            told = {**done, "files": {}, "dropped": sorted({*names, *done.get("dropped", ())})}
            write_json(self.folder(key) / DONE, sealed(told))
            shutil.rmtree(self.artefacts(key), ignore_errors=True)
            return freed

    def tidy(self, keys: Iterable[str]) -> None:
        """Remove what attempts left that died after they had published and before they had cleared up."""
        for key in keys:
            folder = self.folder(key)
            if self.finished(key) and (folder / "work").exists():
                with exclusively(folder) as ours:
                    if ours and self.finished(key):
                        shutil.rmtree(folder / "work", ignore_errors=True)
                        clear_torn(folder)

    def say(self, key: str, text: str) -> str:
        """Tell whoever drives a run at this moment something about a stage; returns the line."""
        line = f"stage {short(key)}: {text}"
        with contextlib.suppress(OSError), (self.root / SAID).open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        return line

    def said(self, after: int) -> tuple[list[str], int]:
        """What any process said of damage after the first `after` bytes of the log, and how long it is now."""
        try:
            raw = (self.root / SAID).read_bytes()[after:]
        except OSError:
            return [], after
        whole = raw[: raw.rfind(b"\n") + 1]
        return whole.decode(errors="replace").splitlines(), after + len(whole)

    def all_keys(self) -> list[str]:
        """All stages that have a directory, finished or not."""
        return sorted(path.name for path in self.root.glob("??/*") if path.is_dir())

    def remove(self, key: str) -> bool:
        """Delete a stage, finished or not, with all that its attempts left; False for one that is being computed."""
        if self.locked(key):
            return False
        with exclusively(self.folder(key)) as ours:
            if ours:
                (self.folder(key) / DONE).unlink(missing_ok=True)  # first: a half-deleted stage is not a finished one
                shutil.rmtree(self.folder(key))
            return ours

    def damaged(self, key: str) -> str | None:
        """The first file of a finished stage that is not what was published; none where all are."""
        try:
            files: dict[str, str] = self.done(key)["files"]
        except (OSError, ValueError, KeyError):
            return DONE
        for name, digest in files.items():
            path = self.artefacts(key) / name
            if not path.is_file() or sha256_file(path) != digest:
                return name
        return None

    def disk_bytes(self) -> int:
        """Bytes of all files in the store."""
        return tree_bytes(self.root)


def tree_bytes(root: Path) -> int:
    """Bytes of all files below a directory, those that vanish meanwhile left out."""
    total = 0
    for path in below(root):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def clear_torn(folder: Path) -> None:
    """Remove what attempts that died were writing."""
    for left in folder.glob("out-*"):
        shutil.rmtree(left, ignore_errors=True)
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def _maybe(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = read_json(path)
    except (OSError, ValueError):
        return None
    return value
