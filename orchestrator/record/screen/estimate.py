"""What is left of a plan, in seconds and megabytes, from what the stages of this store took.

Place in the flow: `plan` tells it before anything runs. Invariant: measured rates only; what no stage of this store has
measured is named, and without a single rate there is no estimate.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from orchestrator.run.store import Store, tree_bytes
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec

Measured = defaultdict[str, list[float]]


def estimate(plan: Plan, store: Store, speeds: dict[str, ThroughputSpec], cores: int) -> dict[str, Any] | None:
    """Wall and core seconds and megabytes of every stage that the store lacks; None where no rate was measured yet.

    The wall time is the work over the cores, never less than the longest chain of stages, and the speed measurements
    after it, one at a time. `unmeasured` names the kinds of stages that had no rate of their own: one that trains gets
    the slowest rate of the others, any other counts nothing.
    """
    rates, fixed, sizes = _measured(store)
    if not rates:
        return None
    tokens = {step.train.key: step.own_tokens for step in plan.steps}
    slowest = min(statistics.median(values) for values in rates.values())
    chains: dict[str, float] = {}
    core_seconds = speed_seconds = megabytes = 0.0
    unmeasured: set[str] = set()
    for key, spec in [*plan.specs.items(), *((spec.key, spec) for spec in set(speeds.values()))]:
        if store.finished(key):
            continue
        stage: Any = spec
        budget = tokens.get(key, 0)
        kind = _kind(stage.kind, budget > 0)
        if kind not in (rates if budget else fixed):
            unmeasured.add(kind)
        seconds = _median(fixed, kind) + (budget / (_median(rates, kind) or slowest) if budget else 0.0)
        megabytes += _median(sizes, kind)
        core_seconds += seconds * spec.cores
        chains[key] = seconds + max((chains.get(parent, 0.0) for parent in spec.parents.values()), default=0.0)
        if isinstance(spec, ThroughputSpec):
            speed_seconds += seconds
            del chains[key]
    longest = max(chains.values(), default=0.0)
    return {
        "wall_seconds": max((core_seconds - speed_seconds) / cores, longest) + speed_seconds,
        "core_seconds": core_seconds,
        "cores": cores,
        "megabytes": megabytes,
        "unmeasured": sorted(unmeasured),
    }


def _measured(store: Store) -> tuple[Measured, Measured, Measured]:
    """By kind of stage: tokens a second of training, seconds beside the training, and megabytes."""
    rates, fixed, sizes = Measured(list), Measured(list), Measured(list)
    for key in store.all_keys():
        try:
            done = store.done(key)
        except (OSError, ValueError):  # not finished, or damaged
            continue
        result = done["result"]
        rate = result.get("tokens_per_s")
        kind = _kind(done["kind"], bool(rate))
        sizes[kind].append(tree_bytes(store.folder(key)) / 2**20)
        if rate:
            rates[kind].append(rate)
        if not result.get("resumed_at"):  # a resumed stage's manifest times its last attempt only
            fixed[kind].append(max(0.0, done["seconds"] - (result["seconds"] if rate else 0.0)))
    return rates, fixed, sizes


def _kind(kind: str, trains: bool) -> str:
    return "skip" if kind == "distil" and not trains else kind


def _median(measured: Measured, kind: str) -> float:
    return statistics.median(measured[kind]) if kind in measured else 0.0
