"""The store survives: full and read-only disks, damage and deletion under a running stage, clocks that jump."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from orchestrator.distill import stage as stage_module
from orchestrator.distill.context import RunContext
from orchestrator.distill.training.loop import Stopped
from orchestrator.run import compute as compute_module
from orchestrator.run.compute import Disturbed, compute
from orchestrator.run.store import Store, StoreError
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec

Small = tuple[TokensSpec, RunContext, Store]


def small(tmp_path: Path, store: Path) -> Small:
    """The tokens of a small file, and a store to put them into."""
    (tmp_path / "text.txt").write_text("a long convolution is a convolution that is long\n" * 4000)
    identity = SourceIdentity(source="text", fingerprint="f")
    spec = TokensSpec(
        train=identity, validation=identity, validation_share=None, sequence_length=16, vocabulary=300, teacher=None
    )
    context = RunContext(store=str(store), locations={"f": Location(files=(str(tmp_path / "text.txt"),))})
    return spec, context, Store(store)


@pytest.fixture
def text(tmp_path: Path) -> Small:
    return small(tmp_path, tmp_path / "store")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts, or mounts anew, a small file system in memory with the given options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if place.is_mount() else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *again, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small file system for this test: {done.stderr.strip()}")
        return place

    yield mounted
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Child(TokensSpec):
    """Tokens that stand on other tokens."""

    parent: str = ""

    @property
    def parents(self) -> dict[str, str]:
        return {"parent": self.parent}


@pytest.fixture
def family(text: Small, monkeypatch: pytest.MonkeyPatch) -> tuple[Small, TokensSpec]:
    """A finished stage, and a child of it whose stage function reads its parent's tokens."""
    spec, context, store = text
    compute(spec.model_dump_json(), context)
    child = Child.model_construct(**dict(spec), parent=spec.key)
    monkeypatch.setattr(compute_module, "spec_from_json", lambda _: child)
    monkeypatch.setattr(
        stage_module, "run_stage", lambda _, place: {"bytes": len((place.inputs["parent"] / "train.bin").read_bytes())}
    )
    return (spec, context, store), child


def test_a_finished_stage_tells_the_peak_of_its_process(text: Small) -> None:
    spec, context, store = text
    compute(spec.model_dump_json(), context)
    here = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    assert 50 < store.done(spec.key)["peak_mb"] <= int(here) / 1024


def test_a_full_disk_fails_the_stage_clearly_and_room_lets_it_go_on(
    tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    spec, context, store = small(tmp_path, mount("size=160k") / "store")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"no space left on .*store: free \d+ MB, then run the same command"):
            compute(spec.model_dump_json(), context)
        assert not store.finished(spec.key)
        assert not (store.folder(spec.key) / "out").exists()
    mount("size=20m")
    assert compute(spec.model_dump_json(), context)["train_tokens"] > 1000
    assert store.failure(spec.key) is None


