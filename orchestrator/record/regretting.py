"""`layerswap regret`: ways of choosing layers of one study, held against a study that distilled every set of layers.

Place in the flow: two studies of one home are looked at, `record.regret` judges, files are written beside the study's
report. Invariant: nothing is computed; of what is not finished, nothing is told but that it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.record.choices import Chosen, choices_of, cost_of
from orchestrator.record.regret import Judged, Truth, Way, judge, usual_ways
from orchestrator.run.store import Store
from orchestrator.study.names import schedule_name
from orchestrator.study.plan import Plan, Trial


def truth_of(plan: Plan, store: Store) -> Truth:
    """What trials of a single stage came to, by the layers that it swapped and by seed.

    Raises `ValueError` where none is finished.
    """
    ratios: dict[tuple[int, ...], dict[int, float]] = {}
    hits: dict[tuple[int, ...], dict[int, float]] = {}
    for trial in plan.trials:
        if trial.open or len(trial.steps) != 1 or not store.finished(trial.steps[0].evaluate.key):
            continue
        found, layers = store.result(trial.steps[0].evaluate.key), trial.steps[0].swapped
        ratios.setdefault(layers, {})[trial.study.seed] = float(found["perplexity_ratio"])
        hits.setdefault(layers, {})[trial.study.seed] = float(found["hit_nll"])
    if not ratios:
        raise ValueError(
            f"--truth {plan.study.study}: no set of layers is finished: run it first, each set as one stage"
        )
    return Truth(ratios, hits)


def judged(plan: Plan, truth: Truth, store: Store, name: str) -> tuple[list[Judged], list[str]]:
    """The ways of a study's trials and those that need no stages, with notes of what the truth lacks."""
    ways = [*ways_of(plan, store), *usual_ways(truth.layers, _single_costs(plan, store))]
    found = [judge(way, truth) for way in ways]
    asked = [each for each in found if each.way.cost is not None]  # the study's own
    missing = sorted({layers for each in asked for layers in each.missing}, key=lambda each: (len(each), each))
    notes = [
        f"{name} lacks layers {', '.join(map(str, layers))}: add [[{', '.join(map(str, layers))}]] to its "
        "schedule.layer_order, and run it"
        for layers in missing
    ]
    n = len(truth.layers)
    partly = [k for k in range(1, n + 1) if len(truth.sets(k)) < math.comb(n, k)]
    notes += [f"{name} has {len(truth.sets(k))} of the {math.comb(n, k)} sets of {k} layers" for k in partly]
    open_ = [trial.name for trial in plan.trials if trial.open]
    notes += [f"{', '.join(open_)} did not come to an end yet: run {plan.study.study} again"] if open_ else []
    return found, notes


def ways_of(plan: Plan, store: Store) -> list[Way]:
    """The way of every trial, called by what its schedule differs in, and by the trial too where several have one."""
    names = _shorter([schedule_name(trial.study.schedule) for trial in plan.trials])
    ways = []
    for trial, name in zip(plan.trials, names, strict=True):
        made = choices_of(plan, store, [trial])
        called = name if names.count(name) == 1 else f"{name} ({trial.name})"
        ways.append(Way(called, _sets(trial), _tau(made), cost_of(trial.path.decisions, store)))
    return ways


def _shorter(names: list[str]) -> list[str]:
    """Names without the parts that all have."""
    parts = [name.split(", ") for name in names]
    common = set.intersection(*map(set, parts)) if len(names) > 1 else set()
    return [", ".join(part for part in each if part not in common) or ", ".join(each) for each in parts]


def _sets(trial: Trial) -> dict[int, tuple[tuple[int, ...], ...]]:
    return {len(step.swapped): (step.swapped,) for step in trial.steps if step.outcome != "given_back"}


def _tau(made: Sequence[Chosen]) -> tuple[float, float, float] | None:
    return made[0].tau if made else None


def _single_costs(plan: Plan, store: Store) -> dict[int, float] | None:
    """What swapping each layer alone costs, by the first choice that was made so once, in the study's order."""
    once: Iterable[Any] = (
        trial.path.decisions[0].spec.key
        for trial in plan.trials
        if (choice := trial.study.schedule.choice) is not None
        and (choice.score, choice.scored, choice.rerank, choice.prepared) == ("kl", "swapped_alone", "once", "init")
        and trial.path.decisions
    )
    keys = set(once)
    found = next((each for each in choices_of(plan, store) if each.key in keys), None)
    return None if found is None else {layer: score for layer, (score, _) in found.scores.items()}
