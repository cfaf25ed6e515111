"""One future per stage key: each stage is computed once, and every trial that needs it waits without holding a core.

The broker knows the plan's graph. Wanting a stage means wanting its parents first; a failed parent fails the child
with the same error.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from filelock import Timeout

from orchestrator.distill.context import RunContext
from orchestrator.run.store import Store, compute
from orchestrator.study.spec import spec_from_json

NAME = "layerswap-broker"
POLL_SECONDS = 0.5


class StageFailed(RuntimeError):
    """A stage ended by an error of its own; trying again would give the same."""


class Broker:
    """The actor that trials ask for stages. Its methods run interleaved in one event loop."""

    def __init__(self, specs: dict[str, str], context: RunContext) -> None:
        self.specs = {key: spec_from_json(text) for key, text in specs.items()}
        self.texts = specs
        self.context = context
        self.store = Store(Path(context.store))
        self.futures: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def want(self, key: str) -> dict[str, Any]:
        """The result of a stage, computed now, being computed, or found in the store. Raises `StageFailed`."""
        if key not in self.futures:
            self.futures[key] = asyncio.ensure_future(self._obtain(key))
        return await asyncio.shield(self.futures[key])

    async def _obtain(self, key: str) -> dict[str, Any]:
        spec = self.specs[key]
        while not self.store.finished(key):
            if self.store.locked(key):  # another driver computes it: wait without a core
                await asyncio.sleep(POLL_SECONDS)
                continue
            await self._compute(key, spec)
        return self.store.result(key)

    async def _compute(self, key: str, spec: Any) -> None:
        await asyncio.gather(*(self.want(parent) for parent in spec.parents.values()))
        cores = spec.numerics.threads if hasattr(spec, "numerics") else 1
        task: Any = ray.remote(compute).options(
            name=f"{spec.kind}-{key[:8]}", num_cpus=cores, max_retries=3, scheduling_strategy="DEFAULT"
        )
        try:
            await task.remote(self.texts[key], self.context, wait=False)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Timeout):
                return
            told = self.store.failure(key)
            raise StageFailed(told["error"] if told else str(error.cause)) from None


def start_broker(specs: dict[str, str], context: RunContext) -> Any:
    """Start the broker; a broker that dies is started again by Ray and finds finished stages in the store."""
    actor = ray.remote(Broker).options(
        name=NAME, num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000
    )
    return actor.remote(specs, context)
