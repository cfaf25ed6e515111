"""A copy of finished stages below a URL, shared by machines that share no file system.

Place in the flow: `compute` uploads what it published, the broker fetches what is there before it computes anything.
Invariant: DONE.json goes up last and comes down last, and a fetched file has the digest that DONE.json states, so what
counts as finished here or there is whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from orchestrator.files import fsync_tree, sha256_file, write_text
from orchestrator.run.claims import exclusively
from orchestrator.run.store import DONE, Store
from orchestrator.study.spec import place_of, short

S3 = ("s3://", "s3a://")
BESIDE = ("spec.json", "journal.jsonl")  # what a stage has beside its artefacts


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
        text = self._manifest(key)
        if text is None:
            return False
        folder = store.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        with exclusively(folder) as ours:
            return ours and (store.finished(key) or self._bring(folder, key, text))

    def _bring(self, folder: Path, key: str, text: str) -> bool:
        fresh = folder / f"out-{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
        try:
            for name, digest in json.loads(text)["files"].items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self._files.get_file(self._at(key, f"artefacts/{name}"), str(path))
                if not path.is_file() or sha256_file(path) != digest:
                    self._files.rm_file(self._at(key, DONE))
                    return False
            fsync_tree(fresh)
            for name in BESIDE:
                with contextlib.suppress(FileNotFoundError):
                    write_text(folder / name, self._files.cat_file(self._at(key, name)).decode())
            shutil.rmtree(folder / "artefacts", ignore_errors=True)
            fresh.rename(folder / "artefacts")
            write_text(folder / DONE, text)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return True

    def _manifest(self, key: str) -> str | None:
        try:
            text = bytes(self._files.cat_file(self._at(key, DONE))).decode()
            found: dict[str, Any] = json.loads(text)
        except (FileNotFoundError, ValueError):
            return None
        return text if found.get("key") == key else None

    def _put(self, source: Path, target: str) -> None:
        self._files.makedirs(self._files._parent(target), exist_ok=True)
        self._files.put_file(str(source), target)

    def _at(self, key: str, name: str = "") -> str:
        return f"{self._root}/{place_of(key)}/{name}".rstrip("/")
