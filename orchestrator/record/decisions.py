"""What results have decided of a study, in words: the layers that were chosen, by which scores, and what gates made of
stages.

Place in the flow: `record.choices` reads plan and store; the terminal says these lines while a study runs, and the
answer, the report and MLflow tell them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from orchestrator.record.choices import EXCESS, GATE, TEACHER, Chosen, Gated, choices_of, gates_of
from orchestrator.record.records import trial_words
from orchestrator.record.screen.plan_view import layer_ranges
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan

SHOWN = 6  # layers of an order that a line tells
NAMED = 3  # trials that a line names
BECAME = {
    "kept": "kept",
    "extended": "trained on",
    "given_back": "given back",
    "last": "the end of its path",
    None: "not decided yet",
}


def decided(before: Plan, after: Plan, store: Store) -> Iterator[str]:
    """A line for everything that was decided between two states of a plan, once for all trials that rest on it."""
    known = {trial.name for trial in before.trials}
    words = trial_words(after)
    for trial in after.trials:
        if trial.name not in known:
            yield f"drawn  {trial.name}: {words[trial.name]}"
    new = _made(after) - _made(before)
    for chosen in choices_of(after, store):
        if chosen.key in new:
            yield f"chosen {choice_text(chosen)}"
    said = {gate_text(gated) for gated in gates_of(before, store) if is_told(gated)}
    for gated in gates_of(after, store):
        if is_told(gated) and gate_text(gated) not in said:
            yield gate_text(gated)


def _made(plan: Plan) -> set[str]:
    """Keys of the decisions that the plan goes by; the last of a path may not be made yet."""
    paths = [trial.path for trial in plan.trials]
    return {each.spec.key for path in paths for each in path.decisions if each.spec.key != path.waits}


def choice_text(chosen: Chosen) -> str:
    """`trial-00 choice 2, at stage 1, by hits: 0 (+0.03), 1 (+0.6); tied with the first: 1`."""
    return f"{choice_name(chosen)}, {_found(chosen)}"


def choice_line(chosen: Chosen) -> str:
    """The same as an item of a trial's own list."""
    return f"- choice {chosen.number}, {_found(chosen)}"


def choice_name(chosen: Chosen) -> str:
    """`trial-00 choice 2`."""
    return f"{trials_text(chosen.trials)} choice {chosen.number}"


def gate_text(gated: Gated) -> str:
    """`trial-04 stage 2, layers 1: 1.032 above 1.01, trained on, then 1.028: given back`."""
    first, *others = gated.ratios
    told = f"{first:.3f} {_against(first, gated.limit)}" + "".join(f", trained on, then {each:.3f}" for each in others)
    place = f"{trials_text(gated.trials)} stage {gated.stage}, layers {layer_ranges(gated.layers)}"
    return f"{place}: {told}: {became_text(gated)}"


def is_told(gated: Gated) -> bool:
    """Whether a gate did more than let a stage pass."""
    return gated.outcome is not None and (len(gated.ratios) > 1 or gated.outcome != "kept")


def became_text(gated: Gated) -> str:
    """What became of the stage."""
    above = gated.outcome == "kept" and gated.ratios[-1] > gated.limit
    return "kept all the same" if above else BECAME[gated.outcome]


def by_text(chosen: Chosen) -> str:
    """What a choice went by."""
    alone = "" if chosen.ascending or chosen.measure == GATE else ", restored alone"
    return f"{'joint scalars' if chosen.measure == GATE else chosen.measure}{alone}"


def trials_text(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def near(score: float, error: float | None, signed: bool = False) -> str:
    """A number with as many digits as its error has: two."""
    sign = "+" if signed else ""
    if error is None or not error > 0:
        return f"{score:{sign}.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{score:{sign}.{digits}f} ± {error:.{digits}f}"


def _found(chosen: Chosen) -> str:
    at = "the teacher" if chosen.student == TEACHER else chosen.student
    sign = "+" if chosen.measure in EXCESS else ""
    told = []
    for layer in chosen.order[:SHOWN]:
        by = f"{chosen.operators[layer]}, " if layer in chosen.operators else ""
        told.append(f"{layer} ({by}{chosen.scores[layer][0]:{sign}.3g})")
    more = len(chosen.order) - SHOWN
    tied = f"; tied with the first: {', '.join(map(str, chosen.tied))}" if chosen.tied else ""
    return f"at {at}, by {by_text(chosen)}: " + ", ".join(told) + (f" and {more} more" if more > 0 else "") + tied


def _against(ratio: float, limit: float) -> str:
    return f"{'above' if ratio > limit else 'within'} {limit:g}"
