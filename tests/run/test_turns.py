"""Turns: what fits begins, in the order of places, and nobody at the head is overtaken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from orchestrator.run import turns as module
from orchestrator.run.turns import Place, Turns

Stage = Callable[..., Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.0)


class Stages:
    """Stages that take turns and end when they are told to; `begun` has their names in the order of beginning."""

    def __init__(self, cores: float, gpus: float = 0.0) -> None:
        self.turns = Turns(cores, gpus)
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, place: Place, cores: float = 1, gpus: float = 0.0) -> None:
        self.ends[name] = asyncio.Event()

        async def stage() -> None:
            async with self.turns.turn(place, cores, gpus):
                self.begun.append(name)
                await self.ends[name].wait()
                if name == "broken":
                    raise RuntimeError(name)

        self.tasks[name] = asyncio.create_task(stage())
        await settled()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_judges_comes_before_what_trains_and_each_in_the_plans_order() -> None:
    async def run() -> list[str]:
        stages = Stages(cores=1)
        await stages.ask("training 1", (1, 1))
        for place in (9, 3, 5):
            await stages.ask(f"training {place}", (1, place))
        await stages.ask("evaluation", (0, 7))
        for name in ("training 1", "evaluation", "training 3", "training 5"):
            await stages.end(name)
        return stages.begun

    assert asyncio.run(run()) == ["training 1", "evaluation", "training 3", "training 5", "training 9"]


def test_who_asks_right_after_an_end_is_not_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an evaluation does, which is woken by the end of what it judges."""

    async def run() -> list[str]:
        stages = Stages(cores=1)
        await stages.ask("training", (1, 0))
        await stages.ask("next training", (1, 1))
        monkeypatch.setattr(module, "GRACE", 0.01)
        stages.ends["training"].set()
        await stages.tasks["training"]
        await stages.ask("evaluation", (0, 2))
        while len(stages.begun) == 1:
            await asyncio.sleep(0.001)
        return stages.begun

    assert asyncio.run(run()) == ["training", "evaluation"]


def test_as_many_are_at_work_as_there_are_cores_and_gpus_for() -> None:
    async def run() -> list[list[str]]:
        stages = Stages(cores=4, gpus=1)
        told = []
        for name, cores, gpus in (("a", 1, 0.5), ("b", 1, 0.5), ("c", 1, 0.5), ("d", 3, 0.0)):
            await stages.ask(name, (1, ord(name)), cores, gpus)
            told.append([*stages.begun])
        await stages.end("a")  # the GPU's half goes to c, and d waits for three cores
        told.append([*stages.begun])
        await stages.end("b")
        await stages.end("c")
        told.append([*stages.begun])
        return told

    assert asyncio.run(run()) == [["a"], ["a", "b"], ["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]


def test_what_has_no_room_in_memory_waits_whatever_cores_are_free() -> None:
    async def run() -> list[list[str]]:
        turns, begun, ends = Turns(8, 0, 1000), [], {name: asyncio.Event() for name in "abc"}

        async def stage(name: str, memory: float) -> None:
            async with turns.turn((1, ord(name)), 1, 0, memory):
                begun.append(name)
                await ends[name].wait()

        tasks = [asyncio.create_task(stage(name, memory)) for name, memory in (("a", 400), ("b", 600), ("c", 1))]
        await settled()
        told = [[*begun]]
        ends["a"].set()
        await settled()
        told.append([*begun])
        for end in ends.values():
            end.set()
        await asyncio.gather(*tasks)
        return told

    assert asyncio.run(run()) == [["a", "b"], ["a", "b", "c"]]


def test_a_large_one_at_the_head_is_not_overtaken_by_small_ones() -> None:
    async def run() -> list[str]:
        stages = Stages(cores=2)
        await stages.ask("small", (1, 0))
        await stages.ask("large", (1, 1), cores=2)
        await stages.ask("late", (1, 2))
        assert stages.begun == ["small"]
        await stages.end("small")
        return stages.begun

    assert asyncio.run(run()) == ["small", "large"]


@pytest.mark.parametrize("broken", [True, False], ids=["fails", "is cancelled at work"])
def test_a_turn_is_given_back_however_it_ends(broken: bool) -> None:
    async def run() -> list[str]:
        stages = Stages(cores=1)
        await stages.ask("broken", (1, 0))
        await stages.ask("next", (1, 1))
        if broken:
            await stages.end("broken")
        else:
            stages.tasks["broken"].cancel()
            await settled()
        with pytest.raises(RuntimeError if broken else asyncio.CancelledError):
            await stages.tasks["broken"]
        return stages.begun

    assert asyncio.run(run()) == ["broken", "next"]


@pytest.mark.parametrize("granted", [True, False], ids=["as it comes", "before it comes"])
def test_who_is_cancelled_while_waiting_takes_no_turn(granted: bool) -> None:
    async def run() -> list[str]:
        stages = Stages(cores=1)
        for name in ("first", "gone", "last"):
            await stages.ask(name, (1, len(stages.tasks)))
        if granted:  # its turn is there, and it has not seen so yet
            stages.ends["first"].set()
            while len(stages.turns._waiting) == 2:
                await asyncio.sleep(0)
        stages.tasks["gone"].cancel()
        await settled()
        if not granted:
            await stages.end("first")
        return stages.begun

    assert asyncio.run(run()) == ["first", "last"]