def test_a_disk_that_fills_up_leaves_what_is_published(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    spec, context, store = small(tmp_path, mount("size=20m") / "store")
    compute(spec.model_dump_json(), context)
    with pytest.raises(OSError, match="No space"):
        (tmp_path / "disk" / "ballast").write_bytes(bytes(2**25))
    other = TokensSpec.model_validate({**spec.model_dump(), "vocabulary": 299})
    with pytest.raises(StoreError, match="no space left on"):
        compute(other.model_dump_json(), context)
    assert store.withdraw_damaged([spec.key]) == []
    assert store.result(spec.key)["train_tokens"] > 1000


def test_a_store_that_becomes_read_only_says_so(tmp_path: Path, mount: Callable[[str], Path]) -> None:
    spec, context, store = small(tmp_path, mount("size=20m") / "store")
    store.folder(spec.key).mkdir(parents=True)
    mount("size=20m,ro")
    with pytest.raises(StoreError, match="cannot be written: give another --home"):
        compute(spec.model_dump_json(), context)
    mount("size=20m,rw")
    assert compute(spec.model_dump_json(), context)


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), ValueError("I/O error (os error 30)")])
def test_a_disk_that_turns_read_only_inside_a_stage_is_named(
    text: Small, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    spec, context, store = text

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(stage_module, "run_stage", fail)
    with pytest.raises(StoreError, match="has become read-only: make it writable, then run the same command"):
        compute(spec.model_dump_json(), context)
    failure = store.failure(spec.key)
    assert failure is not None and failure["error"].startswith("StoreError: the store")


def test_every_flipped_bit_of_a_manifest_is_found_and_the_stage_computed_again(text: Small) -> None:
    spec, context, store = text
    result = compute(spec.model_dump_json(), context)
    done = store.folder(spec.key) / "DONE.json"
    whole = done.read_bytes()
    manifest = store.done(spec.key)
    for position in range(0, len(whole), 7):
        done.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with contextlib.suppress(ValueError):
            read = store.done(spec.key)  # only where the digest's own name was hit, and lost
            assert {name: read[name] for name in manifest} == manifest
    done.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        store.result(spec.key)
    [said] = store.withdraw_damaged([spec.key])
    assert "DONE.json is damaged or gone: the stage is computed again" in said
    assert compute(spec.model_dump_json(), context) == result


def test_a_checkpoint_without_an_attempt_is_of_a_deleted_stage_and_has_no_history(
    text: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, context, store = text
    seen, real = [], stage_module.run_stage

    def look(spec: Any, place: Any) -> Any:
        seen.append(sorted(path.name for path in place.work.iterdir()))
        return real(spec, place)

    monkeypatch.setattr(stage_module, "run_stage", look)
    for attempt in (None, {"number": 1}):
        shutil.rmtree(store.folder(spec.key), ignore_errors=True)
        (store.folder(spec.key) / "work" / "step-000050").mkdir(parents=True)
        if attempt is not None:
            (store.folder(spec.key) / "attempt.json").write_text(json.dumps(attempt))
        compute(spec.model_dump_json(), context)
    assert seen == [[], ["step-000050"]]


def test_what_a_death_right_after_publishing_left_is_cleared_up(text: Small) -> None:
    spec, context, store = text
    compute(spec.model_dump_json(), context)
    folder = store.folder(spec.key)
    (folder / "work" / "step-000010").mkdir(parents=True)
    (folder / "out-12345678").mkdir()
    other = FileLock(folder / "lock")
    with other:  # somebody is at it
        store.tidy([spec.key])
    assert (folder / "work").exists()
    store.tidy([spec.key, "0" * 64])
    assert {path.name for path in folder.iterdir()} >= {"DONE.json", "artefacts", "spec.json"}
    assert not [path for path in folder.iterdir() if path.name.startswith(("work", "out-"))]
    assert store.damaged(spec.key) is None


def test_a_manifest_without_a_digest_of_its_own_is_taken(text: Small) -> None:
    spec, context, store = text
    compute(spec.model_dump_json(), context)
    done = store.folder(spec.key) / "DONE.json"
    manifest = json.loads(done.read_text())
    del manifest["sha256"]
    done.write_text(json.dumps(manifest))
    assert store.withdraw_damaged([spec.key]) == []


@pytest.mark.parametrize(
    "harm",
    [*(pytest.param(harm, marks=pytest.mark.slow) for harm in ("flip", "delete")), "stage deleted", "manifest torn"],
)
def test_a_child_of_a_damaged_stage_waits_for_it_and_is_no_failure(
    family: tuple[Small, TokensSpec], harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec, context, store), child = family
    victim, before = store.artefacts(spec.key) / "train.bin", store.said(0)[1]
    match harm:
        case "flip":
            victim.write_bytes(bytes([victim.read_bytes()[0] ^ 4]) + victim.read_bytes()[1:])
        case "delete":
            victim.unlink()
        case "stage deleted":
            shutil.rmtree(store.folder(spec.key))
        case "manifest torn":
            (store.folder(spec.key) / "DONE.json").write_text("{")
    with pytest.raises(Disturbed, match=f"lacks tokens-{spec.key[:8]}|lacks "):
        compute("", context)
    assert store.failure(child.key) is None and not store.finished(spec.key)
    said = store.said(before)[0]
    assert [line.split(":")[1].split(" is ")[0].strip() for line in said] == {
        "flip": ["train.bin"], "delete": ["train.bin"], "stage deleted": [], "manifest torn": ["DONE.json"]
    }[harm]  # fmt: skip
    monkeypatch.undo()
    compute(spec.model_dump_json(), context)


def test_an_input_that_is_damaged_while_it_is_read_is_no_failure_of_the_reader(
    family: tuple[Small, TokensSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec, context, store), child = family

    def read(_: Any, place: Any) -> None:
        (place.inputs["parent"] / "train.bin").unlink()
        (place.inputs["parent"] / "train.bin").read_bytes()

    monkeypatch.setattr(stage_module, "run_stage", read)
    with pytest.raises(Disturbed):
        compute("", context)
    assert store.failure(child.key) is None and not store.finished(spec.key)


@pytest.mark.parametrize("then", ["writes on", "fails"])
def test_a_stage_whose_directory_is_deleted_under_it_is_disturbed_and_publishes_nothing(
    text: Small, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    spec, context, store = text

    def deleted(_: Any, place: Any) -> dict[str, Any]:
        shutil.rmtree(place.journal)
        if then == "writes on":
            place.out.mkdir(parents=True)
        (place.out / "half.bin").write_bytes(b"half")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "run_stage", deleted)
        with pytest.raises(Disturbed, match="was deleted under it"):
            compute(spec.model_dump_json(), context)
    assert not store.finished(spec.key) and store.failure(spec.key) is None
    assert compute(spec.model_dump_json(), context)


def test_what_a_dead_process_left_does_not_stand_in_the_way(text: Small) -> None:
    spec, context, store = text
    folder = store.folder(spec.key)
    (folder / "out" / "tokenizer").mkdir(parents=True)
    (folder / "out" / "train.bin").write_bytes(b"half")
    (folder / "lock").write_text("")
    (folder / "attempt.json").write_text('{"pid": 999999999, "host": "gone", "started": 0')
    (folder / "failure.json").write_text('{"error": "of yesterday", "traceback": ""}')
    (folder / ".DONE.json.0badcafe.tmp").write_text("{")
    assert store.attempt(spec.key) is None and not store.locked(spec.key)
    compute(spec.model_dump_json(), context)
    assert sorted(store.done(spec.key)["files"]) == [
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokens.json", "train.bin", "valid.bin",
    ]  # fmt: skip
    assert store.failure(spec.key) is None


def test_a_stage_of_a_run_that_was_asked_to_stop_does_not_begin(text: Small, tmp_path: Path) -> None:
    spec, context, store = text
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        compute(spec.model_dump_json(), replace(context, stop=str(tmp_path / "stop")))
    assert store.attempt(spec.key) is None and store.failure(spec.key) is None


def test_a_clock_that_jumps_changes_nothing(text: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, context, store = text
    times = iter([2e9, 1e9, 5e8, 0.0] * 100)
    monkeypatch.setattr(time, "time", lambda: next(times))
    compute(spec.model_dump_json(), context)
    assert store.done(spec.key)["seconds"] >= 0
    assert store.withdraw_damaged([spec.key]) == []


def test_what_is_said_is_read_once_and_a_half_written_line_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.said(0) == ([], 0)
    log = tmp_path / "said.log"
    log.write_text("one\ntw")
    lines, at = store.said(0)
    assert (lines, store.said(at)) == (["one"], ([], at))
    log.write_text("one\ntwo\n")
    assert store.said(at)[0] == ["two"]


def test_a_lock_held_by_the_living_is_respected_while_its_stage_is_deleted(text: Small) -> None:
    spec, context, store = text
    store.folder(spec.key).mkdir(parents=True)
    with FileLock(store.folder(spec.key) / "lock"):
        shutil.rmtree(store.folder(spec.key))
        assert not store.locked(spec.key)
        assert compute(spec.model_dump_json(), context)
    assert store.finished(spec.key)
