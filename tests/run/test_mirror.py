"""Stages are shared through a mirror: whole or not at all, and computed once for all stores that use it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from orchestrator.distill.context import RunContext
from orchestrator.files import sealed
from orchestrator.run.compute import compute
from orchestrator.run.mirror import Mirror, MirrorError
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec

_names = itertools.count()
Shared = tuple[TokensSpec, RunContext, Store, Store, Mirror]


@pytest.fixture(params=["file", "memory"])
def shared(request: pytest.FixtureRequest, text: tuple[TokensSpec, RunContext], tmp_path: Path) -> Shared:
    """A stage that one machine finished and uploaded, another machine's empty store, and the mirror."""
    spec, context = text
    url = f"file://{tmp_path}/mirror" if request.param == "file" else f"memory://mirror-{next(_names)}"
    compute(spec.model_dump_json(), dataclasses.replace(context, mirror=url))
    return spec, context, Store(Path(context.store)), Store(tmp_path / "elsewhere"), Mirror(url)


def files(store: Store, key: str) -> dict[str, bytes]:
    root = store.artefacts(key)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_finished_stage_is_fetched_as_it_is(shared: Shared) -> None:
    spec, _, here, there, mirror = shared
    assert mirror.finished(spec.key)
    assert mirror.fetch(there, spec.key)
    assert files(there, spec.key) == files(here, spec.key)
    assert there.done(spec.key) == here.done(spec.key)
    assert there.withdraw_damaged([spec.key]) == []
    assert there.all_keys() == [spec.key]
    assert mirror.fetch(there, spec.key), "what is here already needs no fetching"
    assert [path.name for path in there.folder(spec.key).glob("out-*")] == []


def test_the_specification_and_the_journal_are_brought_too_and_no_attempt(shared: Shared) -> None:
    spec, _, here, there, mirror = shared
    (here.folder(spec.key) / "journal.jsonl").write_text('{"step": 1}\n')
    other = Mirror(f"{mirror.url}-other")
    other.upload(here, spec.key)
    assert other.fetch(there, spec.key)
    for name in ("spec.json", "journal.jsonl", "DONE.json"):
        assert (there.folder(spec.key) / name).read_bytes() == (here.folder(spec.key) / name).read_bytes()
    assert there.attempt(spec.key) is None and here.attempt(spec.key) is not None
    assert there.begun(spec.key) and not there.begun("0" * 64)


def test_what_is_not_there_is_not_fetched(shared: Shared) -> None:
    *_, there, mirror = shared
    assert not mirror.fetch(there, "0" * 64)
    assert not there.finished("0" * 64)


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_a_damaged_copy_is_withdrawn_and_uploaded_again(shared: Shared, harm: str) -> None:
    spec, context, here, there, mirror = shared
    at = mirror._at(spec.key, "artefacts/train.bin")
    if harm == "flip":
        whole = mirror._files.cat_file(at)
        mirror._files.pipe_file(at, bytes([whole[0] ^ 1]) + whole[1:])
    else:
        mirror._files.rm_file(at)
    assert not mirror.fetch(there, spec.key)
    assert not there.finished(spec.key) and not mirror.finished(spec.key)
    compute(spec.model_dump_json(), dataclasses.replace(context, store=str(there.root), mirror=mirror.url))
    assert mirror.finished(spec.key)
    assert files(there, spec.key) == files(here, spec.key)


def altered(mirror: Mirror, key: str, change: dict[str, Any], seal: bool) -> None:
    """Let the mirror's manifest of a stage say something else, with a digest that fits or the one that it had."""
    at = mirror._at(key, "DONE.json")
    manifest = {**json.loads(mirror._files.cat_file(at)), **change}
    if seal:
        del manifest["sha256"]
        manifest = sealed(manifest)
    mirror._files.pipe_file(at, json.dumps(manifest).encode())


@pytest.mark.parametrize("name", ["../../../escaped", "/{tmp}/escaped", "a/../../../escaped", "", ".", "a//b", "./a"])
def test_a_name_that_leads_out_of_the_stage_is_not_followed(shared: Shared, tmp_path: Path, name: str) -> None:
    spec, _, _, there, mirror = shared
    name = name.replace("/{tmp}", str(tmp_path))
    mirror._files.pipe_file(f"{mirror._at(spec.key)}/escaped", b"evil")
    with contextlib.suppress(OSError):  # where the name leads to in the mirror
        mirror._files.pipe_file(mirror._at(spec.key, f"artefacts/{name}"), b"evil")
    altered(mirror, spec.key, {"files": {name: hashlib.sha256(b"evil").hexdigest()}}, seal=True)
    before = {path for path in tmp_path.rglob("*") if "mirror" not in path.parts}
    assert not mirror.finished(spec.key)
    assert not mirror.fetch(there, spec.key)
    assert {path for path in tmp_path.rglob("*") if "mirror" not in path.parts} == before
    assert not there.finished(spec.key)


