"""What the benchmark of operators has measured, as a Markdown table for every mode and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

KINDS = ("hyena-2", "heads", "heads modal", "heads smooth", "power", "power, window", "window alone")
NATIVE = " native"  # behind the name of a kind that runs through the compiled core
OURS = tuple(f"{kind}{how}" for kind in KINDS for how in ("", NATIVE))


def table(rows: list[dict[str, Any]]) -> str:
    """For every mode milliseconds of the rivals and of the projections alone, and how many times as fast ours are."""
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        names = [name for name in OURS if any(name in row["ms"] for row in mine)]
        convolutions = [] if mode == "decode" else [name for name in names if name.startswith("hyena-2")]
        head = ["dtype", "D", "B", "L", "attention ms", *(["textbook ms", "projections ms"] if convolutions else [])]
        head += [f"{name} / attention" for name in names] + [f"{name} / textbook" for name in convolutions]
        lines = [f"### {mode}", "", f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
        for row in mine:
            cells = [row["dtype"], row["D"], row["B"], row["L"], _milliseconds(row, "attention")]
            if convolutions:
                cells += [_milliseconds(row, "textbook"), f"{row['floors']['projections']:.2f}"]
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
    """Speed over attention by length, a panel for every mode, at the largest width and the smallest batch.

    In bfloat16 where that was measured. A colour for every kind, broken lines for ours without the compiled core.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, batch = max(row["D"] for row in rows), min(row["B"] for row in rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, panels = pyplot.subplots(1, len(modes), figsize=(4.2 * len(modes) + 1.6, 4), sharey=True, squeeze=False)
    lines: dict[str, Any] = {}
    for panel, mode in zip(panels[0], modes, strict=True):
        mine = [row for row in rows if (row["mode"], row["D"], row["B"]) == (mode, width, batch)]
        dtype = min(row["dtype"] for row in mine)
        mine = [row for row in mine if row["dtype"] == dtype]
        core = any(name.endswith(NATIVE) for row in mine for name in row["vs_attention"])
        for name in OURS:
            points = [(row["L"], row["vs_attention"][name]) for row in mine if name in row["vs_attention"]]
            if points:
                kind, native = name.removesuffix(NATIVE), name.endswith(NATIVE)
                style, color = "--" if core and not native else "-", f"C{KINDS.index(kind)}"
                label = kind + (", core" if native else ", torch" if core else "")
                (lines[label],) = panel.plot(*zip(*points, strict=True), style, color=color, marker=".", label=label)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=f"{mode}, {dtype}", xlabel="positions", xscale="log", yscale="log")
        lengths = sorted({row["L"] for row in mine})
        panel.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        panel.minorticks_off()
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"times as fast as attention (D {width}, B {batch})")
    figure.legend(lines.values(), lines.keys(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=100)
