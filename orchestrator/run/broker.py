"""One future per stage key: each stage is computed once, and every trial that needs it waits without holding a core.

The broker knows the plan's graph, which grows with the results that decide it. Wanting a stage means wanting its
parents first; a failed parent fails the child with the same error. It lives and dies with the driver's node: whoever
wants its answers is there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import ray

from orchestrator.distill.context import RunContext
from orchestrator.files import write_json
from orchestrator.run.claims import claim_of
from orchestrator.run.cluster import READS_FILES, Node, pinned, uses_device
from orchestrator.run.compute import ClaimLost, Disturbed, StageClaimed, compute
from orchestrator.run.distributed import RankDied
from orchestrator.run.growing import Growing
from orchestrator.run.judge import Judge
from orchestrator.run.mirror import Mirror
from orchestrator.run.request import read_request
from orchestrator.run.store import FAILURE, Store
from orchestrator.run.turns import Turns
from orchestrator.study.plan import Plan
from orchestrator.study.spec import Spec

POLL_SECONDS = 0.5
DISTURBANCES = 3  # of one stage, after which its disk is not worth trying
FETCHES = 3  # of one stage, after which the mirror is not worth trying
RETRIES = 3  # of a stage whose process died


class StageFailed(RuntimeError):
    """A stage ended by an error of its own; trying again would give the same."""


class Broker:
    """The actor that trials ask for stages. Its methods run interleaved in one event loop."""

    def __init__(self, request: Path, context: RunContext, nodes: tuple[Node, ...]) -> None:
        asked = read_request(request)
        self.context = context
        self.here = nodes[0]
        self.cores = int(sum(node.cpus for node in nodes))
        self.store = Store(Path(context.store))
        self.free = math.inf if asked.free is None else asked.free
        self.growing = Growing(asked.planner, self.store)
        self.specs: dict[str, Spec] = {}
        self.memory: dict[str, int] = {}
        self.places: dict[str, tuple[int, int]] = {}
        self._learn()
        stopping = self.growing.plan.study.search.early_stopping
        factor = 2 if stopping is None else stopping.reduction_factor
        self.judge = Judge(self.growing.plan.rungs, factor, self.want)
        self.followed: dict[str, asyncio.Future[None]] = {}  # by what lets the plan grow
        self.mirror = Mirror(context.mirror) if context.mirror else None
        self.futures: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.disturbed: Counter[str] = Counter()  # key -> how often it was
        self.fetches: Counter[str] = Counter()  # key -> how often it was fetched
        self.training: set[str] = set()  # keys of stages that train at this moment
        self.turns = Turns(self.cores, sum(node.gpus for node in nodes), self.free)

    async def begin(self) -> None:
        """Have what is needed however trials go computed as cores come free, whether or not somebody waits for it yet,
        and what becomes known later as well."""
        self._begin()

    async def step(self, trial: str, index: int) -> tuple[str, str, int, int] | None:
        """The stage of a trial at this place of its path, once results decide it; None where the path has ended, or
        the search has no such trial.

        Returns the keys of the trained stage and its evaluation, how many layers are swapped, and tokens so far.
        Raises `StageFailed` where what decides it cannot be computed.
        """
        while True:
            plan = self.growing.plan
            found = next((each for each in plan.trials if each.name == trial), None)
            if found is not None and index < len(found.steps):
                step = found.steps[index]
                return step.train.key, step.evaluate.key, len(step.swapped), step.tokens
            waits = plan.drawing.waits if found is None else (found.path.waits,)
            wanted = [key for key in waits if key is not None]
            if not wanted:
                return None
            await asyncio.gather(*map(self.want, wanted))
            self._grow()

    async def _follow(self, key: str) -> None:
        """Let the plan grow when this is there; why it cannot is told to whoever asks for steps."""
        with contextlib.suppress(StageFailed):
            await self.want(key)
            self._grow()

    def _grow(self) -> None:
        if self.growing.grow():
            self._learn()
            self._begin()

    def _learn(self) -> None:
        """Take in the stages that are known now."""
        for key, spec in self.growing.specs.items():
            if key not in self.specs:
                self.specs[key] = spec
                self.places[key] = (int(trains(spec)), len(self.places))
        self.memory |= self.growing.planner.memory(self.growing.plan, self.growing.speeds, self.context.device)

    def _begin(self) -> None:
        plan = self.growing.plan
        for key in from_the_start(plan):
            self._future(key)
        for key in plan.waits:
            if key not in self.followed:
                self.followed[key] = asyncio.ensure_future(self._follow(key))

    async def want(self, key: str) -> dict[str, Any]:
        """The result of a stage, computed now, being computed, or found in the store. Raises `StageFailed`.

        The stage goes on for others when the one who wanted it goes away.
        """
        return await asyncio.shield(self._future(key))

    async def goes_on(self, trial: str, evaluation: str) -> bool:
        """Whether early stopping lets a trial go on after the student with this evaluation."""
        return await self.judge.goes_on(trial, evaluation)

    async def settle(self) -> None:
        """Return when no training stage of this run is at work: once asked to stop, they write a checkpoint and end."""
        while "held" in (await asyncio.to_thread(self.store.states, tuple(self.training))).values():
            await asyncio.sleep(POLL_SECONDS / 5)

    def _future(self, key: str) -> asyncio.Future[dict[str, Any]]:
        future = self.futures.get(key)
        withdrawn = future is not None and future.done() and not self.store.finished(key)
        if future is None or (withdrawn and future.exception() is None):
            self.futures[key] = asyncio.ensure_future(self._obtain(key))
        return self.futures[key]

    async def _obtain(self, key: str) -> dict[str, Any]:
        spec = self.specs[key]
        claim = claim_of(self.context, key)
        while True:
            while not self.store.finished(key):
                if self.mirror is not None and await asyncio.to_thread(self._fetched, key):
                    continue
                if await asyncio.to_thread(claim.held_by_other):  # another driver computes it: wait without a core
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                if self.store.finished(key):  # who held the claim published, then let go, since the look before
                    continue
                await asyncio.gather(*(self.want(parent) for parent in spec.parents.values()))
                async with self.turns.turn(self.places[key], *self._share(spec)):
                    await self._compute(key, spec, claim.expired)
            try:
                return self.store.result(key)
            except (OSError, ValueError):  # damaged since it was published
                self.store.withdraw_damaged([key])

    def _fetched(self, key: str) -> bool:
        if self.mirror is None or self.fetches[key] >= FETCHES:  # what it gives is damaged here each time
            return False
        try:
            fetched = self.mirror.fetch(self.store, key)
        except Exception:  # a mirror that does not answer, whatever it raises, is no reason not to compute
            return False
        self.fetches[key] += fetched
        return fetched

    async def _compute(self, key: str, spec: Any, expired: str | None) -> None:
        if trains(spec):
            self.training.add(key)
        try:
            await self._submit(key, spec, expired)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StageClaimed | ClaimLost):
                return
            if isinstance(error.cause, Disturbed) and self.disturbed[key] < DISTURBANCES:
                self.disturbed[key] += 1
                return
            told = self.store.failure(key)
            raise StageFailed(told["error"] if told else str(error.cause)) from None
        except ray.exceptions.RayError as error:  # its process is gone, and so was every one that Ray started after it
            raise StageFailed(self._died(key, error)) from None
        finally:
            self.training.discard(key)

    def _died(self, key: str, error: Exception) -> str:
        """Leave word of a stage in place of its process, which could not; returns the reason."""
        more_memory = "free memory or run with fewer --cpus, then run the same command"
        match error:
            case ray.exceptions.OutOfMemoryError():
                reason = f"Ray ended its process again and again, for the machine's memory was full; {more_memory}"
            case ray.exceptions.WorkerCrashedError():
                reason = f"its process died {1 + RETRIES} times, as where the kernel kills for memory; {more_memory}"
            case _:
                reason = f"{(str(error).strip().splitlines() or ['no reason'])[0]}; run the same command"
        told = f"{type(error).__name__}: {reason}"
        if not self.context.stopping() and self.store.folder(key).is_dir():
            with contextlib.suppress(OSError):
                write_json(self.store.folder(key) / FAILURE, {"error": told, "traceback": str(error)})
        return told

    async def _submit(self, key: str, spec: Any, expired: str | None) -> None:
        task: Any = ray.remote(compute).options(
            name=f"{spec.kind}-{key[:8]}", max_retries=RETRIES, retry_exceptions=[RankDied], **self._needs(spec)
        )
        await task.remote(spec.model_dump_json(), self.context, expired)

    def _needs(self, spec: Any) -> dict[str, Any]:
        """Ray options: cores, GPUs and place of the process that computes a stage."""
        gpus = self._gpus(spec)
        if spec.kind in READS_FILES:
            return {"num_cpus": min(spec.threads, self.here.cpus), **pinned(self.here)}
        if spec.kind == "throughput":  # hardware is the driver's, all of it, so that nothing runs beside
            return {"num_cpus": self.here.cpus, "num_gpus": self.here.gpus if gpus else 0, **pinned(self.here)}
        if spec.world_size > 1:  # waits for its ranks, which have the cores
            return {"num_cpus": 0, **pinned(self.here)}
        return {"num_cpus": spec.threads, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}

    def _share(self, spec: Any) -> tuple[float, float, float]:
        """Cores, GPUs and bytes that a stage takes, all its processes together; never more than there are."""
        memory = min(self.memory.get(spec.key, 0) * spec.world_size, self.free)
        if spec.kind == "throughput":  # which may be asked for while others train
            return self.cores, self._gpus(spec), memory
        return min(spec.cores, self.cores), self._gpus(spec) * spec.world_size, memory

    def _gpus(self, spec: Any) -> float:
        """Of each process of a stage."""
        return self.context.gpus_per_stage if uses_device(spec) else 0.0


def from_the_start(plan: Plan) -> list[str]:
    """What is needed however the trials go on, as far as it is known: all of it, or with early stopping each path up to
    its first judgement."""
    judged = {(trial, evaluation) for rung in plan.rungs for trial, evaluation in rung.judged.items()}
    wanted = []
    for trial in plan.trials:
        for step in trial.steps:
            wanted += [step.train.key, step.evaluate.key]
            if (trial.name, step.evaluate.key) in judged:
                break
    return list(dict.fromkeys([*wanted, *plan.waits]))


def trains(spec: Any) -> bool:
    """Whether a stage trains a model; the others make what it begins from, or judge what it made."""
    return hasattr(spec, "optimizer")


def start_broker(request: Path, context: RunContext, nodes: tuple[Node, ...]) -> Any:
    """Start the broker on the driver's node; one that dies is started again and finds finished stages in the store.

    `request` is the file of what it will be asked for, which must stay.
    """
    actor = ray.remote(Broker).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=10_000, **pinned(nodes[0])
    )
    return actor.remote(request, context, nodes)
