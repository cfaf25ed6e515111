"""The search space of a study -> the points to try. Drawn here, so that a plan shows them before anything runs."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from orchestrator.study.schema import Study
from orchestrator.study.space import Space, Uniform


def sample(study: Study) -> list[dict[str, Any]]:
    """The points to try: the product of each space's axes, or seeded draws; each point once, in a fixed order."""
    points: list[dict[str, Any]] = []
    if study.search.method == "grid":
        for space in study.search.spaces:
            axes = [list(axis) for axis in space.values() if not isinstance(axis, Uniform)]
            points += [dict(zip(space, choice, strict=True)) for choice in itertools.product(*axes)]
    else:
        generator = random.Random(study.seed)
        for draw in range(study.search.trials or 0):
            space = study.search.spaces[draw % len(study.search.spaces)]
            points.append(_draw(space, generator))
    distinct = {json.dumps(point, sort_keys=True): point for point in points}
    return list(distinct.values())


def _draw(space: Space, generator: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, axis in space.items():
        if isinstance(axis, Uniform):
            if axis.log:
                exponent = generator.random()
                values[key] = axis.low * (axis.high / axis.low) ** exponent
            else:
                values[key] = generator.uniform(axis.low, axis.high)
        else:
            values[key] = generator.choice(list(axis))
    return values
