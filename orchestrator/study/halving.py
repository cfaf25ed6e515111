"""Early stopping by successive halving: where students are compared, and which of them are good enough to go on.

Pure functions of the plan and of results. Invariant: students are compared that have equally many swapped layers after
equally many trained tokens, and all of them at once, so nothing depends on which was evaluated first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from orchestrator.study.stages import Step


@dataclasses.dataclass(frozen=True)
class Rung:
    """Students on equal terms: every trial that has one there, with the key of its evaluation."""

    swapped: int  # layers
    tokens: int  # trained on the path so far
    judged: Mapping[str, str]  # trial -> evaluation


def rungs_of(paths: Mapping[str, Sequence[Step]], grace_layers: int) -> tuple[Rung, ...]:
    """Where a trial may be stopped, in the order of trained tokens: two students at least, and stages left to save."""
    found: dict[tuple[int, int], dict[str, str]] = {}
    for trial, steps in paths.items():
        for step in steps:
            if len(step.swapped) >= grace_layers:
                found.setdefault((step.tokens, len(step.swapped)), {})[trial] = step.evaluate.key
    ends = {trial: steps[-1].evaluate.key for trial, steps in paths.items()}
    return tuple(
        Rung(swapped, tokens, judged)
        for (tokens, swapped), judged in sorted(found.items())
        if len(set(judged.values())) > 1 and any(ends[trial] != judged[trial] for trial in judged)
    )


def good_enough(ratios: Mapping[str, float], reduction_factor: int) -> set[str]:
    """Of evaluations with their perplexity ratios the best, one of `reduction_factor`, rounded up; ties all stay."""
    if not ratios:
        return set()
    last = sorted(ratios.values())[math.ceil(len(ratios) / reduction_factor) - 1]
    return {key for key, ratio in ratios.items() if ratio <= last}
