"""All studies of a home in a table, one of them in full, and two side by side.

Place in the flow: reads what the home remembers; a list reads a few small files a study, and no plan is made for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from orchestrator.files import canonical_json, read_json, write_json
from orchestrator.record.columns import aligned
from orchestrator.record.groups import GIVEN_BACK
from orchestrator.record.home import Home
from orchestrator.record.records import Record, best_path, leaves
from orchestrator.record.remembered import Variant, variants

Row = dict[str, str]  # of a table, by column
SUMMARY = "summary.json"  # in a variant's folder: what a list tells of its results
COMPARED = {"perplexity_ratio": "ratio", "hit_nll": "hit", "agreement": "agree"}


def summarise(variant: Variant, records: Sequence[Record], stages: tuple[int, int], disk_mb: float) -> None:
    """Keep for lists what a report told: finished stages of all, the best student, disk."""
    end = best_path(list(records))[-1:]
    best = [
        {
            "swapped": len(row["swapped_layers"]),
            "layers": row["total_layers"],
            "ratio": row["metrics"]["perplexity_ratio"],
            "trial": row["trial"],
        }
        for row in end
    ]
    write_json(variant.folder / SUMMARY, {"stages": list(stages), "best": best, "disk_mb": disk_mb})


def listed(home: Home) -> list[Row]:
    """A row for every variant, the one that was run last first."""
    return [_row(variant) for variant in variants(home)]


def _row(variant: Variant) -> Row:
    runs = variant.runs()
    told: dict[str, Any] = {"stages": None, "best": [], "disk_mb": None}
    with contextlib.suppress(OSError, ValueError):
        told |= read_json(variant.folder / SUMMARY)
    best = [f"{one['ratio']:.3f} at {one['swapped']}/{one['layers']}" for one in told["best"]]
    return {
        "study": variant.title,
        "last run": _day(runs[-1]["started"]) if runs else "-",
        "status": runs[-1]["status"] if runs else "-",
        "runs": str(len(runs)),
        "stages": "-" if told["stages"] is None else "{}/{}".format(*told["stages"]),
        "best": (best or ["-"])[0],
        "cost": f"{sum(run['seconds'] for run in runs) / 60:.1f} min",
        "disk": "-" if told["disk_mb"] is None else f"{told['disk_mb'] / 1024:.2f} GB",
    }


def shown(variant: Variant) -> str:
    """Who ran a study when, with what, and how each run ended."""
    asked, runs = variant.asked(), variant.runs()
    lines = [f"{variant.title}: {asked.values.get('question', '')}".strip(": "), ""]
    lines += [f"file:     {asked.file}", *(f"--set      {override}" for override in asked.overrides)]
    lines += [f"folder:   {variant.folder}", f"device:   {asked.device}, {asked.hardware}"]
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines += ["", f"run {run['number']}: {run['status']}, {_moment(run['started'])}, {run['seconds'] / 60:.1f} min"]
        lines += [f"  {run['command']}", f"  by {run['user']} on {run['host']}, commit {run['commit'] or 'unknown'}"]
        lines += [f"  Python {run['python']}, {versions}"]
        lines += [
            f"  {len(run['trained'])} stages trained, {run['reused']} reused, "
            f"peak memory {run['peak_rss_mb'] / 1024:.2f} GB"
        ]
        lines += [f"  failed: {name}: {why}" for name, why in run["failures"].items()]
    return "\n".join(lines)


def differences(first: Variant, second: Variant) -> list[Row]:
    """The values in which two studies, A and B, differ; what a study does not set is a dash."""
    mine, theirs = (leaves(variant.asked().values) for variant in (first, second))
    keys = [key for key in {**mine, **theirs} if key != "study" and _text(mine, key) != _text(theirs, key)]
    return [{"value": key, "A": _text(mine, key), "B": _text(theirs, key)} for key in keys]


def by_layers(first: Sequence[Record], second: Sequence[Record]) -> list[Row]:
    """For every number of swapped layers the student of lowest perplexity ratio of each study, side by side."""
    sides = {"A": _best_by_layers(first), "B": _best_by_layers(second)}
    rows = []
    for count in sorted({*sides["A"], *sides["B"]}):
        row = {"swapped": str(count)}
        for metric, name in COMPARED.items():
            for side, best in sides.items():
                value = best.get(count, {}).get(metric)
                row[f"{name} {side}"] = "-" if value is None else f"{value:.3f}"
        rows.append(row)
    return rows


def shared_stages(first: Variant, second: Variant) -> tuple[int, int, int]:
    """How many stages both need, and each of the two."""
    mine, theirs = first.needed(), second.needed()
    return len(mine & theirs), len(mine), len(theirs)


def _best_by_layers(records: Sequence[Record]) -> dict[int, dict[str, Any]]:
    students = [row for row in records if row["kind"] == "stage" and row["outcome"] != GIVEN_BACK]
    worst_first = sorted(students, key=lambda row: -row["metrics"]["perplexity_ratio"])
    return {len(row["swapped_layers"]): row["metrics"] for row in worst_first}


def _text(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "-"
    value = values[key]
    return value if isinstance(value, str) else canonical_json(value)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal: names to the left, all else to the right."""
    cells = [list(rows[0]), *([*row.values()] for row in rows)]
    return aligned(cells, [index == 0 for index in range(len(cells[0]))])
