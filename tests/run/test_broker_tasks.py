"""What the broker asks Ray for: cores, GPUs and the place of every kind of stage, and what is tried again."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distill.context import RunContext
from orchestrator.run import broker as module
from orchestrator.run.broker import Broker, start_broker
from orchestrator.run.cluster import Node
from orchestrator.run.distributed import RankDied
from orchestrator.study.recipe import Numerics
from orchestrator.study.spec import ImportSpec
from tests.run.fakes import EVALUATIONS, HERE, SPEED, TEACHERS, TOKENS, Fake


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(store=str(tmp_path / "store"))


def test_cores_and_place_of_every_kind(context: RunContext) -> None:
    broker = Fake(dataclasses.replace(context, gpus_per_stage=0.5))
    plain = broker._needs(EVALUATIONS[0])
    assert plain == {"num_cpus": 1, "num_gpus": 0.5, "scheduling_strategy": "DEFAULT"}
    for spec in (TOKENS, ImportSpec(fingerprint="f")):  # they read what the driver's machine has
        needs = broker._needs(spec)
        assert needs["num_cpus"] == 1 and needs["scheduling_strategy"].node_id == HERE
        assert not needs["scheduling_strategy"].soft
    assert broker._needs(TEACHERS[1])["num_cpus"] == 0  # its ranks have them
    assert broker._needs(TEACHERS[1])["scheduling_strategy"].node_id == HERE
    many = TEACHERS[0].model_copy(update={"numerics": Numerics(threads=5)})
    assert broker._needs(many)["num_cpus"] == 5
    # What is counted before Ray is asked: all processes together, on the six cores and one GPU that there are.
    most = TEACHERS[0].model_copy(update={"numerics": Numerics(threads=5, world_size=2)})
    shares = [broker._share(spec) for spec in (TOKENS, EVALUATIONS[0], TEACHERS[1], many, most)]
    assert shares == [(1, 0.0, 0), (1, 0.5, 0), (2, 1.0, 0), (5, 0.5, 0), (6, 1.0, 0)]


def test_memory_is_of_all_processes_and_never_more_than_there_is(context: RunContext) -> None:
    alone, ranks = TEACHERS  # of one process and of two
    broker = Fake(context, memory={alone.key: 300, ranks.key: 400}, free=700)
    assert [broker._share(spec)[2] for spec in (alone, ranks, EVALUATIONS[0])] == [300, 700, 0]
    assert Fake(context, memory={ranks.key: 400})._share(ranks)[2] == 800  # what is free is not counted


@pytest.mark.parametrize(("share", "gpus"), [(0.0, 0), (0.5, 3)])
def test_speed_is_measured_alone_on_the_drivers_machine(context: RunContext, share: float, gpus: int) -> None:
    broker = Fake(dataclasses.replace(context, gpus_per_stage=share))
    broker.here = Node(HERE, 2, 3, "")
    needs = broker._needs(SPEED)
    assert (needs["num_cpus"], needs["num_gpus"]) == (2, gpus)
    assert needs["scheduling_strategy"].node_id == HERE


def test_the_broker_lives_on_the_drivers_node_and_is_started_again(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Actor:
        def options(self, **options: Any) -> Actor:
            given.append(options)
            return self

        def remote(self, *words: Any) -> str:
            given.append(words)
            return "the actor"

    monkeypatch.setattr(module.ray, "remote", lambda kind: Actor() if kind is Broker else None)
    nodes = (Node(HERE, 2, 0, ""), Node("2e" * 28, 4, 1, ""))
    request = Path("request.json")
    assert start_broker(request, context, nodes) == "the actor"
    options, words = given
    assert options.pop("scheduling_strategy").node_id == HERE
    assert options == {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 10_000}
    assert words == (request, context, nodes)


def test_a_stage_is_a_task_that_is_tried_again_where_a_rank_dies(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Task:
        def options(self, **options: Any) -> Task:
            given.append(options)
            return self

        async def remote(self, *words: Any) -> None:
            given.append(words)

    monkeypatch.setattr(module.ray, "remote", lambda function: Task() if function is module.compute else None)
    broker, spec = Fake(context), TEACHERS[0]
    asyncio.run(Broker._submit(broker, spec.key, spec, "an expired lease"))
    options, words = given
    assert options == {
        "name": f"teacher-{spec.key[:8]}", "max_retries": 3, "retry_exceptions": [RankDied], "num_cpus": 1,
        "num_gpus": 0.0, "scheduling_strategy": "DEFAULT",
    }  # fmt: skip
    assert words == (spec.model_dump_json(), context, "an expired lease")
