"""Who goes on after a rung: decided from all students on equal terms, whichever is evaluated first."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from orchestrator.run.judge import Judge
from orchestrator.study.halving import Rung

FIRST = Rung(2, 100, {"a": "a1", "b": "b1", "c": "c1", "d": "d1"})
SECOND = Rung(4, 200, {"a": "a2", "b": "b2", "c": "c2", "d": "d2", "late": "late1"})
RATIOS = {"a1": 1.1, "b1": 1.4, "c1": 1.2, "d1": 1.3, "a2": 1.6, "c2": 1.5, "late1": 1.55, "b2": 1.0, "d2": 1.0}


class Evaluations:
    """Evaluations that end when the test says so; those of `failed` end in an error."""

    def __init__(self, failed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.failed, self.asked = failed, list[str]()
        self.ends: dict[str, asyncio.Event] = {}

    def end(self, *names: str) -> None:
        for name in names:
            self.ends.setdefault(name, asyncio.Event()).set()

    async def want(self, name: str) -> dict[str, Any]:
        self.asked.append(name)
        await self.ends.setdefault(name, asyncio.Event()).wait()
        if name in self.failed:
            raise RuntimeError("it diverged")
        return {"perplexity_ratio": RATIOS[name]}


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def verdicts(judge: Judge, *asked: tuple[str, str]) -> dict[str, bool]:
    told = await asyncio.gather(*(judge.goes_on(trial, evaluation) for trial, evaluation in asked))
    return dict(zip((trial for trial, _ in asked), told, strict=True))


@pytest.mark.parametrize("order", list(itertools.permutations(["a1", "b1", "c1", "d1"])))
def test_the_order_of_arrival_decides_nothing(order: tuple[str, ...]) -> None:
    async def run() -> dict[str, bool]:
        evaluations = Evaluations()
        judge = Judge((FIRST,), 2, evaluations.want)
        asked = asyncio.ensure_future(verdicts(judge, *((name[0], name) for name in order)))
        for name in order:
            await settled()
            assert not asked.done()  # until all are there
            evaluations.end(name)
        assert sorted(evaluations.asked) == ["a1", "b1", "c1", "d1"]  # each once
        return await asked

    assert asyncio.run(run()) == {"a": True, "b": False, "c": True, "d": False}


def test_who_was_stopped_before_is_not_compared_and_not_waited_for() -> None:
    """The better of b and d at the second rung are never trained: of a, c and a late one, two stay."""

    async def run() -> dict[str, bool]:
        evaluations = Evaluations()
        judge = Judge((FIRST, SECOND), 2, evaluations.want)
        evaluations.end("a1", "b1", "c1", "d1", "a2", "c2", "late1")
        told = await verdicts(judge, ("late", "late1"), ("a", "a2"), ("c", "c2"))
        assert not {"b2", "d2"} & set(evaluations.asked)
        return told

    assert asyncio.run(run()) == {"late": True, "a": False, "c": True}


def test_who_failed_is_not_compared() -> None:
    """Of three students that are there, two stay: with b's evaluation failed d is good enough no more, nor b."""

    async def run() -> dict[str, bool]:
        evaluations = Evaluations({"b1"})
        evaluations.end("a1", "b1", "c1", "d1")
        return await verdicts(Judge((FIRST,), 2, evaluations.want), ("a", "a1"), ("b", "b1"), ("c", "c1"), ("d", "d1"))

    assert asyncio.run(run()) == {"a": True, "b": False, "c": True, "d": False}


def test_where_all_failed_nobody_waits_for_ever() -> None:
    async def run() -> bool:
        evaluations = Evaluations({"a1", "b1", "c1", "d1"})
        evaluations.end(*evaluations.failed)
        return await Judge((FIRST,), 2, evaluations.want).goes_on("a", "a1")

    assert asyncio.run(run()) is False


def test_a_stage_that_is_no_rung_is_gone_on_from_at_once() -> None:
    async def run() -> tuple[bool, list[str]]:
        evaluations = Evaluations()
        told = await Judge((FIRST,), 2, evaluations.want).goes_on("a", "a0")
        return told, evaluations.asked

    assert asyncio.run(run()) == (True, [])


def test_a_trial_that_gives_up_takes_no_decision_with_it() -> None:
    async def run() -> bool:
        evaluations = Evaluations()
        judge = Judge((FIRST,), 2, evaluations.want)
        first = asyncio.ensure_future(judge.goes_on("a", "a1"))
        await settled()
        first.cancel()
        second = asyncio.ensure_future(judge.goes_on("c", "c1"))
        await settled()
        evaluations.end("a1", "b1", "c1", "d1")
        return await second

    assert asyncio.run(run()) is True
