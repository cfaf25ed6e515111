"""The broker: one computation for a key whoever asks, parents first, and waiting that holds nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ray.exceptions import RayTaskError

from orchestrator.distill.context import RunContext
from orchestrator.run import broker as module
from orchestrator.run.broker import Broker, StageFailed
from orchestrator.run.cluster import Node
from orchestrator.run.compute import StageClaimed
from orchestrator.run.mirror import Mirror
from orchestrator.run.store import Store
from orchestrator.study.schema import Evaluation, Numerics, Optimizer
from orchestrator.study.spec import (
    Architecture,
    EvaluateSpec,
    ImportSpec,
    SourceIdentity,
    Spec,
    TeacherSpec,
    TokensSpec,
)

HERE = "1f" * 28  # a node's id as Ray writes it
SOURCE = SourceIdentity(source="text", fingerprint="f")
TOKENS = TokensSpec(
    train=SOURCE, validation=None, validation_share=0.1, sequence_length=8, vocabulary=300, teacher=None
)
TEACHERS = [
    TeacherSpec(
        tokens=TOKENS.key, architecture=Architecture(layers=1, hidden=8, heads=1, intermediate=8, max_length=8,
        vocabulary=300), token_budget=8 * 8, batch_size=8, sequence_length=8, optimizer=Optimizer(),
        numerics=Numerics(world_size=ranks), seed=0,
    )
    for ranks in (1, 2)
]  # fmt: skip
EVALUATIONS = [
    EvaluateSpec(
        tokens=TOKENS.key, teacher=TEACHERS[0].key, subject=TEACHERS[0].key, sequence_length=8,
        evaluation=Evaluation(tokens=tokens), numerics=Numerics(),
    )
    for tokens in (8, 16)
]  # fmt: skip
SPECS: dict[str, Spec] = {spec.key: spec for spec in [TOKENS, *TEACHERS, *EVALUATIONS]}


class Fake(Broker):
    """A broker whose stages are computed by the test: `act(key)` may wait, fail, or publish."""

    def __init__(self, context: RunContext, act: Callable[[str], Coroutine[Any, Any, None]] | None = None) -> None:
        texts = {key: spec.model_dump_json() for key, spec in SPECS.items()}
        super().__init__(texts, context, (Node(HERE, 2, 0, ""), Node("there", 4, 1, "")))
        self.act = act
        self.computed: list[str] = []

    async def _submit(self, key: str, spec: Any, expired: str | None) -> None:
        self.computed.append(key)
        if self.act is not None:
            await self.act(key)
        publish(self.store, key)


def publish(store: Store, key: str) -> None:
    folder = store.folder(key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artefacts").mkdir(exist_ok=True)
    (folder / "DONE.json").write_text(f'{{"key": "{key}", "result": {{"key": "{key}"}}, "files": {{}}}}')


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(store=str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


def test_a_stage_that_many_want_is_computed_once_after_its_parents(context: RunContext) -> None:
    async def run() -> list[str]:
        broker = Fake(context)
        wanted = [EVALUATIONS[0].key, EVALUATIONS[1].key] * 3
        results = await asyncio.gather(*(broker.want(key) for key in wanted))
        assert [result["key"] for result in results] == wanted
        return broker.computed

    computed = asyncio.run(run())
    assert sorted(computed) == sorted({TOKENS.key, TEACHERS[0].key, EVALUATIONS[0].key, EVALUATIONS[1].key})
    assert computed[:2] == [TOKENS.key, TEACHERS[0].key]


def test_a_stage_lives_on_when_the_trial_that_asked_first_gives_it_up(context: RunContext) -> None:
    async def run() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def act(_: str) -> None:
            begun.set()
            await may_end.wait()

        broker = Fake(context, act)
        first = asyncio.ensure_future(broker.want(TOKENS.key))
        await begun.wait()
        second = asyncio.ensure_future(broker.want(TOKENS.key))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        may_end.set()
        assert (await second)["key"] == TOKENS.key
        assert broker.computed == [TOKENS.key]

    asyncio.run(run())


def test_what_another_computes_is_waited_for_without_a_task_while_others_go_on(context: RunContext) -> None:
    async def run() -> None:
        broker = Fake(context)
        publish(broker.store, TOKENS.key)
        publish(broker.store, TEACHERS[0].key)
        taken, free = (spec.key for spec in EVALUATIONS)
        broker.store.folder(taken).mkdir(parents=True)
        with FileLock(broker.store.folder(taken) / "lock"):
            waiting = asyncio.ensure_future(broker.want(taken))
            assert (await broker.want(free))["key"] == free
            await asyncio.sleep(0.02)
            assert not waiting.done()
            publish(broker.store, taken)
        assert (await waiting)["key"] == taken
        assert broker.computed == [free]

    asyncio.run(run())


def test_what_was_published_between_two_looks_is_not_computed(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver publishes and lets go of its claim after we saw no result and before we look at the claim."""
    broker = Fake(context)
    taken = EVALUATIONS[0].key

    class JustLeft:
        expired = None

        def held_by_other(self) -> bool:
            publish(broker.store, taken)
            return False

    monkeypatch.setattr(module, "claim_of", lambda *_: JustLeft())
    assert asyncio.run(broker.want(taken))["key"] == taken
    assert broker.computed == []


