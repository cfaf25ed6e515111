"""What was decided, told: a line or two for a terminal, tables for the report.

Place in the flow: `record.choices` reads plan and store; text, Markdown and the page print what is here. Invariant: a
number without its error stands only where there is none, or beside the table that has it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import pandas as pd

from orchestrator.record.choices import EXCESS, GATE, TEACHER, Chosen, Decided, Gated
from orchestrator.record.columns import WIDE
from orchestrator.record.screen.plan_view import layer_ranges

NOTHING = Decided()
SHOWN = 6  # layers of an order that a line tells
NAMED = 3  # trials that a line names
LEGEND = (
    "order: the candidates, the one that goes first at the start. score: nats per token that swapping a layer costs,\n"
    "or that giving it back gains, ± a standard error; of loss and hits what is more than the teacher's own; of joint\n"
    "scalars the blend, from 0, attention, to 1. tied: within two standard errors of the first, paired over windows.\n"
    "tau: Kendall's, between this order and those of windows drawn anew, with its 95 % interval; near 1 is sure.\n"
    "trained, read: tokens that students trained on to be scored, and held-out tokens that all scores read."
)
BECAME = {
    "kept": "kept",
    "extended": "trained on",
    "given_back": "given back",
    "last": "the end of its path",
    None: "not decided yet",
}


def decided_lines(decided: Decided) -> list[str]:
    """For a terminal: two lines a decision, one for every gate that did more than let a stage pass."""
    lines = []
    for chosen in decided.choices:
        lines += _broken(f"{_name(chosen)}, at {_at(chosen)}, {_by(chosen)}: {_order(chosen)}")
        lines += _broken(f"  {_sure(chosen)}{_cost(chosen)}")
    told = [gated for gated in decided.gates if len(gated.ratios) > 1 or gated.outcome not in ("kept", None)]
    return [*lines, *(line for gated in told for line in _broken(gate_text(gated)))]


def choice_line(chosen: Chosen) -> str:
    """A decision as an item of a list."""
    return f"- choice {chosen.number}, at {_at(chosen)}, {_by(chosen)}: {_order(chosen)}"


def gate_text(gated: Gated) -> str:
    """`trial-04 stage 2, layers 1: 1.032 above 1.01, trained on, then 1.028: given back`."""
    first, *others = gated.ratios
    told = f"{first:.3f} {_against(first, gated.limit)}" + "".join(f", trained on, then {each:.3f}" for each in others)
    place = f"{_trials(gated.trials)} stage {gated.stage}, layers {layer_ranges(gated.layers)}"
    return f"{place}: {told}: {_became(gated)}"


def choice_table(decided: Decided) -> pd.DataFrame:
    """A line for every decision."""
    lines = [
        {
            "row": _name(chosen),
            "at": chosen.student,
            "by": _by(chosen).removeprefix("by "),
            "order": ", ".join(map(str, chosen.order)),
            "tied": ", ".join(map(str, chosen.tied)) or "-",
            "tau": "-" if chosen.tau is None else "{:.2f} [{:.2f}, {:.2f}]".format(*chosen.tau),
            "teacher": "-" if chosen.teacher is None else near(*chosen.teacher),
            "scores": str(chosen.cost.scores),
            "trained": f"{chosen.cost.trained:,}",
            "read": f"{chosen.cost.read:,}",
            "seconds": f"{chosen.cost.seconds:.1f}",
        }
        for chosen in decided.choices
    ]
    columns = ["row", "at", "by", "order", "tied", "tau", "teacher", "scores", "trained", "read", "seconds"]
    return pd.DataFrame(lines, columns=columns, dtype=str)


def score_table(decided: Decided) -> pd.DataFrame:
    """A line for every candidate of every decision, in its order."""
    lines = [
        {
            "row": _name(chosen),
            "place": str(place),
            "layer": str(layer),
            "score": near(*chosen.scores[layer], signed=chosen.measure in EXCESS),
            "tied": "with the first" if layer in chosen.tied else "-",
        }
        for chosen in decided.choices
        for place, layer in enumerate(chosen.order, 1)
    ]
    return pd.DataFrame(lines, columns=["row", "place", "layer", "score", "tied"], dtype=str)


def gate_table(decided: Decided) -> pd.DataFrame:
    """A line for every stage that a gate looked at."""
    lines = [
        {
            "row": f"{_trials(gated.trials)} stage {gated.stage}",
            "layers": layer_ranges(gated.layers),
            "ratios": ", then ".join(f"{ratio:.3f}" for ratio in gated.ratios),
            "limit": f"{gated.limit:g}",
            "became": _became(gated),
        }
        for gated in decided.gates
    ]
    return pd.DataFrame(lines, columns=["row", "layers", "ratios", "limit", "became"], dtype=str)


def near(score: float, error: float | None, signed: bool = False) -> str:
    """A number with as many digits as its error has: two."""
    sign = "+" if signed else ""
    if error is None or not error > 0:
        return f"{score:{sign}.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{score:{sign}.{digits}f} ± {error:.{digits}f}"


def _name(chosen: Chosen) -> str:
    return f"{_trials(chosen.trials)} choice {chosen.number}"


def _trials(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _at(chosen: Chosen) -> str:
    return "the teacher" if chosen.student == TEACHER else chosen.student


def _by(chosen: Chosen) -> str:
    alone = "" if chosen.ascending or chosen.measure == GATE else ", restored alone"
    return f"by {'joint scalars' if chosen.measure == GATE else chosen.measure}{alone}"


def _order(chosen: Chosen) -> str:
    sign = "+" if chosen.measure in EXCESS else ""
    told = [f"{layer} ({chosen.scores[layer][0]:{sign}.3g})" for layer in chosen.order[:SHOWN]]
    more = len(chosen.order) - SHOWN
    tied = f"; tied with the first: {', '.join(map(str, chosen.tied))}" if chosen.tied else ""
    return ", ".join(told) + (f" and {more} more" if more > 0 else "") + tied


def _sure(chosen: Chosen) -> str:
    tau = "" if chosen.tau is None else "tau {:.2f} [{:.2f}, {:.2f}]; ".format(*chosen.tau)
    teacher = chosen.teacher if chosen.measure in EXCESS else None
    return tau + ("" if teacher is None else f"teacher {near(*teacher)}; ")


def _cost(chosen: Chosen) -> str:
    cost = chosen.cost
    parts = [f"{cost.scores} scores of {cost.read:,} tokens"] if cost.scores else []
    parts += [f"{cost.trained:,} tokens trained"] if cost.trained else []
    return ", ".join([*parts, f"{cost.seconds:.1f} s"])


def _against(ratio: float, limit: float) -> str:
    return f"{'above' if ratio > limit else 'within'} {limit:g}"


def _became(gated: Gated) -> str:
    above = gated.outcome == "kept" and gated.ratios[-1] > gated.limit
    return "kept all the same" if above else BECAME[gated.outcome]


def _broken(line: str) -> list[str]:
    return textwrap.wrap(line, WIDE, subsequent_indent="    ", drop_whitespace=True)
