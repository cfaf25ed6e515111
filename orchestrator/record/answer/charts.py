"""Charts of the page, by plotly: the pictures of `pictures`, with what every point is under the pointer.

Invariant: a chart is a figure of plotly's, checked by it, and takes the page's colours for text and grid.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from orchestrator.record.answer.frames import cell
from orchestrator.record.answer.pictures import margins, ticks
from orchestrator.record.answer.points import (
    LAYERS,
    Curves,
    Line,
    Point,
    Series,
    broken_at,
    front_of,
    operators,
    panels,
    parted,
    series_of,
)
from orchestrator.record.answer.speed_table import PANELS as SPEED_PANELS
from orchestrator.record.groups import Record
from orchestrator.record.probe_results import Probed

COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#eeca3b", "#9d755d", "#ff9da6", "#5b8c5a"]
GREY = "#8a8f98"
MARKS = {"student": "circle", "scratch": "x", "skip": "x-thin-open", "teacher": "star"}
TOLD = ("ratio", "agree", "hit", "prefill", "decode")  # of a row under the pointer
MOST_CURVES = 48
COLUMNS = 4


def quality_chart(records: list[Record], length: str, layers: int) -> go.Figure | None:
    """Quality against each speed and against swapped layers; None where there is no student."""
    names = panels(records, length)
    if not names:
        return None
    shown = {name: series_of(records, name, length) for name in names}
    gap = broken_at(series for several in shown.values() for series in several)
    rows = 2 if gap else 1
    figure = make_subplots(
        rows=rows, cols=len(names), shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.02,
        vertical_spacing=0.03, row_heights=[0.2, 0.8] if gap else None,
    )  # fmt: skip
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(operators(records))}
    traces: list[tuple[go.Scatter, int, int]] = []
    for column, name in enumerate(names, 1):
        for series in shown[name]:
            for row in range(rows, 0, -1):
                if kept := parted(series.points, gap, above=row < rows):
                    traces.append((_points(series, kept, colours.get(series.name, GREY), length, name), row, column))
        traces.append((_front(front_of(records, name, length)), rows, column))
        title = f"swapped layers of {layers}" if name == LAYERS else f"{name}, times the teacher's"
        figure.update_xaxes(title_text=title, row=rows, col=column)
        if name == LAYERS and layers <= 16:
            figure.update_xaxes(dtick=1, row=rows, col=column)
    _add(figure, traces)
    _quality_axes(figure, gap, [p for several in shown.values() for s in several for p in s.points])
    figure.update_layout(height=560, legend={"orientation": "h", "y": -0.16, "itemsizing": "constant"})
    return figure


def _add(figure: go.Figure, traces: Sequence[tuple[go.Scatter, int, int]]) -> None:
    """Add traces to their rows and columns; of one name the first stands in the legend."""
    told: set[str] = set()
    for trace, _, _ in traces:
        trace.showlegend = trace.name not in told
        told.add(trace.name)
    figure.add_traces(*map(list, zip(*traces, strict=True)))


def _front(points: Sequence[Point]) -> go.Scatter:
    line = {"dash": "dash", "width": 1.2, "color": GREY}
    xs, ys = [p.x for p in points], [p.y for p in points]
    return go.Scatter(x=xs, y=ys, mode="lines", name="best", legendgroup="best", hoverinfo="skip", line=line)


def _quality_axes(figure: go.Figure, gap: tuple[float, float] | None, points: Sequence[Point]) -> None:
    least, most = min(p.y - p.y_error for p in points), max(p.y + p.y_error for p in points)
    figure.update_yaxes(title_text="perplexity over the teacher's", row=2 if gap else 1, col=1)
    if gap is None:
        return _height(figure, 1, *margins(least, most))
    _height(figure, 1, gap[1] / 1.15, most * 1.15)
    return _height(figure, 2, *margins(least, gap[0]))


def _height(figure: go.Figure, row: int, low: float, high: float) -> None:
    """Let the axes of a row be logarithmic between two numbers, with few ticks of plain numbers."""
    shown = [tick for tick in ticks(low, high) if low <= tick <= high]
    limits = [math.log10(low), math.log10(high)]
    figure.update_yaxes(type="log", range=limits, tickvals=shown, ticktext=[f"{t:.3g}" for t in shown], row=row)


def _points(series: Series, points: Sequence[Point], colour: str, length: str, panel: str) -> go.Scatter:
    look: dict[str, Any] = {"symbol": MARKS[series.kind], "color": colour, "size": 10, "opacity": 0.8}
    if series.kind == "student":
        look["size"] = [7 + 1.5 * len(p.row["swapped_layers"]) ** 0.8 for p in points]
    elif series.kind == "teacher":
        look |= {"size": 15}
    elif series.kind == "skip":
        look |= {"line": {"width": 1.6, "color": colour}}
    errors: dict[str, Any] = {}
    if any(p.y_error for p in points):
        errors["error_y"] = {"array": [p.y_error for p in points], "thickness": 1, "width": 2}
    if panel != LAYERS and any(p.x_high > p.x_low for p in points):
        more, less = [p.x_high - p.x for p in points], [p.x - p.x_low for p in points]
        errors["error_x"] = {"array": more, "arrayminus": less, "thickness": 1, "width": 2}
    return go.Scatter(
        x=[p.x for p in points], y=[p.y for p in points], mode="markers", name=series.name, marker=look,
        legendgroup=series.name, text=[_under_pointer(p.row, length) for p in points],
        hovertemplate="%{text}<extra></extra>", **errors,
    )  # fmt: skip


def _under_pointer(row: Record, length: str) -> str:
    words = f"<br>{html.escape(row['words'])}" if row["words"] else ""
    told = "<br>".join(f"{name} {cell(row, name, length)}" for name in TOLD if cell(row, name, length) != "-")
    seeds = f"<br>{len(row['ratios'])} seeds: {', '.join(row['members'])}" if len(row.get("ratios", ())) > 1 else ""
    layers = f"<br>layers {cell(row, 'layers', length)} ({cell(row, 'swapped', length)})"
    return f"<b>{html.escape(row['name'])}</b>{words}{layers}{seeds}<br>{told}"


def curves_chart(curves: Sequence[Curves]) -> go.Figure | None:
    """Losses by tokens, a panel a path; None where no path has a journal."""
    shown = curves[:MOST_CURVES]
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    titles = [html.escape(one.title if len(one.title) <= 46 else f"{one.title[:45]}…") for one in shown]
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, shared_xaxes="all", horizontal_spacing=0.04,
        vertical_spacing=min(0.3, 0.35 / rows),
    )  # fmt: skip
    names = sorted({name for one in shown for name, _ in one.lines})
    traces: list[tuple[go.Scatter, int, int]] = []
    ends: list[dict[str, Any]] = []
    for index, one in enumerate(shown):
        number = "" if index == 0 else index + 1  # of its axes
        for name, line in one.lines:
            colour = COLOURS[names.index(name) % len(COLOURS)]
            traces.append((_loss(name, line, colour), index // columns + 1, index % columns + 1))
        mark = {"type": "line", "xref": f"x{number}", "yref": f"y{number} domain", "y0": 0, "y1": 1, "opacity": 0.6}
        dots = {"width": 1, "color": GREY, "dash": "dot"}
        ends += [{**mark, "x0": tokens, "x1": tokens, "line": dots} for tokens in one.stages[:-1]]
    _add(figure, traces)
    figure.update_yaxes(type="log", nticks=4, tickformat=".2~g")
    figure.update_annotations(font_size=11)
    legend = {"orientation": "h", "y": 1.0 + 0.25 / rows, "yanchor": "bottom"}
    figure.update_layout(height=120 + 190 * rows, legend=legend, shapes=ends)
    return figure


def _loss(name: str, line: Line, colour: str) -> go.Scatter:
    xs, ys = [tokens for tokens, _ in line], [loss for _, loss in line]
    return go.Scatter(
        x=xs, y=ys, mode="lines", name=name, legendgroup=name, opacity=0.85, line={"width": 1.3, "color": colour},
        hovertemplate=f"{name} %{{y:.4g}} at %{{x:,}} tokens<extra></extra>",
    )  # fmt: skip


def speed_chart(rows: Mapping[str, Record]) -> go.Figure | None:
    """Speeds and memory by length; None where nothing was measured at several lengths."""
    names = [name for name in SPEED_PANELS if any(row["metrics"].get(name) for row in rows.values())]
    if not names:
        return None
    figure = make_subplots(rows=1, cols=len(names), horizontal_spacing=0.06)
    first = next(iter(rows.values()))["metrics"]
    traces: list[tuple[go.Scatter, int, int]] = []
    for column, metric in enumerate(names, 1):
        for index, (name, row) in enumerate(rows.items()):
            line = _by_length(row["metrics"], metric, name, COLOURS[index % len(COLOURS)])
            traces.append((line, 1, column))
        own = first.get(f"teacher_{metric}") or dict.fromkeys(first["prefill_ratio"], 1.0)
        traces.append((_by_length({metric: own}, metric, "teacher", GREY), 1, column))
        label = SPEED_PANELS[metric].split(" (")[0]
        figure.update_xaxes(title_text="tokens", type="log", tickvals=sorted(map(int, own)), row=1, col=column)
        figure.update_yaxes(title_text=label, type="log", nticks=6, tickformat=".2~g", row=1, col=column)
    _add(figure, traces)
    figure.update_layout(height=460, legend={"orientation": "h", "y": -0.25})
    return figure


def _by_length(metrics: Mapping[str, Any], metric: str, name: str, colour: str) -> go.Scatter:
    points = metrics.get(metric, {})
    lengths = sorted(points, key=int)
    bounds = metrics.get(f"{metric.removesuffix('_ratio')}_interval", {})
    errors = {}
    if bounds:
        more = [bounds[length][1] - points[length] if length in bounds else 0.0 for length in lengths]
        less = [points[length] - bounds[length][0] if length in bounds else 0.0 for length in lengths]
        errors["error_y"] = {"array": more, "arrayminus": less, "thickness": 1, "width": 2}
    return go.Scatter(
        x=[int(length) for length in lengths], y=[points[length] for length in lengths], name=name, legendgroup=name,
        mode="lines+markers", line={"width": 1.5, "color": colour, "dash": "dash" if name == "teacher" else "solid"},
        hovertemplate=f"{html.escape(name)}<br>%{{y:.3g}} at %{{x:,}} tokens<extra></extra>", **errors,
    )  # fmt: skip


def probes_chart(rows: Mapping[str, Probed]) -> go.Figure | None:
    """Loss by position, student minus teacher, and loss by length; None where no student was probed."""
    if not rows:
        return None
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.08)
    traces: list[tuple[go.Scatter, int, int]] = []
    for index, (name, probed) in enumerate(rows.items()):
        colour = COLOURS[index % len(COLOURS)]
        apart = {at: loss - probed["teacher"]["loss"][at] for at, loss in probed["loss"].items()}
        traces.append((_by_length({"loss": apart}, "loss", name, colour), 1, 1))
        traces.append((_by_length(probed, "nll", name, colour), 1, 2))
    traces.append((_by_length(next(iter(rows.values()))["teacher"], "nll", "teacher", GREY), 1, 2))
    _add(figure, traces)
    figure.update_xaxes(type="log", dtick=math.log10(2))
    figure.update_xaxes(title_text="position, from this one to the next point's", col=1)
    figure.update_xaxes(title_text="tokens of the window", col=2)
    figure.update_yaxes(title_text="nats more than the teacher", col=1)
    figure.update_yaxes(title_text="nats per token", col=2)
    figure.update_layout(height=460, legend={"orientation": "h", "y": -0.25})
    return figure
