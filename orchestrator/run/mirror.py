"""A copy of finished stages below a URL, shared by machines that share no file system.

Place in the flow: `compute` uploads what it published, the broker fetches what is there before it computes anything.
Invariant: DONE.json goes up last and comes down last, and a fetched file has the digest that DONE.json states, so what
counts as finished here or there is whole. A mirror may hold anything: what it says is checked before it is followed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from orchestrator.files import fsync_tree, sealed, sha256_file, unsealed, write_json, write_text
from orchestrator.run.claims import DONE
from orchestrator.run.lock import exclusively
from orchestrator.run.store import Store
from orchestrator.study.spec import place_of, short, spec_from_json

S3 = ("s3://", "s3a://")
SPEC = "spec.json"
BESIDE = (SPEC, "journal.jsonl")  # what a stage has beside its artefacts


class MirrorError(ValueError):
    """A URL that cannot be used as a mirror."""


class Mirror:
    """Finished stages below a URL of any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:  # it names the package of this file system
            own = f"pip install it in the version of fsspec, {fsspec.__version__}"
            remedy = "pip install 'layerswap[s3]'" if url.startswith(S3) else own
            raise MirrorError(f"--mirror {url}: {error}: {remedy}") from error
        except ValueError as error:
            raise MirrorError(f"--mirror {url}: {error}: give a URL like file:///shared/stages") from error

    def finished(self, key: str) -> bool:
        """Whether the stage is there, whole."""
        return self._manifest(key) is not None

    def upload(self, store: Store, key: str) -> None:
        """Copy a finished stage there unless it is there already or its weights were dropped here.

        Raises what the file system does, nothing torn.
        """
        if self.finished(key) or store.dropped(key):
            return
        folder = store.folder(key)
        self._files.makedirs(self._at(key), exist_ok=True)
        for name in sorted(store.done(key)["files"]):
            self._put(store.artefacts(key) / name, self._at(key, f"artefacts/{name}"))
        for name in BESIDE:
            if (folder / name).exists():
                self._put(folder / name, self._at(key, name))
        self._put(folder / DONE, self._at(key, DONE))

    def upload_all(self, store: Store, keys: Iterable[str]) -> list[str]:
        """Upload the finished stages that are not there yet; a line for each that could not be."""
        said = []
        for key in keys:
            try:
                if store.finished(key):
                    self.upload(store, key)
            except Exception as error:  # file systems raise errors of their own
                said.append(f"stage {short(key)} could not be copied to the mirror {self.url}: {error}")
        return said

    def fetch(self, store: Store, key: str) -> bool:
        """Bring a stage into the store; false where it is not there, not whole, or being computed in this store.

        One that is not whole is withdrawn from the mirror, so that whoever computes it uploads it again.
        """
        manifest = self._manifest(key)
        if manifest is None:
            return False
        folder = store.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        with exclusively(folder) as ours:
            return ours and (store.finished(key) or self._bring(folder, key, manifest))

    def _bring(self, folder: Path, key: str, manifest: dict[str, Any]) -> bool:
        fresh = folder / f"out-{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
        try:
            beside = {name: text for name in BESIDE if (text := self._text(key, name)) is not None}
            if not (_specifies(beside.get(SPEC), key) and self._files_brought(fresh, key, manifest["files"])):
                self._files.rm_file(self._at(key, DONE))
                return False
            fsync_tree(fresh)
            for name, text in beside.items():
                write_text(folder / name, text)
            shutil.rmtree(folder / "artefacts", ignore_errors=True)
            fresh.rename(folder / "artefacts")
            write_json(folder / DONE, sealed(manifest))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return True

    def _files_brought(self, fresh: Path, key: str, files: dict[str, str]) -> bool:
        """Whether every file of a stage came, with the digest that it must have."""
        for name, digest in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._files.get_file(self._at(key, f"artefacts/{name}"), str(path))
            if not path.is_file() or sha256_file(path) != digest:
                return False
        return True

    def _manifest(self, key: str) -> dict[str, Any] | None:
        """What the mirror says of a stage, if that is a manifest of it."""
        try:
            found = unsealed(json.loads(self._text(key, DONE) or ""))
            shaped = isinstance(found["result"], dict) and isinstance(found["files"], dict)
            whole = shaped and found["key"] == key and all(map(_inside, found["files"]))
        except (ValueError, KeyError, TypeError, AttributeError):  # torn, altered, or something else altogether
            return None
        return found if whole else None

    def _text(self, key: str, name: str) -> str | None:
        try:
            return bytes(self._files.cat_file(self._at(key, name))).decode()
        except FileNotFoundError:
            return None

    def _put(self, source: Path, target: str) -> None:
        self._files.makedirs(self._files._parent(target), exist_ok=True)
        self._files.put_file(str(source), target)

    def _at(self, key: str, name: str = "") -> str:
        return f"{self._root}/{place_of(key)}/{name}".rstrip("/")


def _inside(name: str) -> bool:
    """Whether a name is that of a file below the directory it is joined to."""
    path = PurePosixPath(name)
    return str(path) == name and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _specifies(text: str | None, key: str) -> bool:
    """Whether a specification is of the stage with this key."""
    try:
        return text is not None and spec_from_json(text).key == key
    except ValueError:
        return False
