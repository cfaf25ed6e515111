"""What students were asked as a table, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from orchestrator.distill.measuring.scores import CHANCE_ERRORS
from orchestrator.record.task_results import Told

COLUMNS = ["row", "task", "metric", "items", "student", "teacher", "relative"]
LEGEND = (
    "± one standard error over items. relative: (s - r) / (t - r) for student s, teacher t and chance r, told where t\n"
    f"is more than {CHANCE_ERRORS:g} errors above r; of perplexities the student's over the teacher's, as a ratio."
)


def asked_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By row what students were asked; a stage that several trials share has one."""
    rows: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for row in records:
        if row["kind"] == "stage" and row.get("tasks") and row["stage_key"] not in seen:
            seen.add(row["stage_key"])
            rows[row["name"]] = row["tasks"]
    return rows


def task_table(rows: Mapping[str, Mapping[str, Told]]) -> pd.DataFrame:
    """A line for every row, task and metric; what is not known is a dash."""
    lines = [
        {
            "row": row,
            "task": name,
            "metric": metric,
            "items": str(told["items"]),
            "student": _with_error(numbers, "value", "stderr"),
            "teacher": _with_error(numbers, "teacher", "teacher_stderr"),
            "relative": numbers.get("refused") or _relative(numbers),
        }
        for row, tasks in rows.items()
        for name, told in tasks.items()
        for metric, numbers in told["metrics"].items()
    ]
    return pd.DataFrame(lines, columns=COLUMNS, dtype=str)


def _relative(numbers: Told) -> str:
    if "ratio" in numbers:
        return "ratio " + _with_error(numbers, "ratio", "ratio_stderr")
    return _with_error(numbers, "relative", "relative_stderr")


def _with_error(numbers: Told, name: str, error: str) -> str:
    value, around = numbers.get(name), numbers.get(error)
    if value is None:
        return "-"
    form = ".3f" if abs(value) < 100 else ".1f" if abs(value) < 100_000 else ".3g"
    return f"{value:{form}}" + ("" if around is None else f" ± {around:{form}}")
