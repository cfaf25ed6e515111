"""The broker: one computation for a key whoever asks, parents first, and waiting that holds nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from filelock import FileLock
from ray.exceptions import RayTaskError

from orchestrator.distill.context import RunContext
from orchestrator.run import broker as module
from orchestrator.run.broker import StageFailed
from orchestrator.run.compute import StageClaimed
from orchestrator.run.turns import Turns
from orchestrator.study.halving import Rung
from tests.run.fakes import EVALUATIONS, JUDGED, STUDENTS, TEACHERS, TOKENS, Fake, publish


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


def test_a_stage_that_needs_all_memory_is_computed_alone(context: RunContext) -> None:
    async def run() -> int:
        at_once, most = 0, 0

        async def act(_: str) -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1

        broker = Fake(context, act, memory={spec.key: 600 for spec in STUDENTS}, free=1000)
        await asyncio.gather(*(broker.want(spec.key) for spec in STUDENTS))
        return most

    assert asyncio.run(run()) == 1  # six cores are free for both, and 1000 bytes for one of 600


def test_trials_that_are_compared_go_on_or_not(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (spec.key for spec in JUDGED)
    ratios = {one: 1.2, other: 1.1}

    async def run() -> list[bool]:
        broker = Fake(context, rungs=(Rung(1, 8, {"a": one, "b": other}),))
        monkeypatch.setattr(broker.store, "result", lambda key: {"perplexity_ratio": ratios.get(key)})
        return [await broker.goes_on(trial, key) for trial, key in (("a", one), ("b", other), ("c", one))]

    assert asyncio.run(run()) == [False, True, True]


def test_a_student_is_judged_before_the_next_one_trains(context: RunContext) -> None:
    """On one core, where all is asked for at once and the plan has both trainings first."""

    async def run() -> list[str]:
        broker = Fake(context)
        broker.turns = Turns(1, 0)
        keys = [TEACHERS[0].key, STUDENTS[0].key, STUDENTS[1].key, *(spec.key for spec in JUDGED)]
        await asyncio.gather(*(broker.want(key) for key in keys))
        return broker.computed

    first, second = (spec.key for spec in STUDENTS)
    one, other = (spec.key for spec in JUDGED)
    assert asyncio.run(run()) == [TOKENS.key, TEACHERS[0].key, first, one, second, other]


def test_only_training_stages_are_waited_for(context: RunContext) -> None:
    """A stage that trains is named while it is computed and no longer; text is not."""

    async def run() -> None:
        seen: dict[str, set[str]] = {}

        async def act(key: str) -> None:
            seen[key] = set(broker.training)

        broker = Fake(context, act)
        await broker.want(EVALUATIONS[0].key)
        teacher = TEACHERS[0].key
        assert seen == {TOKENS.key: set(), teacher: {teacher}, EVALUATIONS[0].key: set()}
        assert broker.training == set()
        await broker.settle()

    asyncio.run(run())


def test_the_end_of_training_is_waited_for(context: RunContext) -> None:
    async def run() -> None:
        broker = Fake(context)
        key = TEACHERS[0].key
        broker.training.add(key)
        broker.store.folder(key).mkdir(parents=True)
        with FileLock(broker.store.folder(key) / "lock"):
            settled = asyncio.ensure_future(broker.settle())
            await asyncio.sleep(0.02)
            assert not settled.done()
        await settled

    asyncio.run(run())


def test_a_stage_that_is_gone_is_computed_again_when_it_is_wanted_again(context: RunContext) -> None:
    async def run() -> None:
        broker = Fake(context)
        await broker.want(TOKENS.key)
        await broker.want(TOKENS.key)
        assert broker.computed == [TOKENS.key]
        (broker.store.folder(TOKENS.key) / "DONE.json").unlink()
        assert (await broker.want(TOKENS.key))["key"] == TOKENS.key
        assert broker.computed == [TOKENS.key] * 2

    asyncio.run(run())


def test_a_result_that_cannot_be_read_is_computed_again(context: RunContext) -> None:
    async def run() -> None:
        broker = Fake(context)
        publish(broker.store, TOKENS.key)
        (broker.store.folder(TOKENS.key) / "DONE.json").write_text("{")
        assert (await broker.want(TOKENS.key))["key"] == TOKENS.key
        assert broker.computed == [TOKENS.key]

    asyncio.run(run())
