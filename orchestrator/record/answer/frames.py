"""Records -> frames of texts: what each column tells of a row, in which order rows stand, which columns a table has.

Place in the flow: text, Markdown and the page print these frames. Invariant: what was not measured is a dash, never a
number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from orchestrator.record.groups import GIVEN_BACK, Record, best_by_layers, students
from orchestrator.record.screen.plan_view import layer_ranges
from orchestrator.study.plan import Plan
from orchestrator.study.reported import Report

COLUMNS = ["swapped", "tokens", "perplexity", "ratio", "agree", "hit", "miss", "copied", "greedy", "sampled"]
COLUMNS += ["prefill", "decode"]
NARROW = ["swapped", "tokens", "ratio", "agree", "hit", "prefill", "decode"]  # for a terminal
LEAD = ["swapped", "layers", "ratio", "hit", "decode", "prefill"]
QUALITY = {  # metric, digits after the point
    "perplexity": ("perplexity", 2),
    "ratio": ("perplexity_ratio", 3),
    "agree": ("agreement", 3),
    "hit": ("hit_nll", 3),
    "miss": ("miss_nll", 3),
    "copied": ("generation_agreement", 2),
    "greedy": ("greedy_generation_perplexity", 2),
    "sampled": ("sampled_generation_perplexity", 2),
    "kl": ("kl", 3),
}
SPEEDS = ("prefill", "decode", "train")
UP = {"swapped", "seeds", "agree", "copied", *SPEEDS}  # more is better; of all others less is
SAME = "same"  # of a ratio whose interval holds 1


def longest(plan: Plan) -> str:
    """The length that tables and pictures tell speeds at."""
    return str(max(plan.study.throughput.lengths))


def asked(report: Report, rows: Sequence[Record], usual: Sequence[str]) -> list[str]:
    """The columns that a study names, or the usual ones, with the number of seeds where any has several."""
    if report.columns is not None:
        return list(report.columns)
    several = any(len(row.get("ratios", ())) > 1 for row in rows)
    return [usual[0], *(["seeds"] if several else []), *usual[1:]]


def table(rows: Sequence[Record], length: str, name: str = "name", columns: Collection[str] = COLUMNS) -> pd.DataFrame:
    """A line of texts for every row; `name` is the key of what it is called, with its words where that is a trial."""
    lines = [{"row": _called(row, name), **{each: cell(row, each, length) for each in columns}} for row in rows]
    return pd.DataFrame(lines, columns=["row", *columns], dtype=str)


def lead_table(records: list[Record], length: str, report: Report) -> pd.DataFrame:
    """For every number of swapped layers the best student, the teacher before them."""
    rows = [row for row in records if row["kind"] == "teacher"] + best_by_layers(students(records))
    columns = [*LEAD[:2], *(each for each in asked(report, rows, LEAD) if each not in LEAD[:2])]
    lines = [
        {**{each: cell(row, each, length) for each in columns}, "stage": f"{row['name']} {row['words']}".strip()}
        for row in rows
    ]
    return pd.DataFrame(lines, columns=[*columns, "stage"], dtype=str)


def _called(row: Record, name: str) -> str:
    if name == "trial":
        return f"{row['label']} {row['words']}"
    return f"{row[name]}{', given back' if row['outcome'] == GIVEN_BACK else ''}"


def value(row: Record, column: str, length: str) -> Any:
    """What a column tells of a row as a number or a text to sort by; None where it was not measured."""
    metrics = row["metrics"]
    if column in QUALITY:
        return metrics.get(QUALITY[column][0])
    if column in SPEEDS:
        return _at(metrics.get(f"{column}_ratio"), length)
    match column:
        case "swapped":
            return len(row["swapped_layers"])
        case "layers":
            return layer_ranges(row["swapped_layers"])
        case "seeds":
            return len(row["ratios"]) if "ratios" in row else None
        case _:
            return metrics["student_tokens"]


def cell(row: Record, column: str, length: str) -> str:
    """The same as a text, with its error where that is known."""
    told = value(row, column, length)
    if told is None or told == "":
        return "-"
    if column in QUALITY:
        metric, digits = QUALITY[column]
        around = row.get("spread", {}).get(metric)
        return f"{told:.{digits}f}" + ("" if around is None else f" ± {around:.{digits}f}")
    if column in SPEEDS:
        return times(told, bounds_of(row["metrics"], column, length))
    match column:
        case "swapped":
            return f"{told}/{row['total_layers']}"
        case "tokens":
            return f"{told:,}"
        case _:
            return str(told)


def bounds_of(metrics: dict[str, Any], speed: str, length: str) -> tuple[float, float] | None:
    """The interval of a ratio of speeds; None where it was measured in one turn, or before intervals were kept."""
    found = _at(metrics.get(f"{speed}_interval"), length)
    return None if found is None else (found[0], found[1])


def _at(found: Any, length: str) -> Any:
    """A number of its own, or that of a length."""
    return found.get(length) if isinstance(found, dict) else found


def times(ratio: float, bounds: tuple[float, float] | None) -> str:
    """A ratio as people write it: `1.64 ± 0.05x` with the farther side of its interval, `same` where that holds 1."""
    if bounds is None:
        return f"{ratio:.2f}x"
    low, high = bounds
    if low <= 1.0 <= high:
        return SAME
    return f"{ratio:.2f} ± {max(high - ratio, ratio - low, 0.01):.2f}x"


def in_order(rows: Sequence[Record], report: Report, length: str) -> list[Record]:
    """The rows by what the study sorts by, the better first and what was not measured last."""
    if report.sort is None:
        return list(rows)
    column = report.sort
    told = [(row, value(row, column, length)) for row in rows]
    known = sorted((each for each in told if each[1] is not None), key=lambda each: each[1], reverse=column in UP)
    return [row for row, _ in known] + [row for row, value_ in told if value_ is None]
