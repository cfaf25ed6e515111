"""What is left of a plan, in seconds and megabytes, from what the stages of this store took.

Place in the flow: `plan` tells it before anything runs. Invariant: a single number is told only where stages of the
same model, operator, lengths, batch and numerics were measured on such a machine. What is known of others there is told
as a range, and what nothing there is like is named as unknown.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orchestrator.record.screen.sorts import Sort, Took, measured, sort_of
from orchestrator.run.hardware import machine
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec

# A range reaches from what others took over this to that times it. Measured on a CPU: parameters times tokens a second
# of seven GPT-NeoX of 0.3 to 42 M parameters were 3.9e9 to 14e9, and the training of one model with and without an
# operator, a teacher or logits went at 1,300 to 3,700 tokens a second.
DOUBT, OWN_DOUBT = 3.0, 2.0  # of another model, and of the same one

Span = tuple[float, float]  # the least and the most


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one stage."""

    seconds: Span
    megabytes: Span
    near: bool = False  # told by what others took


def estimate(
    plan: Plan, store: Store, speeds: Mapping[str, ThroughputSpec], units: int, here: Callable[[str], str] = machine
) -> dict[str, Any]:
    """Seconds of the wall and of all units, and megabytes, of what the store lacks: from the least to the most.

    `units` are the cores of a CPU, or the GPUs, that work at once; `here` tells the machine of a device. The wall time
    is the work over the units, never less than the longest chain of stages, and the speed measurements after it, one at
    a time. `near` names the kinds of stages that are told by what others took, and `unknown` those that nothing is
    known of: they count nothing, and where one of them trains there is no number at all.
    """
    specs: dict[str, Any] = {**plan.specs, **{spec.key: spec for spec in speeds.values()}}
    left = {key: spec for key, spec in specs.items() if not store.finished(key)}
    took = list(measured(store, specs)) if left else []
    tokens = {step.train.key: step.own_tokens for step in plan.steps}
    sorts = {key: sort_of(spec, specs) for key, spec in left.items()}
    costs: dict[str, Cost | None] = {}
    for key, spec in left.items():
        there = here(plan.device if hasattr(spec, "numerics") else "cpu")  # what only reads files takes no device
        same = [one for one in took if one.machine == there]
        costs[key] = _cost(same, sorts[key], plan.sizes.parameters, tokens.get(key, 0))
    unknown = {key for key, cost in costs.items() if cost is None}
    ends = [_total(plan, left, costs, units, end) for end in (0, 1)]
    if any(tokens.get(key) for key in unknown):
        ends = [dict.fromkeys(end) for end in ends]
    return {
        **{name: None if ends[0][name] is None else tuple(end[name] for end in ends) for name in ends[0]},
        "device": plan.device,
        "units": units,
        "near": _kinds(sorts, (key for key, cost in costs.items() if cost is not None and cost.near)),
        "unknown": _kinds(sorts, unknown),
    }


def _kinds(sorts: Mapping[str, Sort], keys: Iterable[str]) -> list[str]:
    return sorted({sorts[key].kind for key in keys})


def _total(
    plan: Plan, left: Mapping[str, Any], costs: Mapping[str, Cost | None], units: int, end: int
) -> dict[str, float | None]:
    """Of all that is left, at one end of its ranges; stages come after their parents."""
    chains: dict[str, float] = {}
    work = alone = megabytes = 0.0
    for key, spec in left.items():
        cost = costs[key] or Cost((0.0, 0.0), (0.0, 0.0))
        megabytes += cost.megabytes[end]
        if isinstance(spec, ThroughputSpec):
            alone += cost.seconds[end]
            continue
        work += cost.seconds[end] * (spec.cores if plan.device == "cpu" else spec.world_size)
        before = max((chains.get(parent, 0.0) for parent in spec.parents.values()), default=0.0)
        chains[key] = before + cost.seconds[end]
    wall = max(work / units, max(chains.values(), default=0.0))
    return {"wall_seconds": wall + alone, "unit_seconds": work + alone, "megabytes": megabytes}


def _cost(took: list[Took], sort: Sort, parameters: int, budget: int) -> Cost | None:
    """Of a stage that trains on `budget` tokens of a model of so many parameters; None where nothing is known of it."""
    same = [one for one in took if one.sort.like == sort.like]
    rates = [one.rate for one in same if one.rate]
    beside = [one.beside for one in same if one.beside is not None]
    if not (rates if budget else beside):
        return _near(took, sort, parameters, budget)
    seconds = (statistics.median(beside) if beside else 0.0) + (budget / statistics.median(rates) if budget else 0.0)
    megabytes = statistics.median(one.megabytes for one in same)
    return Cost((seconds, seconds), (megabytes, megabytes))


def _near(took: list[Took], sort: Sort, parameters: int, budget: int) -> Cost | None:
    """The same from what was measured in its way: of its model where there is such, else of any, by parameters."""
    there = [one for one in took if one.sort.way == sort.way and (one.rate or not budget)]
    own = [one for one in there if one.sort.model == sort.model]
    times, sizes = [], []
    for one in own or [one for one in there if one.parameters]:
        larger = 1.0 if own else parameters / (one.parameters or parameters)
        trained = budget / one.rate if one.rate else 0.0
        times.append(larger * ((one.beside or 0.0) * sort.work / one.sort.work + trained))
        sizes.append(larger * one.megabytes)
    if not times:
        return None
    doubt = OWN_DOUBT if own else DOUBT
    return Cost(_doubted(times, doubt), _doubted(sizes, doubt), near=True)


def _doubted(values: list[float], doubt: float) -> Span:
    return min(values) / doubt, max(values) * doubt
