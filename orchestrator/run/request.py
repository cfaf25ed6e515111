"""What a run asks its broker for, on its way from the driver: by a file, for Ray complains of words over 100 KB."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from orchestrator.files import read_json, write_text
from orchestrator.study.halving import Rung
from orchestrator.study.plan import Plan, stage_memory
from orchestrator.study.spec import Spec, ThroughputSpec


@dataclasses.dataclass(frozen=True)
class Request:
    """Stages, what they take, and where trials are judged."""

    specs: dict[str, str]  # key -> specification
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # key -> bytes that a process of the stage takes
    free: int | None = None  # bytes that stages may take together; none: not counted
    rungs: tuple[Rung, ...] = ()
    reduction_factor: int = 2

    def write(self, path: Path) -> Path:
        """Leave it in a file, stages in the plan's order."""
        write_text(path, json.dumps(dataclasses.asdict(self)))
        return path


def read_request(path: Path) -> Request:
    """What was left in a file."""
    told = read_json(path)
    return Request(**{**told, "rungs": tuple(Rung(**rung) for rung in told["rungs"])})


def request_of(
    plan: Plan, speeds: Mapping[str, ThroughputSpec], specs: Mapping[str, Spec], device: str, free: int | None
) -> Request:
    """Of a plan whose stages, measurements included, are `specs`."""
    texts = {key: spec.model_dump_json() for key, spec in specs.items()}
    memory = {key: memory.bytes for key, memory in stage_memory(plan, speeds, device).items()}
    stopping = plan.study.search.early_stopping
    return Request(texts, memory, free, plan.rungs, 2 if stopping is None else stopping.reduction_factor)
