"""Whether a stage is being computed, as gc, doctor and a run that ends see it: free, held, or left by the dead."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from orchestrator.distill import stage
from orchestrator.distill.context import RunContext
from orchestrator.run import claims, holder, lease
from orchestrator.run.claims import claim_of, lease_of, states
from orchestrator.run.compute import compute
from orchestrator.run.holder import dead, here, myself
from orchestrator.run.lease import Lease
from orchestrator.run.lock import Flock
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec

TTL = 4000.0
ELSEWHERE = {"machine": "another", "pid": 1, "birth": "1"}
Write = Callable[..., Path]


class Clock:
    """The observer's clock, which goes on while it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 1000.0, 0
        self.meanwhile: Callable[[], object] = lambda: None
        monkeypatch.setattr(lease.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(claims.time, "sleep", self._sleep)

    def _sleep(self, _: float) -> None:
        self.now += TTL / 8
        self.waits += 1
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def corpse() -> dict[str, Any]:
    """What a process of this machine that is dead by now wrote of itself."""
    code = "import json; from orchestrator.run.holder import myself; print(json.dumps(myself()))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a stage's directory with a lease in it, or in a mirror that its attempt names."""

    def make(name: str, by: dict[str, Any], *, mirror: bool = False, owner: str = "o", counter: int = 1) -> Path:
        folder, there = tmp_path / name, tmp_path / ("mirror" if mirror else "") / name
        there.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        told = {"owner": owner, "counter": counter, "ttl": TTL, "holder": by}
        (there / "lease.json").write_text(json.dumps(told))
        claim = {"kind": "lease", "url": f"file://{there}/lease.json", "ttl": TTL, "owner": "o"}
        (folder / "attempt.json").write_text(json.dumps({"number": 1, "claim": claim}))
        return folder

    return make


def test_a_process_is_known_to_be_dead_where_its_number_means_something(corpse: dict[str, Any]) -> None:
    assert here(corpse) and dead(corpse)
    assert here(myself()) and not dead(myself())
    assert dead({**myself(), "birth": "1"})  # its number is another's by now
    assert not dead({**corpse, "machine": "another"})  # nobody can tell
    for nothing in ({}, {"machine": holder.machine()}, {**corpse, "pid": "x"}):
        assert not dead(nothing)


def test_a_process_that_has_ended_and_was_not_looked_after_is_dead() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import json; from orchestrator.run.holder import myself; print(json.dumps(myself()))"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    told = json.loads(child.stdout.readline())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert dead(told)
    child.communicate()


@pytest.mark.parametrize("mirror", [False, True])
def test_holders_of_this_machine_are_told_at_once(
    write: Write, clock: Clock, corpse: dict[str, Any], mirror: bool
) -> None:
    living, gone = write("living", myself(), mirror=mirror), write("gone", corpse, mirror=mirror)
    assert states([living, gone]) == {living: "held", gone: "left"}
    assert clock.waits == 0


@pytest.mark.parametrize("mirror", [False, True])
def test_holders_of_other_machines_are_watched_all_at_once(write: Write, clock: Clock, mirror: bool) -> None:
    """One is renewed after some looks; two are silent for as long as a lease lives."""
    one, other, lively = (write(name, ELSEWHERE, mirror=mirror) for name in ("one", "other", "lively"))
    clock.meanwhile = lambda: clock.waits == 3 and write("lively", ELSEWHERE, mirror=mirror, counter=2)
    assert states([one, other, lively]) == {one: "left", other: "left", lively: "held"}
    assert clock.waits == 8


def test_a_lease_that_cannot_be_read_counts_as_held(
    write: Write, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: Lease) -> str:
        raise RuntimeError("an error of the file system's own")

    folder = write("far", ELSEWHERE, mirror=True)
    monkeypatch.setattr(Lease, "_read", unreachable)
    assert states([folder]) == {folder: "held"}


def test_what_works_in_another_directory_is_not_looked_for(write: Write, clock: Clock, tmp_path: Path) -> None:
    """Of a mirror: the lease of another store's attempt, and that of an attempt which has published here."""
    other, done = write("other", ELSEWHERE, mirror=True, owner="another"), write("done", ELSEWHERE, mirror=True)
    (done / "DONE.json").touch()
    older = tmp_path / "older"  # of a version whose attempts did not tell of their claims
    older.mkdir()
    (older / "attempt.json").write_text('{"number": 1}')
    nothing = tmp_path / "nothing"
    assert states([other, done, older, nothing]) == dict.fromkeys((other, done, older, nothing), "free")
    assert clock.waits == 0


def test_a_lock_is_looked_at_without_a_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    assert not Flock(lock).held_by_other() and not lock.exists()
    lock.touch()
    opened = os.open

    def read_only(path: Any, flags: int, *more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more)

    with FileLock(lock):
        monkeypatch.setattr(os, "open", read_only)
        assert Flock(lock).held_by_other()
        assert states([tmp_path]) == {tmp_path: "held"}
        monkeypatch.undo()
    assert not Flock(lock).held_by_other()
    monkeypatch.setattr(os, "open", lambda *_: opened("/proc/nobody/lock", 0))
    assert not Flock(lock).held_by_other()  # not for us to see


@pytest.fixture(params=["beside the stage", "in the mirror"])
def leased(request: pytest.FixtureRequest, text: tuple[TokensSpec, RunContext], tmp_path: Path) -> RunContext:
    """The context of a run that uses leases."""
    mirror = None if request.param == "beside the stage" else f"file://{tmp_path}/mirror"
    return dataclasses.replace(text[1], claims="lease", lease_seconds=TTL, mirror=mirror)


def test_a_stage_under_its_holder_is_not_removed_and_one_of_the_dead_is(
    text: tuple[TokensSpec, RunContext], leased: RunContext, corpse: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store, seen = text[0], Store(Path(leased.store)), []

    def run_stage(*_: Any) -> Any:
        seen.extend([store.locked(spec.key), store.remove(spec.key), store.attempt(spec.key)])
        raise ValueError("enough")

    monkeypatch.setattr(stage, "run_stage", run_stage)
    with pytest.raises(ValueError, match="enough"):
        compute(spec.model_dump_json(), leased)
    locked, removed, attempt = seen
    assert locked and not removed
    at = f"{leased.mirror or leased.store}/{spec.key[:2]}/{spec.key}/lease.json"
    assert attempt["claim"]["url"] == at and attempt["claim"]["ttl"] == TTL
    assert (attempt["pid"], attempt["host"]) == (os.getpid(), platform.node())
    left = claim_of(leased, spec.key)
    assert isinstance(left, Lease) and not left.held_by_other()  # it let go
    told = {"owner": attempt["claim"]["owner"], "counter": 1, "ttl": TTL, "holder": corpse}
    left._files.pipe_file(left._path, json.dumps(told).encode())  # as after kill -9
    assert store.states([spec.key]) == {spec.key: "left"}
    assert not store.locked(spec.key)
    assert store.remove(spec.key)
    assert store.all_keys() == []


def test_a_lease_holder_keeps_the_lock_where_there_is_one(
    text: tuple[TokensSpec, RunContext], leased: RunContext
) -> None:
    spec = text[0]
    claim = claim_of(leased, spec.key)
    folder = Store(Path(leased.store)).folder(spec.key)
    folder.mkdir(parents=True)
    assert claim.acquire()
    assert Flock(folder / "lock").held_by_other()
    claim.release()
    assert not Flock(folder / "lock").held_by_other()


def test_a_dead_holder_of_this_machine_is_followed_at_once(
    write: Write, clock: Clock, corpse: dict[str, Any], tmp_path: Path
) -> None:
    folder = write("gone", corpse)
    observer = Lease(str(folder / "lease.json"), TTL)
    assert not observer.held_by_other() and observer.expired is not None
    following = Lease(str(folder / "lease.json"), TTL, observer.expired)
    assert following.acquire()
    following.release()


def test_only_what_was_seen_to_expire_is_cleared(write: Write, clock: Clock, corpse: dict[str, Any]) -> None:
    folder = write("gone", corpse)
    observer = lease_of(folder)
    assert observer is not None and observer.look() == "left"
    write("gone", myself(), counter=2)  # somebody took it over meanwhile
    observer.clear()
    assert (folder / "lease.json").exists()
    write("gone", corpse)
    observer.clear()
    assert not (folder / "lease.json").exists()
    Lease(str(folder / "lease.json"), TTL).clear()  # nothing was looked at


@pytest.mark.parametrize("torn", ["", "{", "3", "[]", '{"ttl": "x"}', '{"ttl": 1, "holder": 5}'])
def test_a_torn_lease_is_watched_like_any(clock: Clock, tmp_path: Path, torn: str) -> None:
    (tmp_path / "lease.json").write_text(torn)
    assert states([tmp_path]) == {tmp_path: "left"}
    assert clock.waits > 0
