"""The cheapest set of swaps that is fast enough: an integer program, solved to its optimum.

Costs and times are taken to add up over layers, as they were measured with one layer swapped alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from orchestrator.study.spec import Solve

Pair = tuple[int, int]  # a layer, and which operator it is swapped by


def solved(scores: Mapping[Pair, float], seconds: Mapping[Pair, float], asked: Solve) -> dict[int, int]:
    """By layer the operator of the set with the lowest sum of scores that has the asked speed and number of layers.

    `seconds` are what each swap adds to the time of a token, mostly below zero. Raises `ValueError` where no set is so
    fast, or has so many layers; it names the fastest.
    """
    pairs = sorted(scores)
    layers = sorted({layer for layer, _ in pairs})
    if asked.layers is not None and asked.layers > len(layers):
        raise ValueError(
            f"schedule.choice.until.layers: {asked.layers} layers cannot be swapped of {len(layers)}: lower it"
        )
    times = np.array([seconds[pair] for pair in pairs]) / asked.seconds  # of the teacher's, so that all are near 1
    rules = [LinearConstraint(np.array([[layer == of for of, _ in pairs] for layer in layers], dtype=float), ub=1.0)]
    if asked.decode is not None:
        rules.append(LinearConstraint(times[None], ub=1.0 / asked.decode - 1.0))
    if asked.layers is not None:
        rules.append(LinearConstraint(np.ones((1, len(pairs))), lb=asked.layers, ub=asked.layers))
    found = milp(
        np.array([scores[pair] for pair in pairs]),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0.0, 1.0),
        constraints=rules,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(
            f"schedule.choice.until.decode: {asked.decode:g} times the teacher's speed is out of reach: by what was "
            f"measured of single layers the fastest student has {fastest(seconds, asked):.3f} times: lower it, or give "
            "faster operators"
        )
    return {layer: operator for (layer, operator), taken in zip(pairs, found.x, strict=True) if taken > 0.5}


def fastest(seconds: Mapping[Pair, float], asked: Solve) -> float:
    """The highest speed over the teacher's that any set of that many layers is predicted to have."""
    layers = sorted({layer for layer, _ in seconds})
    least = sorted(min(added for (of, _), added in seconds.items() if of == layer) for layer in layers)
    taken = [added for added in least if added < 0] if asked.layers is None else least[: asked.layers]
    return asked.seconds / (asked.seconds + sum(taken))
