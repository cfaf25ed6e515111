"""The store: what is published is whole, damage is found, nobody waits with a core, nothing needed is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from orchestrator.distill import stage as stage_module
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.data import DataError
from orchestrator.run.compute import StageClaimed, compute
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec


def test_a_stage_is_computed_once(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    first = compute(spec.model_dump_json(), context)
    store = Store(Path(context.store))
    stamp = (store.folder(spec.key) / "DONE.json").stat().st_mtime_ns
    assert compute(spec.model_dump_json(), context) == first
    assert (store.folder(spec.key) / "DONE.json").stat().st_mtime_ns == stamp
    assert not (store.folder(spec.key) / "work").exists()
    assert store.done(spec.key)["core_seconds"] > 0


def test_whoever_may_read_the_store_may_read_weights(
    text: tuple[TokensSpec, RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors makes its files for their user alone."""
    spec, context = text

    def save(_: object, place: Workplace) -> dict[str, int]:
        save_file({"weight": torch.zeros(1)}, place.out / "model.safetensors")
        return {}

    monkeypatch.setattr(stage_module, "run_stage", save)
    compute(spec.model_dump_json(), context)
    artefacts = Store(Path(context.store)).artefacts(spec.key)
    rights = (artefacts / "model.safetensors").stat().st_mode & 0o777
    assert rights == artefacts.stat().st_mode & 0o666


def test_a_failed_stage_says_why_and_is_not_done(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    poor = spec.model_copy(update={"sequence_length": 10**6})
    poor = TokensSpec.model_validate(poor.model_dump())
    with pytest.raises(DataError, match="less than one sequence"):
        compute(poor.model_dump_json(), context)
    store = Store(Path(context.store))
    told = store.failure(poor.key)
    assert not store.finished(poor.key)
    assert told is not None and told["error"].startswith("DataError: the train text has")


@pytest.mark.parametrize("harm", ["flip", "delete", "tear"])
def test_damage_is_found_and_the_stage_computed_again(text: tuple[TokensSpec, RunContext], harm: str) -> None:
    spec, context = text
    compute(spec.model_dump_json(), context)
    store = Store(Path(context.store))
    victim = store.artefacts(spec.key) / "train.bin"
    whole = victim.read_bytes()
    if harm == "delete":
        victim.unlink()
    else:
        victim.write_bytes(whole[:-1] if harm == "tear" else bytes([whole[0] ^ 1]) + whole[1:])
    [said] = store.withdraw_damaged([spec.key, "absent"])
    assert "train.bin is damaged or gone" in said
    assert not store.finished(spec.key)
    torn = store.folder(spec.key) / ".DONE.json.0123abcd.tmp"  # of a process that died while it wrote
    torn.touch()
    compute(spec.model_dump_json(), context)
    assert victim.read_bytes() == whole
    assert not torn.exists()
    attempt = store.attempt(spec.key)
    assert attempt is not None and attempt["number"] == 2
    assert store.withdraw_damaged([spec.key]) == []


def test_a_stage_that_another_computes_is_not_waited_for(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    store = Store(Path(context.store))
    store.folder(spec.key).mkdir(parents=True)
    assert not store.locked(spec.key)
    with FileLock(store.folder(spec.key) / "lock"):
        assert store.locked(spec.key)
        with pytest.raises(StageClaimed):
            compute(spec.model_dump_json(), context)
    assert not store.locked(spec.key)


def test_removal_leaves_a_stage_that_is_being_computed(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    compute(spec.model_dump_json(), context)
    store = Store(Path(context.store))
    with FileLock(store.folder(spec.key) / "lock"):
        assert not store.remove(spec.key)
    assert store.all_keys() == [spec.key]
    assert store.remove(spec.key)
    assert store.all_keys() == []


def test_a_store_of_another_layout_is_refused(tmp_path: Path) -> None:
    Store(tmp_path)
    (tmp_path / "VERSION").write_text("99")
    with pytest.raises(ValueError, match="layout '99', this program writes '1'"):
        Store(tmp_path)
    (tmp_path / "VERSION").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="layout '\ufffd', this program writes '1'"):
        Store(tmp_path)


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        Store(tmp_path / "file" / "store")


def test_what_was_dropped_keeps_its_result_until_somebody_needs_its_files(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    result = compute(spec.model_dump_json(), context)
    store = Store(Path(context.store))
    names = sorted(path.name for path in store.artefacts(spec.key).iterdir() if path.is_file())
    before = store.disk_bytes()
    freed = store.drop(spec.key)
    assert freed > 0 and store.disk_bytes() < before - freed // 2
    assert store.finished(spec.key) and store.result(spec.key) == result
    assert set(names) <= set(store.dropped(spec.key)) and store.damaged(spec.key) is None
    assert store.withdraw_damaged([spec.key]) == []
    assert store.drop(spec.key) == 0  # nothing is left
    [said] = store.withdraw_damaged([spec.key], needed=True)
    assert said.endswith("its weights were dropped and are needed: the stage is computed again")
    assert compute(spec.model_dump_json(), context) == result
    assert store.dropped(spec.key) == () and (store.artefacts(spec.key) / "train.bin").is_file()


def test_nothing_is_dropped_of_a_stage_that_is_being_computed(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    compute(spec.model_dump_json(), context)
    store = Store(Path(context.store))
    with FileLock(store.folder(spec.key) / "lock", thread_local=False):
        assert store.drop(spec.key) == 0
    assert store.drop("absent") == 0
    assert store.damaged(spec.key) is None and store.dropped(spec.key) == ()
