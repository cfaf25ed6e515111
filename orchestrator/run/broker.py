"""One future per stage key: each stage is computed once, and every trial that needs it waits without holding a core.

The broker knows the plan's graph. Wanting a stage means wanting its parents first; a failed parent fails the child
with the same error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from filelock import Timeout

from orchestrator.distill.context import RunContext
from orchestrator.run.store import Disturbed, Store, compute
from orchestrator.study.spec import spec_from_json

NAME = "layerswap-broker"
POLL_SECONDS = 0.5
DISTURBANCES = 3  # of one stage, after which its disk is not worth trying


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
        self.disturbed: Counter[str] = Counter()  # key -> how often it was
        self.training: set[str] = set()  # keys of stages that train at this moment

    async def want(self, key: str) -> dict[str, Any]:
        """The result of a stage, computed now, being computed, or found in the store. Raises `StageFailed`."""
        future = self.futures.get(key)
        withdrawn = future is not None and future.done() and not self.store.finished(key)
        if future is None or (withdrawn and future.exception() is None):
            self.futures[key] = asyncio.ensure_future(self._obtain(key))
        return await asyncio.shield(self.futures[key])

    async def settle(self) -> None:
        """Return when no training stage of this run is at work: once asked to stop, they write a checkpoint and end."""
        while any(self.store.locked(key) for key in self.training):
            await asyncio.sleep(POLL_SECONDS / 5)

    async def _obtain(self, key: str) -> dict[str, Any]:
        spec = self.specs[key]
        while True:
            while not self.store.finished(key):
                if self.store.locked(key):  # another driver computes it: wait without a core
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                await self._compute(key, spec)
            try:
                return self.store.result(key)
            except (OSError, ValueError):  # damaged since it was published
                self.store.withdraw_damaged([key])

    async def _compute(self, key: str, spec: Any) -> None:
        await asyncio.gather(*(self.want(parent) for parent in spec.parents.values()))
        cores = spec.numerics.threads if hasattr(spec, "numerics") else 1
        task: Any = ray.remote(compute).options(
            name=f"{spec.kind}-{key[:8]}", num_cpus=cores, max_retries=3, scheduling_strategy="DEFAULT"
        )
        if hasattr(spec, "optimizer"):
            self.training.add(key)
        try:
            await task.remote(self.texts[key], self.context, wait=False)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Timeout):
                return
            if isinstance(error.cause, Disturbed) and self.disturbed[key] < DISTURBANCES:
                self.disturbed[key] += 1
                return
            told = self.store.failure(key)
            raise StageFailed(told["error"] if told else str(error.cause)) from None
        finally:
            self.training.discard(key)


def start_broker(specs: dict[str, str], context: RunContext) -> Any:
    """Start the broker; a broker that dies is started again by Ray and finds finished stages in the store."""
    actor = ray.remote(Broker).options(
        name=NAME, num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000
    )
    return actor.remote(specs, context)
