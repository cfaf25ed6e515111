"""Speed and memory by length as a table and a picture: from which length on a student pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from orchestrator.record.records import Record, best_path, ends

LEGEND = (
    "prefill, decode: times as fast as the teacher, over prompts of so many tokens and after so many. cache: memory\n"
    "that decoding goes on from, without what crops need, over the teacher's keys and values. apart: nats per token\n"
    "more than the teacher in windows of so many tokens, where probes measured it."
)
SPEEDS = {"prefill_ratio": "reads prompts", "decode_ratio": "decodes"}
PANELS = {
    "prefill_ratio": "prefill, times as fast as the teacher (up is better)",
    "decode_ratio": "decode, times as fast as the teacher (up is better)",
    "cache_mb": "memory of decoding, MB (down is better)",
}


def measured_rows(records: list[Record]) -> dict[str, Record]:
    """By name the best path's last stage, every trial's and the controls without training, those of one architecture
    once; none where speeds are of one length."""
    path = best_path(records)
    named = [(f"{row['trial']} {row['words']}".strip(), row) for row in [*path[-1:], *ends(records)]]
    named += [(row["name"], row) for row in records if row["kind"] == "control" and row["name"].startswith("skip")]
    rows: dict[str, Record] = {}
    seen: set[Any] = set()
    for name, row in named:
        architecture = (str(row["metrics"].get("prefill_ratio")), row["operator"], tuple(row["swapped_layers"]))
        if len(row["metrics"].get("prefill_ratio", {})) > 1 and architecture not in seen:
            seen.add(architecture)
            rows[name] = row
    return rows


def pays_from(ratios: dict[str, float]) -> int | None:
    """The shortest length from which on all measured ones are at least as fast as the teacher; None for none."""
    found = None
    for length in sorted(ratios, key=int, reverse=True):
        if ratios[length] < 1:
            break
        found = int(length)
    return found


def crossovers(rows: dict[str, Record]) -> str:
    """A sentence for every row."""
    said = []
    for name, row in rows.items():
        parts = []
        for metric, verb in SPEEDS.items():
            ratios = row["metrics"].get(metric, {})
            start = pays_from(ratios)
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
                    "prefill": _times(metrics["prefill_ratio"].get(length)),
                    "decode": _times(metrics.get("decode_ratio", {}).get(length)),
                    "cache": _times(held / teachers if held is not None and teachers else None),
                    "cache MB": "-" if held is None else f"{held:.1f}",
                    "apart": _apart(row.get("probes"), length),
                }
            )
    columns = ["row", "tokens", "prefill", "decode", "cache", "cache MB", "apart"]
    return pd.DataFrame(lines, columns=columns, dtype=str)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


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
            _line(axis, row["metrics"].get(metric, {}), name, f"C{index % 10}")
        first = next(iter(rows.values()))["metrics"]
        _line(axis, first.get(f"teacher_{metric}") or dict.fromkeys(first["prefill_ratio"], 1.0), "teacher", "k")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"{title}: speed and memory by length")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _line(axis: Any, points: dict[str, float], label: str, color: str) -> None:
    lengths = sorted(points, key=int)
    axis.plot(
        [int(x) for x in lengths], [points[x] for x in lengths], marker="o", markersize=4, color=color, label=label
    )
