"""What the broker does when something breaks: processes die, mirrors lie or are silent, a lease is left."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from orchestrator.distill.context import RunContext
from orchestrator.files import write_json
from orchestrator.run import broker as module
from orchestrator.run.broker import StageFailed
from orchestrator.run.compute import Disturbed
from orchestrator.run.holder import myself
from orchestrator.run.mirror import Mirror
from orchestrator.run.store import Store
from tests.run.fakes import EVALUATIONS, TEACHERS, TOKENS, Fake, publish


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(store=str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


def test_what_the_mirror_has_is_fetched_without_its_parents(context: RunContext, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mirror"
    other = Store(tmp_path / "other")
    publish(other, EVALUATIONS[0].key)
    Mirror(url).upload(other, EVALUATIONS[0].key)

    async def run() -> None:
        broker = Fake(dataclasses.replace(context, mirror=url))
        await broker.want(EVALUATIONS[0].key)
        assert broker.computed == []

    asyncio.run(run())


def test_what_the_mirror_gives_in_vain_is_computed_here(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says each time that it brought the stage, and what it brought cannot be read."""
    fetched: list[str] = []

    def fetch(_: Mirror, store: Store, key: str) -> bool:
        publish(store, key)
        (store.folder(key) / "DONE.json").write_text("{")
        fetched.append(key)
        return True

    async def run() -> None:
        broker = Fake(dataclasses.replace(context, mirror="memory://in-vain"))
        assert (await broker.want(TOKENS.key))["key"] == TOKENS.key
        assert broker.computed == [TOKENS.key]

    monkeypatch.setattr(Mirror, "fetch", fetch)
    asyncio.run(run())
    assert fetched == [TOKENS.key] * 3


def test_a_mirror_that_does_not_answer_is_no_reason_not_to_compute(
    context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any) -> bool:
        raise RuntimeError("an error of the file system's own")

    async def run() -> None:
        broker = Fake(dataclasses.replace(context, mirror=f"file://{tmp_path}/mirror"))
        await broker.want(TOKENS.key)
        assert broker.computed == [TOKENS.key]

    monkeypatch.setattr(Mirror, "fetch", fetch)
    asyncio.run(run())


def test_a_stage_that_is_disturbed_is_tried_again_and_not_for_ever(context: RunContext) -> None:
    async def run(disturbances: int) -> int:
        left = iter([Disturbed("its directory was deleted")] * disturbances)

        async def act(_: str) -> None:
            if (error := next(left, None)) is not None:
                raise RayTaskError("compute", "", error)

        broker = Fake(dataclasses.replace(context, store=f"{context.store}-{disturbances}"), act)
        await broker.want(TOKENS.key)
        return len(broker.computed)

    assert asyncio.run(run(3)) == 4
    with pytest.raises(StageFailed, match="its directory was deleted"):
        asyncio.run(run(4))


def test_a_failure_is_told_in_the_words_that_the_stage_left(context: RunContext) -> None:
    async def run() -> None:
        async def act(key: str) -> None:
            write_json(broker.store.folder(key) / "failure.json", {"error": "StoreError: no space left"})
            raise RayTaskError("compute", "", OSError("No space left on device"))

        broker = Fake(context, act)
        with pytest.raises(StageFailed, match=r"^StoreError: no space left$"):
            await broker.want(TOKENS.key)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            WorkerCrashedError(),
            "WorkerCrashedError: its process died 4 times, as where the kernel kills for memory; free",
        ),
        (
            OutOfMemoryError("Task was killed due to the node running low on memory."),
            "OutOfMemoryError: Ray ended its ",
        ),
        (NodeDiedError("The node has died.\nmore"), "NodeDiedError: The node has died.; run the same command"),
    ],
)
def test_a_stage_whose_processes_died_has_failed_and_says_so(context: RunContext, error: Exception, told: str) -> None:
    async def run() -> None:
        async def act(key: str) -> None:
            broker.store.folder(key).mkdir(parents=True)
            raise error

        broker = Fake(context, act)
        with pytest.raises(StageFailed) as caught:
            await broker.want(TOKENS.key)
        assert str(caught.value).startswith(told) and str(caught.value).endswith("run the same command")
        failure = broker.store.failure(TOKENS.key)
        assert failure is not None and failure["error"] == str(caught.value)

    asyncio.run(run())


@pytest.mark.parametrize("stopping", [True, False])
def test_a_process_that_is_ended_with_its_run_leaves_no_failure(
    context: RunContext, tmp_path: Path, stopping: bool
) -> None:
    if stopping:
        (tmp_path / "stop").touch()

    async def run() -> None:
        async def act(key: str) -> None:
            if stopping:
                broker.store.folder(key).mkdir(parents=True)
            raise WorkerCrashedError

        broker = Fake(dataclasses.replace(context, stop=str(tmp_path / "stop")), act)
        with pytest.raises(StageFailed):
            await broker.want(TOKENS.key)
        assert broker.store.failure(TOKENS.key) is None
        assert broker.store.folder(TOKENS.key).exists() is stopping  # none is made where no process came so far

    asyncio.run(run())


def test_the_end_of_a_dead_lease_holder_is_not_waited_for(context: RunContext) -> None:
    """After kill -9 its lease is still there: on this machine it is seen to be dead at once."""

    async def run() -> None:
        broker = Fake(dataclasses.replace(context, claims="lease"))
        key = TEACHERS[0].key
        broker.training.add(key)
        folder = broker.store.folder(key)
        folder.mkdir(parents=True)
        write_json(folder / "lease.json", {"owner": "o", "ttl": 1e6, "holder": {**myself(), "birth": "another's"}})
        await broker.settle()

    asyncio.run(asyncio.wait_for(run(), 60))