def test_a_stage_whose_computer_dies_is_taken_over(context: RunContext) -> None:
    async def run() -> None:
        broker = Fake(context)
        broker.store.folder(TOKENS.key).mkdir(parents=True)
        lock = FileLock(broker.store.folder(TOKENS.key) / "lock")
        lock.acquire()
        waiting = asyncio.ensure_future(broker.want(TOKENS.key))
        await asyncio.sleep(0.02)
        assert broker.computed == []
        lock.release()
        await waiting
        assert broker.computed == [TOKENS.key]

    asyncio.run(run())


def test_a_claim_that_came_in_between_is_no_failure(context: RunContext) -> None:
    async def run() -> None:
        tries = iter([StageClaimed("another was quicker"), None])

        async def act(_: str) -> None:
            error = next(tries)
            if error is not None:
                raise RayTaskError("compute", "", error)

        broker = Fake(context, act)
        await broker.want(TOKENS.key)
        assert broker.computed == [TOKENS.key] * 2

    asyncio.run(run())


def test_a_failed_parent_fails_its_children_and_nobody_else(context: RunContext) -> None:
    async def run() -> None:
        async def act(key: str) -> None:
            if key == TEACHERS[0].key:
                raise RayTaskError("compute", "", ArithmeticError("it diverged"))

        broker = Fake(context, act)
        for spec in EVALUATIONS:
            with pytest.raises(StageFailed, match="it diverged"):
                await broker.want(spec.key)
        await broker.want(TEACHERS[1].key)
        assert sorted(broker.computed) == sorted([TOKENS.key, TEACHERS[0].key, TEACHERS[1].key])

    asyncio.run(run())


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


def test_cores_and_place_of_every_kind(context: RunContext) -> None:
    broker = Fake(dataclasses.replace(context, gpus_per_stage=0.5))
    plain = broker._needs(EVALUATIONS[0])
    assert plain == {"num_cpus": 1, "num_gpus": 0.5, "scheduling_strategy": "DEFAULT"}
    for spec in (TOKENS, ImportSpec(fingerprint="f")):  # they read what the driver's machine has
        needs = broker._needs(spec)
        assert needs["num_cpus"] == 1 and needs["scheduling_strategy"].node_id == HERE
        assert not needs["scheduling_strategy"].soft
    assert broker._needs(TEACHERS[1])["num_cpus"] == 0  # its ranks have them
    assert broker._shared_at_once() == 3  # of six cores, two for each
