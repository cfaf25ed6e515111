"""What was decided, told: a line or two for a terminal, tables for the report.

Place in the flow: `record.choices` reads plan and store; text, Markdown and the page print what is here. Invariant: a
number without its error stands only where there is none, or beside the table that has it.
"""

from __future__ import annotations

import textwrap

import pandas as pd

from orchestrator.record.choices import EXCESS, Chosen, Decided
from orchestrator.record.columns import WIDE
from orchestrator.record.decisions import (
    became_text,
    by_text,
    choice_name,
    choice_text,
    gate_text,
    is_told,
    near,
    trials_text,
)
from orchestrator.record.screen.plan_view import layer_ranges

NOTHING = Decided()
LEGEND = (
    "order: the candidates, the one that goes first at the start. score: nats per token that swapping a layer costs,\n"
    "or that giving it back gains, ± a standard error; of loss and hits what is more than the teacher's own; of joint\n"
    "scalars the blend, from 0, attention, to 1. tied: within two standard errors of the first, paired over windows.\n"
    "tau: Kendall's, between this order and those of windows drawn anew, with its 95 % interval; near 1 is sure.\n"
    "trained, read: tokens that students trained on to be scored, and held-out tokens that all scores read."
)


def decided_lines(decided: Decided) -> list[str]:
    """For a terminal: two lines a decision, one for every gate that did more than let a stage pass."""
    lines = []
    for chosen in decided.choices:
        lines += _broken(choice_text(chosen))
        lines += _broken(f"  {_sure(chosen)}{_cost(chosen)}")
    return [*lines, *(line for gated in decided.gates if is_told(gated) for line in _broken(gate_text(gated)))]


def choice_table(decided: Decided) -> pd.DataFrame:
    """A line for every decision."""
    lines = [
        {
            "row": choice_name(chosen),
            "at": chosen.student,
            "by": by_text(chosen),
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
            "row": choice_name(chosen),
            "place": str(place),
            "layer": f"{layer} {chosen.operators.get(layer, '')}".rstrip(),
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
            "row": f"{trials_text(gated.trials)} stage {gated.stage}",
            "layers": layer_ranges(gated.layers),
            "ratios": ", then ".join(f"{ratio:.3f}" for ratio in gated.ratios),
            "limit": f"{gated.limit:g}",
            "became": became_text(gated),
        }
        for gated in decided.gates
    ]
    return pd.DataFrame(lines, columns=["row", "layers", "ratios", "limit", "became"], dtype=str)


def _sure(chosen: Chosen) -> str:
    tau = "" if chosen.tau is None else "tau {:.2f} [{:.2f}, {:.2f}]; ".format(*chosen.tau)
    teacher = chosen.teacher if chosen.measure in EXCESS else None
    return tau + ("" if teacher is None else f"teacher {near(*teacher)}; ")


def _cost(chosen: Chosen) -> str:
    cost = chosen.cost
    parts = [f"{cost.scores} scores of {cost.read:,} tokens"] if cost.scores else []
    parts += [f"{cost.trained:,} tokens trained"] if cost.trained else []
    return ", ".join([*parts, f"{cost.seconds:.1f} s"])


def _broken(line: str) -> list[str]:
    return textwrap.wrap(line, WIDE, subsequent_indent="    ", drop_whitespace=True)
