"""Files are whole or not there, and one value has one text."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import (
    CHUNK,
    below,
    canonical_json,
    fsync_tree,
    published_directory,
    read_json,
    sealed,
    sha256_file,
    unsealed,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def opened(handle: int) -> Path:
    """The file behind a handle."""
    return Path(f"/proc/self/fd/{handle}").readlink()


def test_what_vanishes_while_a_folder_is_walked_is_left_out(tmp_path: Path) -> None:
    """As checkpoints do while another process looks at a home."""
    for name in ("one", "two"):
        write_text(tmp_path / name / "deep" / "file", "")
    found = []
    for path in below(tmp_path):
        found.append(path.name)
        if path.name == "file":
            shutil.rmtree(tmp_path / ("two" if "one" in path.parts else "one"), ignore_errors=True)
    assert sorted(found) == ["deep", "file", "one", "two"]


def test_one_value_has_one_text() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": {"d": "é", "c": "x y"}}) == (
        '{"a":{"c":"x y","d":"\\u00e9"},"b":[1,2.5,null,true]}'
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([number])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [number])
    assert list(tmp_path.iterdir()) == []


def test_a_seal_is_the_digest_of_the_canonical_text() -> None:
    value: dict[str, Any] = {"b": 1, "a": [2]}
    digest = hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    assert sealed(value) == {"a": [2], "b": 1, "sha256": digest}
    assert unsealed(sealed(value)) == value
    assert unsealed(value) == value  # of before there were seals
    for altered in ({"a": [3]}, {"sha256": "0" * 64}, {"c": 1}):
        with pytest.raises(ValueError, match="does not have the digest that it states"):
            unsealed(sealed(value) | altered)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_the_digest_of_a_file_is_that_of_all_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_text_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    write_text(path, "né")
    assert path.read_bytes() == "né".encode()
    assert names(path.parent) == ["file.txt"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "file.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_text_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, sync = Path.replace, os.fsync

    def noted(handle: int) -> None:
        done.append(opened(handle).name)
        sync(handle)

    def renamed(self: Path, target: Path) -> Any:
        done.append(f"to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    write_text(tmp_path / "file.txt", "new")
    assert done[0].startswith(".file.txt.") and done[0].endswith(".tmp")
    assert done[1:] == ["to file.txt", tmp_path.name]


def test_json_for_people_is_sorted_and_ends_in_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": [2], "b": 1}
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "torn.json")


def test_every_file_and_directory_of_a_tree_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "a/two", "a/b/three"):
        (tmp_path / name).touch()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(opened(handle))))
    before = names(Path("/proc/self/fd"))
    fsync_tree(tmp_path)
    assert sorted(synced) == sorted(str(path) for path in [tmp_path, *tmp_path.rglob("*")])
    assert names(Path("/proc/self/fd")) == before  # none is left open


def test_files_of_a_published_directory_have_its_rights(tmp_path: Path) -> None:
    for rights in (0o755, 0o770, 0o700):
        with published_directory(tmp_path / "target") as folder:
            folder.chmod(rights)
            (folder / "deep").mkdir()
            for name in ("one", "deep/two"):
                (folder / name).touch(mode=0o600)
        for name in ("one", "deep/two"):
            assert (tmp_path / "target" / name).stat().st_mode & 0o777 == rights & 0o666


def test_a_directory_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with published_directory(target) as folder:
        (folder / "file").write_text("first")
        assert not target.exists()
    assert (target / "file").read_text() == "first"
    with published_directory(target) as folder:
        (folder / "other").write_text("second")
    assert names(target) == ["other"]
    with pytest.raises(KeyError), published_directory(target) as folder:  # noqa: PT012
        (folder / "third").touch()
        raise KeyError
    assert names(target) == ["other"]
    assert names(target.parent) == ["target"]
