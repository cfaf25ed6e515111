"""Speed and memory by length as a table and a picture: from which length on a student pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from orchestrator.record.answer.frames import bounds_of, times
from orchestrator.record.answer.pictures import plain_axis
from orchestrator.record.groups import Record
from orchestrator.record.records import best_path, ends

LEGEND = (
    "prefill, decode: times as fast as the teacher, over prompts of so many tokens and after so many. cache: memory\n"
    "that decoding goes on from, without what crops need, over the teacher's keys and values. apart: nats per token\n"
    "more than the teacher in windows of so many tokens, where probes measured it. ±: a 95 % interval of the turns\n"
    "measured; same: it holds 1."
)
SPEEDS = {"prefill": "reads prompts", "decode": "decodes"}
PANELS = {
    "prefill_ratio": "prefill over the teacher's (up is faster)",
    "decode_ratio": "decode over the teacher's (up is faster)",
    "cache_mb": "memory of decoding, MB (down is better)",
}


def measured_rows(records: list[Record]) -> dict[str, Record]:
    """By name the best path's last stage, every trial's and the controls without training, those of one architecture
    once, as are controls whose layers look alike and have one speed; none where speeds are of one length."""
    path = best_path(records)
    named = [(f"{row['label']} {row['words']}".strip(), row) for row in [*path[-1:], *ends(records)]]
    controls = [row for row in records if row["kind"] == "control" and row["name"].startswith("skip")]
    rows: dict[str, Record] = {}
    seen: set[Any] = set()
    for name, row in [*named, *_alike(controls)]:
        architecture = (str(row["metrics"].get("prefill_ratio")), row["operator"], tuple(row["swapped_layers"]))
        if len(row["metrics"].get("prefill_ratio", {})) > 1 and architecture not in seen:
            seen.add(architecture)
            rows[name] = row
    return rows


def _alike(controls: list[Record]) -> list[tuple[str, Record]]:
    """Controls by name, those of one measurement as one: `skip 0, 1, 2`."""
    found: dict[str, list[Record]] = {}
    for row in controls:
        found.setdefault(str((row["metrics"].get("prefill_ratio"), row["metrics"].get("decode_ratio"))), []).append(row)
    return [
        (", ".join([first["name"], *(row["name"].removeprefix("skip ") for row in others)]), first)
        for first, *others in found.values()
    ]


def pays_from(metrics: dict[str, Any], speed: str) -> int | None:
    """The shortest length from which on none measured is slower than the teacher; None for none.

    Slower is a ratio below 1, or an interval of it.
    """
    ratios: dict[str, float] = metrics.get(f"{speed}_ratio", {})
    found = None
    for length in sorted(ratios, key=int, reverse=True):
        bounds = bounds_of(metrics, speed, length)
        if (ratios[length] if bounds is None else bounds[1]) < 1:
            break
        found = int(length)
    return found


def crossovers(rows: dict[str, Record]) -> str:
    """A sentence for every row."""
    said = []
    for name, row in rows.items():
        parts = []
        for speed, verb in SPEEDS.items():
            ratios = row["metrics"].get(f"{speed}_ratio", {})
            start = pays_from(row["metrics"], speed)
            longest = f"{max(map(int, ratios)):,}" if ratios else "-"
            slower = f"{verb} more slowly than the teacher at {longest} tokens, the longest measured"
            parts.append(
                slower if start is None else f"{verb} at least as fast as the teacher from {start:,} tokens on"
            )
        said.append(f"{name} {' and '.join(parts)}.")
    return "\n".join(said)


def speed_table(rows: dict[str, Record]) -> pd.DataFrame:
    """A line for every row and length; what was not measured is a dash."""
    lines = []
    for name, row in rows.items():
        metrics = row["metrics"]
        for length in sorted(metrics["prefill_ratio"], key=int):
            held, teachers = (metrics.get(key, {}).get(length) for key in ("cache_mb", "teacher_cache_mb"))
            lines.append(
                {
                    "row": name,
                    "tokens": f"{int(length):,}",
                    "prefill": _times(metrics, "prefill", length),
                    "decode": _times(metrics, "decode", length),
                    "cache": times(held / teachers, None) if held is not None and teachers else "-",
                    "cache MB": "-" if held is None else f"{held:.1f}",
                    "apart": _apart(row.get("probes"), length),
                }
            )
    columns = ["row", "tokens", "prefill", "decode", "cache", "cache MB", "apart"]
    return pd.DataFrame(lines, columns=columns, dtype=str)


def _times(metrics: dict[str, Any], speed: str, length: str) -> str:
    ratio = metrics.get(f"{speed}_ratio", {}).get(length)
    return "-" if ratio is None else times(ratio, bounds_of(metrics, speed, length))


def _apart(probed: Any, length: str) -> str:
    if not probed or "teacher" not in probed or length not in probed["nll"]:
        return "-"
    return f"{probed['nll'][length] - probed['teacher']['nll'][length]:+.3f}"


def draw_speed(title: str, rows: dict[str, Record], path: Path) -> bool:
    """Speeds and memory by length, the teacher in black; False where nothing was measured at several lengths."""
    panels = {
        metric: label for metric, label in PANELS.items() if any(row["metrics"].get(metric) for row in rows.values())
    }
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), layout="constrained", squeeze=False)
    for axis, (metric, label) in zip(axes[0], panels.items(), strict=True):
        for index, (name, row) in enumerate(rows.items()):
            points = row["metrics"].get(metric, {})
            _line(
                axis, points, name, f"C{index % 10}", _intervals(row["metrics"], metric.removesuffix("_ratio"), points)
            )
        first = next(iter(rows.values()))["metrics"]
        _line(axis, first.get(f"teacher_{metric}") or dict.fromkeys(first["prefill_ratio"], 1.0), "teacher", "k")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        plain_axis(axis.yaxis, *axis.get_ylim())
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"{title}: speed and memory by length")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _intervals(metrics: dict[str, Any], speed: str, points: dict[str, float]) -> dict[str, tuple[float, float]]:
    """By length the interval of a ratio, or the ratio alone."""
    return {length: bounds_of(metrics, speed, length) or (ratio, ratio) for length, ratio in points.items()}


def _line(
    axis: Any, points: dict[str, float], label: str, color: str, bounds: dict[str, tuple[float, float]] | None = None
) -> None:
    lengths = sorted(points, key=int)
    xs = [int(length) for length in lengths]
    axis.plot(xs, [points[length] for length in lengths], marker="o", markersize=4, color=color, label=label)
    for length, (low, high) in (bounds or {}).items():
        axis.vlines(int(length), low, high, color=color, alpha=0.5)
