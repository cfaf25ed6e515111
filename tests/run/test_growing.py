"""A broker whose plan grows with the results that decide it: the stages are computed by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distill.context import RunContext
from orchestrator.run import broker as module
from orchestrator.run.broker import Broker, StageFailed
from orchestrator.run.growing import Growing
from orchestrator.run.request import Request
from orchestrator.run.store import Store
from orchestrator.run.sweep import missing
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Planner
from orchestrator.study.spec import ChoiceSpec, EvaluateSpec
from tests.run.fakes import NODES, publish
from tests.study.test_path import RESOLVED, STUDY, layers

SCHEDULES = (
    "search.space={schedule: [{choice: {rerank: every_stage, until: {layers: 2}}}, {choice: {until: {ratio: 1.2}}}, "
    "{layer_order: [[3], [1]], gate: {ratio: 1.2, extend: 1}}]}"
)
COSTS = (3.0, 4.0, 1.0, 2.0)


def result(spec: Any) -> Mapping[str, Any]:
    """Layers by their costs; students with layer 3 swapped are bad."""
    if isinstance(spec, ChoiceSpec):
        return {"order": sorted((each.layer for each in spec.candidates), key=lambda layer: COSTS[layer])}
    return {"perplexity_ratio": 1.3 if isinstance(spec, EvaluateSpec) and spec.subject in BAD else 1.1}


BAD: set[str] = set()


class Growth(Broker):
    """A broker of the study above; remembers what it computed."""

    def __init__(self, context: RunContext, planner: Planner, fails: str = "") -> None:
        super().__init__(Request(planner).write(Path(f"{context.store}-request")), context, NODES)
        self.computed: list[str] = []
        self.fails = fails

    async def _submit(self, key: str, spec: Any, expired: str | None) -> None:
        self.computed.append(key)
        if spec.kind == self.fails:
            raise StageFailed("it broke")
        if getattr(spec, "new_layers", None) == (3,) or (spec.kind == "distil" and spec.parent in BAD):
            BAD.add(key)
        publish(self.store, key, result(spec))

    async def steps(self, trial: str) -> list[tuple[str, str, int, int]]:
        found: list[tuple[str, str, int, int]] = []
        while (step := await self.step(trial, len(found))) is not None:
            await self.want(step[0])
            await self.want(step[1])
            found.append(step)
        return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    BAD.clear()


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY % "keep: []", encoding="utf-8")
    document = read_document(file, [SCHEDULES])
    return Planner(document, validate(document), RESOLVED, "cpu", "here")


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(store=str(tmp_path / "store"))


def test_trials_are_given_their_stages_as_results_decide_them(planner: Planner, context: RunContext) -> None:
    async def run() -> Broker:
        broker = Growth(context, planner)
        await broker.begin()
        chosen, bounded, gated = await asyncio.gather(*(broker.steps(f"trial-0{n}") for n in range(3)))
        assert [step[2:] for step in chosen] == [(1, 512), (2, 1024)]
        assert [step[2:] for step in bounded] == [(1, 512), (2, 1024)]
        assert [step[2:] for step in gated] == [(1, 512), (1, 1024), (1, 512)]  # given back: the text too
        assert len(broker.computed) == len(set(broker.computed))
        return broker

    asyncio.run(run())
    grown = Growing(planner, Store(Path(context.store)))
    chosen, bounded, gated = grown.plan.trials
    assert layers(chosen) == [(2,), (3,)] and layers(bounded) == [(2,), (3,)]
    assert [step.outcome for step in bounded.steps] == ["kept", "last"]
    assert [step.outcome for step in gated.steps] == ["given_back", "given_back", "kept"]
    assert [step.train.key for step in chosen.steps] == [step.train.key for step in bounded.steps]


def test_a_plan_grows_though_nobody_asks_for_its_steps(planner: Planner, context: RunContext) -> None:
    async def run() -> None:
        broker = Growth(context, planner)
        await broker.begin()
        for _ in range(1000):
            await asyncio.sleep(0.001)
            if not broker.growing.plan.waits and not missing_trained(broker):
                break
        assert (broker.growing.plan.waits, missing_trained(broker)) == ({}, [])

    asyncio.run(run())


def missing_trained(broker: Broker) -> list[str]:
    keys = {step.train.key for trial in broker.growing.plan.trials for step in trial.steps}
    return [key for key in keys if not broker.store.finished(key)]


def test_whoever_begins_again_makes_no_decision_twice(planner: Planner, context: RunContext) -> None:
    async def some() -> list[str]:
        broker = Growth(context, planner)
        first = await broker.step("trial-00", 0)
        assert first is not None
        await broker.want(first[0])
        return broker.computed  # and is gone

    async def rest() -> list[str]:
        broker = Growth(context, planner)
        await broker.begin()
        await asyncio.gather(*(broker.steps(f"trial-0{n}") for n in range(3)))
        return broker.computed

    before, after = asyncio.run(some()), asyncio.run(rest())
    assert before and not set(before) & set(after)


def test_why_a_decision_cannot_be_made_is_told_to_who_waits_for_it(planner: Planner, context: RunContext) -> None:
    async def run() -> None:
        broker = Growth(context, planner, fails="score")
        await broker.begin()
        with pytest.raises(StageFailed, match="it broke"):
            await broker.step("trial-00", 0)
        assert len(await broker.steps("trial-02")) == 3  # which rests on no choice

    asyncio.run(run())


def test_what_a_decision_needs_is_missing_until_it_is_there(planner: Planner, context: RunContext) -> None:
    grown = Growing(planner, Store(Path(context.store)))
    wanted = {spec.key for trial in grown.plan.trials for spec in trial.path.specs}
    assert wanted and wanted <= set(missing(grown.plan, grown.store, {}, {}))
    assert not grown.grow()
    (choice,) = {trial.path.waits for trial in grown.plan.trials[:2]}
    assert choice is not None
    publish(grown.store, choice, {"order": [1, 0, 2, 3]})
    assert grown.grow() and layers(grown.plan.trials[0]) == [(1,)]
    assert choice not in missing(grown.plan, grown.store, {}, {})


def test_a_measurement_that_is_asked_for_while_others_train_has_every_core(
    planner: Planner, context: RunContext
) -> None:
    broker = Growth(context, planner)
    (spec, *_) = broker.growing.speeds.values()
    assert broker._share(spec)[0] == broker.cores == 6
