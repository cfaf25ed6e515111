"""One holder at a time, by lock or by lease; a dead holder is followed, a live one not; who lost publishes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from orchestrator.distill import stage
from orchestrator.distill.context import RunContext
from orchestrator.run import lease as module
from orchestrator.run.claims import Claim, claim_of
from orchestrator.run.compute import ClaimLost, StageClaimed, compute
from orchestrator.run.lease import EXIT_LOST, Lease
from orchestrator.run.lock import Flock
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec

TTL = 4000.0  # its holder renews it every quarter of that: never while a test runs, unless the test says so
Make = Callable[..., Any]
_names = itertools.count()


class Clock:
    """The observer's monotonic clock, moved by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", lambda _: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=["file", "memory"])
def lease(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes another process's view of the same lease."""
    root = f"file://{tmp_path}" if request.param == "file" else f"memory://claims-{next(_names)}"

    def make(expired: str | None = None, **more: Any) -> Lease:
        return Lease(f"{root}/ab/key/lease.json", TTL, expired, **more)

    return make


@pytest.fixture(params=["flock", "file", "memory"])
def claim(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Callable[[], Claim]:
    if request.param == "flock":
        return lambda: Flock(tmp_path / "lock")
    root = f"file://{tmp_path}" if request.param == "file" else f"memory://claims-{next(_names)}"
    return lambda: Lease(f"{root}/lease.json", TTL)


def test_a_claim_has_one_holder_at_a_time(claim: Callable[[], Claim]) -> None:
    holder, rival, observer = claim(), claim(), claim()
    assert not observer.held_by_other()
    assert holder.acquire()
    assert observer.held_by_other()
    assert not rival.acquire()
    assert not holder.lost()
    holder.release()
    assert not observer.held_by_other()
    following = claim()
    assert following.acquire()
    following.release()


def beat(holder: Lease) -> None:
    """One renewal, as the holder's thread does it."""
    with holder._mutex:
        holder._renew()


def test_a_lease_that_is_renewed_never_expires(lease: Make, clock: Clock) -> None:
    holder, observer = lease(), lease()
    assert holder.acquire()
    for _ in range(6):
        assert observer.held_by_other()
        clock.now += 0.9 * TTL
        beat(holder)
    assert observer.held_by_other()
    assert not holder.lost()
    holder.release()


def test_a_lease_without_a_sign_of_life_is_taken_over_by_who_saw_it_expire(lease: Make, clock: Clock) -> None:
    dead, observer, newcomer = lease(), lease(), lease()
    assert dead.acquire()
    clock.now += 10 * TTL  # nobody looked: however old it is, an observer gives it its time
    assert observer.held_by_other()
    clock.now += TTL
    assert newcomer.held_by_other()
    assert not observer.held_by_other()
    assert observer.expired is not None
    assert not lease().acquire(), "who did not see it expire must not take it"
    following = lease(observer.expired)
    assert following.acquire()
    assert not lease(observer.expired).acquire(), "what was seen is no longer there"
    assert dead.lost() and not following.lost()
    dead.release()
    assert observer.held_by_other(), "who lost it must not remove it"
    following.release()


def test_a_torn_lease_expires_too(lease: Make, clock: Clock) -> None:
    observer = lease()
    files, path = observer._files, observer._path
    files.makedirs(files._parent(path), exist_ok=True)
    files.pipe_file(path, b"")
    assert observer.held_by_other()
    clock.now += TTL
    assert not observer.held_by_other()
    following = lease(observer.expired)
    assert following.acquire()
    following.release()


def test_clocks_of_the_wall_do_not_matter(lease: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    holder, observer = lease(), lease()
    assert holder.acquire()
    assert observer.held_by_other()
    monkeypatch.setattr(module.time, "time", lambda: 1e12)
    assert observer.held_by_other()
    holder.release()


def test_a_holder_that_could_not_renew_in_time_has_lost(lease: Make, clock: Clock) -> None:
    holder = lease()
    assert holder.acquire()
    clock.now += TTL
    assert holder.lost()
    holder.release()


def test_a_file_system_that_does_not_answer_is_no_loss_until_the_time_is_over(
    lease: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = lease()
    assert holder.acquire()

    def unreachable() -> str:
        raise RuntimeError("an error of the file system's own")

    monkeypatch.setattr(holder, "_read", unreachable)
    assert not holder.lost()
    clock.now += TTL
    assert holder.lost()
    holder.release()


def test_a_lease_removed_by_mistake_is_written_again(lease: Make, clock: Clock) -> None:
    holder, observer = lease(), lease()
    assert holder.acquire()
    holder._files.rm_file(holder._path)
    assert not observer.held_by_other()
    beat(holder)
    assert observer.held_by_other() and not holder.lost()
    holder.release()


def test_the_holders_thread_renews_and_notices_a_loss(tmp_path: Path) -> None:
    gone = threading.Event()
    holder = Lease(f"file://{tmp_path}/lease.json", 0.2, on_lost=gone.set)
    assert holder.acquire()
    first = (tmp_path / "lease.json").read_text()
    while (tmp_path / "lease.json").read_text() in ("", first):
        threading.Event().wait(0.01)  # the test's time limit ends this where nothing is renewed
    with holder._mutex:  # not between the holder's look and its writing
        (tmp_path / "lease.json").write_text("another's")
    assert gone.wait(250)
    assert holder.lost()
    holder.release()
    assert (tmp_path / "lease.json").read_text() == "another's"


def test_a_holder_whose_file_system_fails_goes_on_until_its_time_is_over(
    lease: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread renews four times in the time to live; the third of these tries comes when that is over."""
    waits: list[float] = []
    lost: list[int] = []

    class Over:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) == 3:
                clock.now += TTL
            return len(waits) > 4

        def set(self) -> None: ...

    holder = lease(on_lost=lambda: lost.append(len(waits)))
    holder._renewed = clock.now

    def unreachable() -> str:
        raise RuntimeError("an error of the file system's own")

    monkeypatch.setattr(holder, "_over", Over())
    monkeypatch.setattr(holder, "_read", unreachable)
    holder._beat()
    assert waits == [TTL / 4] * 3
    assert lost == [3]


def test_an_error_of_who_lost_its_lease_is_no_failure_of_the_stage(
    text: tuple[TokensSpec, RunContext], leased: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = text[0]

    def run_stage(*_: Any) -> Any:
        at = leased.mirror or f"file://{leased.store}"
        with fsspec.open(f"{at}/{spec.key[:2]}/{spec.key}/lease.json", "wb") as stream:
            stream.write(b"another's")
        raise ValueError("what the other wrote was in the way")

    monkeypatch.setattr(stage, "run_stage", run_stage)
    with pytest.raises(ClaimLost, match="was taken over by another process"):
        compute(spec.model_dump_json(), leased)
    assert Store(Path(leased.store)).failure(spec.key) is None


def test_a_process_that_lost_its_lease_ends_at_once() -> None:
    code = "from orchestrator.run.lease import end_process; end_process(); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (EXIT_LOST, "")
    assert "was lost" in done.stderr


@pytest.fixture(params=["beside the stage", "in the mirror"])
def leased(request: pytest.FixtureRequest, text: tuple[TokensSpec, RunContext], tmp_path: Path) -> RunContext:
    """The context of a run that uses leases."""
    mirror = None if request.param == "beside the stage" else f"file://{tmp_path}/mirror"
    return dataclasses.replace(text[1], claims="lease", lease_seconds=TTL, mirror=mirror)


def test_a_leased_stage_is_computed_by_its_holder_only(text: tuple[TokensSpec, RunContext], leased: RunContext) -> None:
    spec = text[0]
    other = claim_of(leased, spec.key)
    assert other.acquire()
    with pytest.raises(StageClaimed):
        compute(spec.model_dump_json(), leased)
    other.release()
    compute(spec.model_dump_json(), leased)
    assert Store(Path(leased.store)).finished(spec.key)
    assert not claim_of(leased, spec.key).held_by_other()


def test_who_lost_its_lease_publishes_nothing(
    text: tuple[TokensSpec, RunContext], leased: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, real = text[0], stage.run_stage

    def run_stage(*given: Any) -> Any:
        result = real(*given)
        at = leased.mirror or f"file://{leased.store}"
        with fsspec.open(f"{at}/{spec.key[:2]}/{spec.key}/lease.json", "wb") as stream:
            stream.write(b"another's")
        return result

    monkeypatch.setattr(stage, "run_stage", run_stage)
    with pytest.raises(ClaimLost):
        compute(spec.model_dump_json(), leased)
    found = Store(Path(leased.store))
    assert not found.finished(spec.key)
    assert found.failure(spec.key) is None, "it is no failure of the stage"


def test_a_lease_keeps_its_stage_from_being_removed(text: tuple[TokensSpec, RunContext]) -> None:
    spec, context = text
    compute(spec.model_dump_json(), context)
    held = Lease(str(Store(Path(context.store)).folder(spec.key) / "lease.json"), TTL)
    assert held.acquire()
    assert Store(Path(context.store)).locked(spec.key)
    assert Store(Path(context.store)).remove(spec.key) == 0
    held.release()
    assert Store(Path(context.store)).remove(spec.key) > 0
