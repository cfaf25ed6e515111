"""What the benchmark of operators has measured, as a Markdown table for every mode and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

KINDS = ("hyena-2", "heads", "heads modal", "heads smooth", "power")
OURS = tuple(f"{kind}{how}" for kind in KINDS for how in ("", " native"))


def table(rows: list[dict[str, Any]]) -> str:
    """For every mode milliseconds of the rivals, and how many times as fast ours are."""
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        names = [name for name in OURS if any(name in row["ms"] for row in mine)]
        convolutions = [] if mode == "decode" else [name for name in names if name.startswith("hyena-2")]
        head = ["dtype", "D", "B", "L", "attention ms", *(["textbook ms"] if convolutions else [])]
        head += [f"{name} / attention" for name in names] + [f"{name} / textbook" for name in convolutions]
        lines = [f"### {mode}", "", f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
        for row in mine:
            cells = [row["dtype"], row["D"], row["B"], row["L"], _milliseconds(row, "attention")]
            cells += [_milliseconds(row, "textbook")] if convolutions else []
            cells += [_times(row["vs_attention"].get(name)) for name in names]
            cells += [_times(row.get("vs_textbook", {}).get(name)) for name in convolutions]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _milliseconds(row: dict[str, Any], name: str) -> str:
    return f"{row['ms'][name]:.2f}" if name in row["ms"] else "-"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed over attention by length, a panel for every mode, at the largest width and batch 1."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, modes = max(row["D"] for row in rows), list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = pyplot.subplots(1, len(modes), figsize=(4.6 * len(modes), 4), sharey=True, squeeze=False)
    for panel, mode in zip(panels[0], modes, strict=True):
        mine = [row for row in rows if (row["mode"], row["D"], row["B"]) == (mode, width, 1)]
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            for name in OURS:
                points = [
                    (r["L"], r["vs_attention"][name]) for r in mine if r["dtype"] == dtype and name in r["vs_attention"]
                ]
                if points:
                    label = f"{name} {dtype}"
                    panel.plot(
                        *zip(*points, strict=True), style, color=f"C{OURS.index(name) % 10}", marker="o", label=label
                    )
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=f"{mode}, D {width}, B 1", xlabel="positions", xscale="log", yscale="log")
        panel.legend(fontsize=6)
    panels[0][0].set_ylabel("times as fast as attention")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
