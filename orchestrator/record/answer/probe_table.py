"""What probes found as a table and a picture, and how to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from orchestrator.record.probe_results import REFUSED, Probed
from orchestrator.record.records import Record, best_path, ends

FIRST = 16  # position that the table begins with; the picture has those before
LEGEND = (
    "The teacher's row has its numbers, the others what they have more than it. bits: per byte of text. from n: nats\n"
    "per token at positions from n to the next column's. gap n: nats on tokens that complete a trigram that stands at\n"
    "least n tokens back (and less than the next column's). nll n: nats per token in windows of n tokens. needle n:\n"
    "share of keys found again in n tokens, as it is, 0.125 by chance; not told where the teacher is at chance."
)


def probed_rows(records: list[Record], every: bool = True) -> dict[str, Probed]:
    """By name teacher, all attention skipped, the stages of the best path and, of `every` trial, its end, if probed."""
    first = [row for row in records if row["kind"] in ("teacher", "control")]
    rows: dict[str, Probed] = {}
    seen: set[str] = set()
    named = [(row["name"], row) for row in [*first, *best_path(records)]]
    for name, row in [*named, *((f"{row['label']} {row['words']}", row) for row in (ends(records) if every else ()))]:
        if row.get("probes") and row["stage_key"] not in seen:
            seen.add(row["stage_key"])
            rows[name] = row["probes"]
    return rows


def drawn(rows: dict[str, Probed]) -> dict[str, Probed]:
    """The students of the picture: what skips all attention is left out, for beside it the others would be one line."""
    return {name: probed for name, probed in rows.items() if "teacher" in probed and not name.startswith("skip")}


def probe_table(rows: dict[str, Probed]) -> pd.DataFrame:
    """A line for every row; what was not measured is a dash."""
    columns = list(dict.fromkeys(name for probed in rows.values() for name in _told(probed)))
    order = ["bits", "from", "gap", "nll", "needle"]
    columns.sort(key=lambda name: (order.index(name.split()[0]), int([*name.split(), "0"][1])))
    lines = []
    for name, probed in rows.items():
        own, teacher = _told(probed), _told(probed["teacher"]) if "teacher" in probed else {}
        lines.append({"row": name, **{column: _cell(column, own, teacher) for column in columns}})
    return pd.DataFrame(lines, columns=["row", *columns], dtype=str)


def _told(probed: Probed) -> dict[str, float | str]:
    """The numbers of a row by column."""
    found: dict[str, float | str] = {"bits": probed["bits_per_byte"]}
    found |= {f"from {at}": value for at, value in probed["loss"].items() if int(at) >= FIRST}
    found |= {f"gap {gap}": value for gap, value in probed["hit_nll"].items()}
    found |= {f"nll {length}": value for length, value in probed["nll"].items()}
    return found | {
        f"needle {length}": told.get("refused") or told["accuracy"] for length, told in probed["needle"].items()
    }


def _cell(column: str, own: dict[str, float | str], teacher: dict[str, float | str]) -> str:
    value = own.get(column)
    if isinstance(value, str) or value is None:
        return "at chance" if value == REFUSED else "-"
    beside = teacher.get(column)
    if column.startswith("needle") or not isinstance(beside, float):
        return f"{value:.3f}"
    return f"{value - beside:+.3f}"


def draw_probes(title: str, rows: dict[str, Probed], path: Path) -> bool:
    """Loss by position, student minus teacher, and loss by length; False where no student was probed."""
    students = drawn(rows)
    if not students:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for index, (name, probed) in enumerate(students.items()):
        apart = {int(at): value - probed["teacher"]["loss"][at] for at, value in probed["loss"].items()}
        _line(left, apart, name, f"C{index % 10}")
        _line(right, {int(length): value for length, value in probed["nll"].items()}, name, f"C{index % 10}")
    teacher = next(iter(students.values()))["teacher"]
    _line(right, {int(length): value for length, value in teacher["nll"].items()}, "teacher", "k")
    left.axhline(0, color="0.85", zorder=0)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    left.set_xlabel("position, from this one to the next point's")
    left.set_ylabel("nats per token more than the teacher (down is better)")
    right.set_xlabel("tokens of the window")
    right.set_ylabel("nats per token (down is better)")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(f"{title}: loss by position and by length")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _line(axis: Any, points: dict[int, float], label: str, color: str) -> None:
    xs = sorted(points)
    axis.plot(xs, [points[x] for x in xs], marker="o", markersize=4, color=color, label=label)