@pytest.mark.parametrize(
    "change",
    [
        {"result": {"train_tokens": 1}},
        {"files": {}},
        {"seconds": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_without_the_digest_that_it_states_does_not_count(shared: Shared, change: dict[str, Any]) -> None:
    spec, context, _, there, mirror = shared
    altered(mirror, spec.key, change, seal=False)
    assert not mirror.finished(spec.key) and not mirror.fetch(there, spec.key)
    compute(spec.model_dump_json(), dataclasses.replace(context, mirror=mirror.url))  # finished here: sent once more
    assert mirror.fetch(there, spec.key)


@pytest.mark.parametrize(
    "said", ["[]", "3", '"a"', "null", '{"files": []}', '{"key": "KEY", "result": {}, "files": []}']
)
def test_what_is_no_manifest_does_not_count(shared: Shared, said: str) -> None:
    spec, *_, there, mirror = shared
    mirror._files.pipe_file(mirror._at(spec.key, "DONE.json"), said.replace("KEY", spec.key).encode())
    assert not mirror.finished(spec.key) and not mirror.fetch(there, spec.key)


@pytest.mark.parametrize("harm", ["another's", "none", "torn"])
def test_a_stage_with_another_specification_is_withdrawn(shared: Shared, harm: str) -> None:
    spec, _, here, there, mirror = shared
    at = mirror._at(spec.key, "spec.json")
    other = spec.model_copy(update={"vocabulary": 301}).model_dump_json()
    mirror._files.rm_file(at)
    if harm != "none":
        mirror._files.pipe_file(at, (other if harm == "another's" else "{").encode())
    assert not mirror.fetch(there, spec.key)
    assert not mirror.finished(spec.key) and not there.finished(spec.key)
    assert not (there.folder(spec.key) / "spec.json").exists()
    mirror.upload(here, spec.key)
    assert mirror.fetch(there, spec.key)


def test_a_torn_upload_does_not_count_and_is_finished_by_the_next(shared: Shared) -> None:
    spec, _, here, there, mirror = shared
    mirror._files.rm_file(mirror._at(spec.key, "DONE.json"))
    assert not mirror.fetch(there, spec.key)
    mirror._files.pipe_file(mirror._at(spec.key, "DONE.json"), b'{"key": "')
    assert not mirror.finished(spec.key)
    assert mirror.upload_all(here, [spec.key, "0" * 64]) == []
    assert mirror.fetch(there, spec.key)


def test_the_first_writer_wins(shared: Shared) -> None:
    spec, _, here, _, mirror = shared
    first = mirror._files.cat_file(mirror._at(spec.key, "DONE.json"))
    done = here.folder(spec.key) / "DONE.json"
    done.write_text(done.read_text().replace('"finished"', '"finished_again"'))
    mirror.upload(here, spec.key)
    assert mirror._files.cat_file(mirror._at(spec.key, "DONE.json")) == first


def test_a_mirror_that_fails_costs_no_stage_and_is_told(text: tuple[TokensSpec, RunContext], tmp_path: Path) -> None:
    spec, context = text
    (tmp_path / "mirror").write_text("a file where a directory is needed")
    url = f"file://{tmp_path}/mirror"
    compute(spec.model_dump_json(), dataclasses.replace(context, mirror=url))
    [said] = Mirror(url).upload_all(Store(Path(context.store)), [spec.key])
    assert said.startswith(f"stage {spec.key[:16]} could not be copied to the mirror {url}: ")


def test_a_url_that_no_file_system_knows_is_told() -> None:
    with pytest.raises(MirrorError, match=r"--mirror nowhere://x: Protocol not known: nowhere: give a URL like file"):
        Mirror("nowhere://x")
    assert fsspec.available_protocols()


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://bucket/stages", "Install s3fs to access S3: pip install 'layerswap[s3]'"),
        ("gs://bucket/stages", f"Storage: pip install it in the version of fsspec, {fsspec.__version__}"),
    ],
)
def test_a_file_system_whose_package_is_not_there_is_told_with_its_package(
    url: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MirrorError, match=f"^--mirror {url}: .*{re.escape(remedy)}$"):
        Mirror(url)
