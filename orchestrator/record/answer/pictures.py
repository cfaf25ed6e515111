"""Pictures beside the Markdown page: quality against speed and against swapped layers, and training curves."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import patheffects, ticker

from orchestrator.record.answer.frames import longest
from orchestrator.record.answer.points import (
    LAYERS,
    Curves,
    Point,
    Series,
    broken_at,
    front_of,
    operators,
    panels,
    parted,
    series_of,
)
from orchestrator.record.groups import Record
from orchestrator.study.plan import Plan

MARKS = {"student": "o", "scratch": "X", "skip": "x", "teacher": "*"}
GREYS = {"scratch": "0.35", "skip": "0.55", "teacher": "k"}
QUALITY = "perplexity over the teacher's (down is better)"
PLACES = [(9, 5), (9, -12), (-9, 5), (-9, -12), (0, 11), (0, -18), (18, 14), (18, -22), (-18, 14), (-18, -22)]
PLACES += [(40, 22), (40, -30), (-40, 22), (-40, -30), (0, 34), (0, -40)]  # of a label, in points from its dot
DOT = 9  # pixels around the middle of a dot
MOST_CURVES = 24  # panels of a picture
COLUMNS = 4


def draw_pareto(plan: Plan, records: list[Record], path: Path) -> bool:
    """Quality against each speed and against swapped layers; False where there is no student."""
    length = longest(plan)
    names = panels(records, length)
    if not names:
        return False
    shown = {name: series_of(records, name, length) for name in names}
    gap = broken_at(series for several in shown.values() for series in several)
    figure, axes = plt.subplots(
        2 if gap else 1, len(names), figsize=(6.2 * len(names), 6), sharey="row", sharex="col", squeeze=False,
        layout="constrained", height_ratios=[1, 4] if gap else None,
    )  # fmt: skip
    colours = {name: f"C{index % 10}" for index, name in enumerate(operators(records))}
    labels: list[tuple[Any, list[tuple[str, Point]], list[Point]]] = []
    for column, name in zip(axes.T, names, strict=True):
        front = front_of(records, name, length)
        column[-1].plot([p.x for p in front], [p.y for p in front], "--", color="0.3", lw=1, label="best", zorder=1)
        for axis in column:
            above = bool(gap) and axis is column[0]
            kept = [dataclasses.replace(one, points=parted(one.points, gap, above)) for one in shown[name]]
            _points(axis, kept, colours)
        _axis(column[-1], name, length, plan.total_layers)
        labels.append((column[-1], _labels(front, name), [p for one in shown[name] for p in one.points]))
    _heights(axes, [p for several in shown.values() for one in several for p in one.points], gap)
    axes[-1][0].set_ylabel(QUALITY)
    handles = {name: h for axis in axes.flat for h, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), fontsize=9)
    figure.suptitle(f"{plan.study.study}: every stage of every trial; larger dots swap more layers")
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axis, texts, dots in labels:
        place_labels(axis, texts, dots)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _points(axis: Any, several: Sequence[Series], colours: dict[str, str]) -> None:
    for series in several:
        colour = colours[series.name] if series.kind == "student" else GREYS[series.kind]
        xs, ys = [p.x for p in series.points], [p.y for p in series.points]
        sizes = [25 + 18 * len(p.row["swapped_layers"]) for p in series.points]
        axis.scatter(
            xs, ys, s={"student": sizes, "teacher": 160}.get(series.kind, 40), marker=MARKS[series.kind], color=colour,
            alpha=0.7, label=series.name, linewidths=0 if series.kind in ("student", "teacher") else 1.5,
        )  # fmt: skip
        errors = {
            "xerr": [[p.x - p.x_low for p in series.points], [p.x_high - p.x for p in series.points]],
            "yerr": [p.y_error for p in series.points],
        }
        axis.errorbar(xs, ys, **errors, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)


def _axis(axis: Any, name: str, length: str, layers: int) -> None:
    if name == LAYERS:
        axis.set_xlabel(f"swapped layers of {layers}")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    else:
        axis.axvline(1, color="0.8", zorder=0)
        axis.set_xlabel(f"{name} speed over the teacher's at {length} tokens (right is faster)")


def _heights(axes: Any, points: Sequence[Point], gap: tuple[float, float] | None) -> None:
    """Scale the axes of quality: one row of them, or two that show what lies above and below a gap."""
    least, most = min(p.y - p.y_error for p in points), max(p.y + p.y_error for p in points)
    limits = [(gap[1] / 1.15, most * 1.15), margins(least, gap[0])] if gap else [margins(least, most)]
    slash = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 9, "linestyle": "none", "color": "k", "clip_on": False}
    for row, (low, high) in zip(axes, limits, strict=True):
        for axis in row:
            axis.set_yscale("log")
            axis.set_ylim(low, high)
            plain_axis(axis.yaxis, low, high)
            axis.grid(axis="y", color="0.92", zorder=0)
    for upper, lower in axes.T if gap else ():
        upper.spines["bottom"].set_visible(False)
        lower.spines["top"].set_visible(False)
        upper.tick_params(bottom=False)
        upper.plot([0, 1], [0, 0], transform=upper.transAxes, **slash)
        lower.plot([0, 1], [1, 1], transform=lower.transAxes, **slash)


def margins(low: float, high: float) -> tuple[float, float]:
    """A little less than one number and more than another, on a logarithmic axis."""
    more: float = max(high / low, 1.01) ** 0.06
    return low / more, high * more


def ticks(low: float, high: float) -> list[float]:
    """Few plain numbers from a logarithmic axis between two."""
    far = ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8)
    locator = far if high > 4 * low else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    return [float(tick) for tick in locator.tick_values(low, high)]


def plain_axis(axis: Any, low: float, high: float) -> None:
    """Let a logarithmic axis between two numbers have few plain ones."""
    axis.set_major_locator(ticker.FixedLocator(ticks(low, high)))
    axis.set_major_formatter("{x:.3g}")
    axis.set_minor_locator(ticker.NullLocator())


def _labels(front: Sequence[Point], panel: str) -> list[tuple[str, Point]]:
    """What is written beside the points of a front, of as many swapped layers once."""
    best: dict[int, Point] = {}
    for point in sorted(front, key=lambda point: point.y):
        best.setdefault(len(point.row["swapped_layers"]), point)
    return [
        (f"{point.y:.3f}" if panel == LAYERS else f"{count} swapped: {point.row['label']}", point)
        for count, point in best.items()
    ]


def place_labels(axis: Any, labels: Sequence[tuple[str, Point]], dots: Sequence[Point]) -> None:
    """Write each label where it covers no other and, if possible, no dot; one that has no place is left out.

    The figure is drawn already, for labels are as large as they are drawn.
    """
    frame = axis.get_window_extent()
    there = axis.transData.transform([(p.x, p.y) for p in [*dots, *(point for _, point in labels)]])
    taken: list[Any] = []
    for text, point in labels:
        found = []
        for place in PLACES:
            note = _note(axis, text, point, place)
            box = note.get_window_extent().expanded(1.04, 1.1)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            covered = sum(bool(box.padded(DOT).contains(*dot)) for dot in there)
            note.remove()
            if inside and not any(box.overlaps(other) for other in taken):
                found.append((covered, place, box))
        if found:
            _, place, box = min(found, key=lambda each: each[0])
            taken.append(box)
            _note(axis, text, point, place)


def _note(axis: Any, text: str, point: Point, place: tuple[int, int]) -> Any:
    side = {1: "left", 0: "center", -1: "right"}[(place[0] > 0) - (place[0] < 0)]
    far = {"arrowstyle": "-", "color": "0.6", "lw": 0.7} if abs(place[0]) + abs(place[1]) > 20 else None
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    return axis.annotate(
        text, (point.x, point.y), textcoords="offset points", xytext=place, ha=side, fontsize=8, arrowprops=far,
        path_effects=halo, zorder=5,
    )  # fmt: skip


def draw_curves(title: str, curves: Sequence[Curves], path: Path) -> bool:
    """Losses by tokens, a panel a path, the ends of stages marked; False where no path has a journal."""
    shown = curves[:MOST_CURVES]
    if not shown:
        return False
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 0.6 + 2.8 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    names = sorted({name for one in shown for name, _ in one.lines})
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, one in zip(axes.flat, shown, strict=False):
        for name, line in one.lines:
            axis.plot(*zip(*line, strict=True), color=f"C{names.index(name) % 10}", lw=1, alpha=0.8, label=name)
        for tokens in one.stages[:-1]:
            axis.axvline(tokens, color="0.85", lw=1, zorder=0)
        axis.set_yscale("log")
        plain_axis(axis.yaxis, *axis.get_ylim())
        axis.set_title("\n".join(textwrap.wrap(one.title, 44)[:2]), fontsize=8)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M" if tokens >= 1e6 else f"{tokens:,.0f}")
        axis.tick_params(labelsize=7)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    of_all = f", the best {len(shown)} of {len(curves)} paths" if len(shown) < len(curves) else ""
    figure.suptitle(f"{title}: losses by the student's tokens; grey lines end stages{of_all}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
