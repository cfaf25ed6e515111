"""Specifications of a few stages, and a broker whose stages are computed by the test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from operators.config import SkipConfig
from orchestrator.distill.context import RunContext
from orchestrator.run.broker import Broker
from orchestrator.run.cluster import Node
from orchestrator.run.request import Request
from orchestrator.run.store import Store
from orchestrator.study.halving import Rung
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.schema import Evaluation, Throughput
from orchestrator.study.space import Halving
from orchestrator.study.spec import (
    Architecture,
    DistilSpec,
    EvaluateSpec,
    SourceIdentity,
    Spec,
    TeacherSpec,
    ThroughputSpec,
    TokensSpec,
)

HERE = "1f" * 28  # a node's id as Ray writes it
NODES = (Node(HERE, 2, 0, ""), Node("there", 4, 1, ""))
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
STUDENTS = [
    DistilSpec(
        tokens=TOKENS.key, teacher=TEACHERS[0].key, parent=TEACHERS[0].key, layers=(0,), new_layers=(0,),
        operator=SkipConfig(), phases=(), batch_size=8, sequence_length=8, first_sequence=0, freeze=(),
        optimizer=Optimizer(), numerics=Numerics(), seed=seed,
    )
    for seed in (0, 1)
]  # fmt: skip
JUDGED = [EVALUATIONS[0].of(student.key) for student in STUDENTS]
SPEED = ThroughputSpec(
    teacher=TEACHERS[0].key, operator=SkipConfig(), layers=(0,), throughput=Throughput(), train_batch_size=8,
    sequence_length=8, numerics=Numerics(), hardware="h",
)  # fmt: skip
SPECS: dict[str, Spec] = {spec.key: spec for spec in [TOKENS, *TEACHERS, *STUDENTS, *EVALUATIONS, *JUDGED]}


@dataclasses.dataclass(frozen=True)
class FakePlan:
    """Stages without trials."""

    specs: dict[str, Spec]
    rungs: tuple[Rung, ...]
    study: Any
    trials: tuple[Any, ...] = ()
    waits: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FakePlanner:
    """Plans that are always the same."""

    rungs: tuple[Rung, ...] = ()
    reduction_factor: int = 2
    taken: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, results: Any) -> FakePlan:
        stopping = Halving(reduction_factor=self.reduction_factor) if self.rungs else None
        return FakePlan(SPECS, self.rungs, SimpleNamespace(search=SimpleNamespace(early_stopping=stopping)))

    def speeds(self, plan: FakePlan) -> dict[str, ThroughputSpec]:
        return {}

    def memory(self, plan: FakePlan, speeds: Any, device: str) -> dict[str, int]:
        return self.taken


class Fake(Broker):
    """A broker whose stages are computed by the test: `act(key)` may wait, fail, or publish."""

    def __init__(
        self, context: RunContext, act: Callable[[str], Coroutine[Any, Any, None]] | None = None, **asked: Any
    ) -> None:
        free, taken = asked.pop("free", None), asked.pop("memory", {})
        request = Request(FakePlanner(taken=taken, **asked), free)  # type: ignore[arg-type]
        file = request.write(Path(f"{context.store}-request"))
        super().__init__(file, context, NODES)
        self.act = act
        self.computed: list[str] = []

    async def _submit(self, key: str, spec: Any, expired: str | None) -> None:
        self.computed.append(key)
        if self.act is not None:
            await self.act(key)
        publish(self.store, key)


def publish(store: Store, key: str, result: Mapping[str, Any] | None = None) -> None:
    folder = store.folder(key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "artefacts").mkdir(exist_ok=True)
    if key in SPECS:
        (folder / "spec.json").write_text(SPECS[key].model_dump_json())
    done = {"key": key, "result": {"key": key} if result is None else dict(result), "files": {}}
    (folder / "DONE.json").write_text(json.dumps(done))
