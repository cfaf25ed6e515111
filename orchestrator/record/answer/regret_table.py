"""Regret told: tables for a terminal and for `regret.md`, its picture, and plain data.

Place in the flow: `record.regret` judges, the command prints and writes what is here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import colormaps, ticker

from orchestrator.record.answer.markdown import pipe_table
from orchestrator.record.answer.text import text_table
from orchestrator.record.regret import Error, Judged, Row, Truth
from orchestrator.record.screen.plan_view import layer_ranges

COST = ["scores", "trained", "read", "seconds"]
LEGEND = (
    "regret: perplexity ratio less that of the best set of as many layers, a mean over numbers of layers, ± a\n"
    "standard error paired over seeds. held out: against the set that is best on the other seeds; it may be below\n"
    "none. hits: the same in nats per token on tokens that can be copied. of: numbers of layers of the mean. tau:\n"
    "of its first choice, with its 95 % interval. scores, trained, read, seconds: what choosing cost. ~: a tie,\n"
    "less than two errors; n/N: the rank among all sets of as many layers. uniform: evenly spread. exact: the lowest\n"
    "sum of single scores."
)

COLOURS, MARKS = colormaps["tab20"], "ovs^DPX*"  # lines lie over each other: where two agree, both marks show


def way_table(ways: Sequence[Judged]) -> pd.DataFrame:
    """A line for every way."""
    lines = []
    for each in ways:
        cost, tau = each.way.cost, each.way.tau
        lines.append(
            {
                "way": each.way.name,
                "regret": error_text(each.regret),
                "held out": error_text(each.held_out),
                "hits": error_text(each.hits),
                "of": str(sum(row.among > 1 for row in each.rows)),
                "tau": "-" if tau is None else "{:.2f} [{:.2f}, {:.2f}]".format(*tau),
                "scores": "-" if cost is None else str(cost.scores),
                "trained": "-" if cost is None else f"{cost.trained:,}",
                "read": "-" if cost is None else f"{cost.read:,}",
                "seconds": "-" if cost is None else f"{cost.seconds:.0f}",
            }
        )
    columns = ["way", "regret", "held out", "hits", "of", "tau", *COST]
    return pd.DataFrame(lines, columns=columns, dtype=str)


def count_table(ways: Sequence[Judged]) -> pd.DataFrame:
    """Regret and rank of every way by the number of swapped layers."""
    counts = sorted({row.count for each in ways for row in each.rows if row.among > 1})
    lines = []
    for each in ways:
        there = {row.count: row for row in each.rows}
        cells = {f"{count} swapped": _cell(there[count]) if count in there else "-" for count in counts}
        lines.append({"way": each.way.name, **cells})
    return pd.DataFrame(lines, columns=["way", *(f"{count} swapped" for count in counts)], dtype=str)


def row_table(ways: Sequence[Judged]) -> pd.DataFrame:
    """Every number: a line for every way and number of layers."""
    lines = [
        {
            "way": each.way.name,
            "swapped": str(row.count),
            "layers": " or ".join(layer_ranges(layers) for layers in row.sets),
            "ratio": error_text(row.ratio),
            "regret": error_text(row.regret) + (" ~" if row.tie else ""),
            "held out": error_text(row.held_out),
            "hits": error_text(row.hits),
            "rank": f"{row.rank:g}/{row.among}",
        }
        for each in ways
        for row in each.rows
    ]
    columns = ["way", "swapped", "layers", "ratio", "regret", "held out", "hits", "rank"]
    return pd.DataFrame(lines, columns=columns, dtype=str)


def _cell(row: Row) -> str:
    return f"{row.regret[0]:.4f}{'~' if row.tie else ''} {row.rank:g}/{row.among}"


def error_text(told: Error | None) -> str:
    """A mean with its error in four digits; a dash where there is none."""
    if told is None or math.isnan(told[0]):
        return "-"
    return f"{told[0]:.4f}" + ("" if told[1] is None else f" ± {told[1]:.4f}")


def regret_text(title: str, ways: Sequence[Judged]) -> str:
    """What a terminal shows."""
    frame = way_table(ways)
    costs = frame[frame["scores"] != "-"][["way", *COST]]
    tables = [frame.drop(columns=COST), count_table(ways), costs]
    return "\n\n".join([title, *map(text_table, tables), LEGEND])


def regret_markdown(title: str, ways: Sequence[Judged], notes: Sequence[str]) -> str:
    """The page `regret.md`."""
    parts = [f"# {title}", pipe_table(way_table(ways)), "![Regret by the number of swapped layers](regret.png)"]
    parts += ["## By the number of swapped layers", pipe_table(count_table(ways)), LEGEND]
    parts += ["## Every number", pipe_table(row_table(ways)), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def regret_json(study: str, truth_name: str, truth: Truth, ways: Sequence[Judged]) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "study": study,
        "truth": truth_name,
        "sets": [
            {"layers": list(layers), "ratios": truth.ratios[layers], "hits": truth.hits[layers]}
            for layers in sorted(truth.ratios, key=lambda layers: (len(layers), layers))
        ],
        "ways": [dataclasses.asdict(each) for each in ways],
    }


def draw_regret(title: str, ways: Sequence[Judged], path: Path) -> None:
    """Regret by the number of swapped layers, a line a way, the best set at none."""
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for index, each in enumerate(ways):
        rows = [row for row in each.rows if row.among > 1]
        axis.errorbar(
            [row.count for row in rows], [row.regret[0] for row in rows], [row.regret[1] or 0.0 for row in rows],
            label=each.way.name, color=COLOURS(index % 20), linestyle="-" if each.way.cost else ":",
            marker=MARKS[index % len(MARKS)], markersize=5, elinewidth=1, capsize=2,
        )  # fmt: skip
    axis.axhline(0, color="0.6", lw=1)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.set_xlabel("swapped layers")
    axis.set_ylabel("perplexity ratio less the best set's (down is better)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
