"""The search space of a study -> the points to try. Drawn here, so that a plan shows them before anything runs.

Invariant: more trials of a random search are the same points and further ones, so what was computed stays in use.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from orchestrator.study.explain import takes
from orchestrator.study.schema import Study
from orchestrator.study.space import Axis, Space, Uniform

Point = dict[str, Any]


def sample(study: Study) -> list[Point]:
    """The points to try: the product of each space's axes, or seeded draws; each point once, in a fixed order.

    A random search has as many as it asks for, or all there are where its spaces have fewer. One that learns has none:
    they are drawn as it goes, see `drawing`.
    """
    spaces = study.search.spaces
    if study.search.method == "optuna":
        return []
    points = _product(spaces) if study.search.method == "grid" else drawn_at_random(spaces, random.Random(study.seed))
    return list(itertools.islice(_new(points), study.search.trials))


def _product(spaces: tuple[Space, ...]) -> Iterator[Point]:
    for space in spaces:
        axes = [list(axis) for axis in space.values() if not isinstance(axis, Uniform)]
        yield from (dict(zip(space, choice, strict=True)) for choice in itertools.product(*axes))


def drawn_at_random(spaces: tuple[Space, ...], generator: random.Random) -> Iterator[Point]:
    """Points of the spaces in turn, until every one of all spaces was drawn."""
    drawn: list[set[str]] = [set() for _ in spaces]
    sizes = [math.prod(_size(key, axis) for key, axis in space.items()) for space in spaces]
    for turn in itertools.count():
        if all(len(found) >= size for found, size in zip(drawn, sizes, strict=True)):
            return
        place = turn % len(spaces)
        point = {key: _draw(key, axis, generator) for key, axis in spaces[place].items()}
        drawn[place].add(_text(point))
        yield point


def _draw(key: str, axis: Axis, generator: random.Random) -> Any:
    if not isinstance(axis, Uniform):
        return generator.choice(list(axis))
    if axis.step is not None:
        return axis.low + axis.step * generator.randrange(_steps(axis))
    if takes(key) != "integer":
        if axis.log:
            return axis.low * (axis.high / axis.low) ** generator.random()
        return generator.uniform(axis.low, axis.high)
    low, high = int(axis.low), int(axis.high)
    if not axis.log:
        return generator.randint(low, high)
    least, most = low - 0.5, high + 0.5  # so that the ends have as much of the scale as other numbers
    return min(high, max(low, round(least * (most / least) ** generator.random())))


def _size(key: str, axis: Axis) -> float:
    """How many values an axis has."""
    if not isinstance(axis, Uniform):
        return len({_text(value) for value in axis})
    if axis.step is not None:
        return _steps(axis)
    return int(axis.high) - int(axis.low) + 1 if takes(key) == "integer" else math.inf


def _steps(axis: Uniform) -> int:
    """How many values lie in steps from the lower bound to the upper one."""
    return int((axis.high - axis.low) / (axis.step or 1) + 1e-9) + 1


def _new(points: Iterator[Point]) -> Iterator[Point]:
    """Those that did not come before."""
    seen: set[str] = set()
    for point in points:
        if _text(point) not in seen:
            seen.add(_text(point))
            yield point


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
