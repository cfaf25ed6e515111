"""A search that learns: points drawn in rounds, each round from what all trials of the rounds before came to.

Pure functions of a study and of results. Invariant: a round is a stage, whose key has all that it was drawn from, so
the same command draws nothing twice, in whatever order trials end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.study.explain import takes
from orchestrator.study.loader import dump
from orchestrator.study.path import Results, Speed
from orchestrator.study.schema import Study
from orchestrator.study.space import Decode, Objective, Uniform
from orchestrator.study.spec import DrawSpec, ThroughputSpec
from orchestrator.study.trial import Trial

Point = dict[str, Any]
Make = Callable[[int, Point], Trial]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The trials that were drawn so far, and what decides the next ones."""

    trials: tuple[Trial, ...] = ()
    rounds: tuple[DrawSpec, ...] = ()
    measured: tuple[ThroughputSpec, ...] = ()  # speeds that trials are judged by
    waits: tuple[str, ...] = ()  # keys of stages whose results decide the next points
    left: int = 0  # trials that are to be drawn yet


def drawing_of(study: Study, results: Results, speed: Speed, make: Make) -> Drawing:
    """As far as results tell; `make` plans a trial by its number and its point."""
    search = study.search
    if search.method != "optuna":
        return Drawing()
    wanted = search.trials or 0
    trials: list[Trial] = []
    rounds: list[DrawSpec] = []
    measured: list[ThroughputSpec] = []
    told: list[tuple[float, ...]] = []
    waits: list[str] = []
    while len(trials) < wanted and not waits:
        spec = _round(study, min(search.learning.batch, wanted - len(trials)), rounds, tuple(told))
        rounds.append(spec)
        result = results(spec.key)
        if result is None:
            waits = [spec.key]
            break
        if not result["points"]:  # the space has no more
            wanted = len(trials)
            break
        new = [make(len(trials) + number, point) for number, point in enumerate(result["points"])]
        trials += new
        told = []
        for trial in new:
            values = []
            for objective in search.learning.objectives:
                needed, value = _value(trial, objective, study, results, speed)
                measured += [needed] if needed is not None else []
                values.append(value)
            known = [value for value in values if isinstance(value, float)]
            waits += [value for value in values if isinstance(value, str)]
            told.append(tuple(known))
    if len(trials) == wanted:
        waits = []  # nothing more is drawn
    return Drawing(tuple(trials), tuple(rounds), tuple(measured), tuple(dict.fromkeys(waits)), wanted - len(trials))


def _round(study: Study, count: int, before: list[DrawSpec], told: tuple[tuple[float, ...], ...]) -> DrawSpec:
    search = study.search
    keys = [key for space in search.spaces for key, axis in space.items() if isinstance(axis, Uniform)]
    return DrawSpec(
        previous=before[-1].key if before else None,
        told=told,
        spaces=tuple({key: dump(axis) for key, axis in space.items()} for space in search.spaces),
        whole=tuple(sorted({key for key in keys if takes(key) == "integer"})),
        sampler=search.learning.sampler,
        directions=tuple("minimize" if each == "ratio" else "maximize" for each in search.learning.objectives),
        count=count,
        seed=study.seed,
    )


def _value(
    trial: Trial, objective: Objective, study: Study, results: Results, speed: Speed
) -> tuple[ThroughputSpec | None, float | str]:
    """What is measured for an objective beside its path, and its value, or the key that it waits for."""
    if trial.path.waits is not None:
        return None, trial.path.waits
    end = trial.end
    assert end is not None
    if objective == "ratio":
        quality = results(end.evaluate.key)
        return None, end.evaluate.key if quality is None else float(quality["perplexity_ratio"])
    spec = speed(end)
    told = results(spec.key)
    length = objective.decode if isinstance(objective, Decode) else max(study.throughput.lengths)
    return spec, spec.key if told is None else _decode(told, length)


def _decode(result: Mapping[str, Any], length: int) -> float:
    return float(result["decode_ratio"][str(length)])
