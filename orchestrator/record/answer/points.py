"""What pictures show: points of quality against speed and against swapped layers, with their errors; training curves.

Place in the flow: `pictures` draws these for Markdown, `charts` for the page. Invariant: a point stands where tables
say, operators beside each other over a number of layers, and has an error bar only where an error is known.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from orchestrator.distill.training.journal import read_journal
from orchestrator.record.answer.frames import bounds_of, value
from orchestrator.record.groups import GIVEN_BACK, RATIO, Record, best_by_layers, ratio_of, students
from orchestrator.record.records import ends, pareto_front
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.stages import Step

SPEED_PANELS = ("prefill", "decode")
LAYERS = "layers"
FENCE = 1.5  # quartile distances beyond which a number is an outlier (Tukey 1977)
NEAR = 1.25  # times the last number, within which the next is none
FEWEST = 4  # numbers that have outliers
MOST_POINTS = 400  # of a curve
SPREAD = 0.5  # of the way to the next number of layers, that the operators share

Line = tuple[tuple[int, float], ...]  # (tokens, loss)


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of the records at its place; errors reach from `x_low` to `x_high` and by `y_error` to either side."""

    row: Record
    x: float
    y: float
    x_low: float
    x_high: float
    y_error: float


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one look: the students of an operator, or a kind of control."""

    name: str
    kind: str  # student, scratch, skip, teacher
    points: tuple[Point, ...]


def panels(records: list[Record], length: str) -> list[str]:
    """The speeds that were measured, and the layers, where there is a student."""
    rows = students(records)
    speeds = [name for name in SPEED_PANELS if any(value(row, name, length) is not None for row in rows)]
    return [*speeds, LAYERS] if rows else []


def series_of(records: list[Record], panel: str, length: str) -> list[Series]:
    """The points of a panel: students by operator, each once, controls by kind, the teacher."""
    own = {row["stage_key"]: row for row in reversed(students(records))}
    groups = [(name, "student", [r for r in own.values() if r["operator"] == name]) for name in operators(records)]
    controls = [row for row in records if row["kind"] == "control"]
    for kind, name in (("scratch", "from scratch"), ("skip", "attention left out")):
        groups.append((name, kind, [row for row in controls if row["name"].startswith(kind)]))
    groups.append(("teacher", "teacher", [row for row in records if row["kind"] == "teacher"]))
    found = []
    for name, kind, mine in groups:
        aside = _aside(name, records) if panel == LAYERS and kind == "student" else 0.0
        points = tuple(point for row in mine if (point := _point(row, panel, length, aside)) is not None)
        if points:
            found.append(Series(name, kind, points))
    return found


def _aside(operator: str, records: list[Record]) -> float:
    """How far the points of an operator stand from their number of layers."""
    names = operators(records)
    return SPREAD * (names.index(operator) - (len(names) - 1) / 2) / len(names)


def operators(records: list[Record]) -> list[str]:
    """The operators of the students, in the order of their colours."""
    return sorted({row["operator"] for row in records if row["kind"] == "stage"})


def front_of(records: list[Record], panel: str, length: str) -> list[Point]:
    """What no other student beats in quality and speed, or with as many swapped layers."""
    best = best_by_layers(students(records)) if panel == LAYERS else pareto_front(records, f"{panel}_ratio", length)
    aside = [_aside(row["operator"], records) if panel == LAYERS else 0.0 for row in best]
    found = [_point(row, panel, length, by) for row, by in zip(best, aside, strict=True)]
    return [point for point in found if point is not None]


def _point(row: Record, panel: str, length: str, aside: float) -> Point | None:
    x = value(row, "swapped" if panel == LAYERS else panel, length)
    if x is None:
        return None
    low, high = (panel != LAYERS and bounds_of(row["metrics"], panel, length)) or (x + aside, x + aside)
    return Point(row, x + aside, ratio_of(row), low, high, row.get("spread", {}).get(RATIO, 0.0))


def broken_at(series: Iterable[Series]) -> tuple[float, float] | None:
    """Where the axis of quality breaks: below the first number all of the lower part lies, from the second the rest.

    Outliers are those far above the students' quartiles, in logarithms; None where there are none.
    """
    points = [(one.kind, point.y + point.y_error) for one in series for point in one.points]
    own = [math.log(y) for kind, y in points if kind == "student"]
    if len(own) < FEWEST:
        return None
    low, _, high = statistics.quantiles(own, n=4, method="inclusive")
    limit = math.exp(high + FENCE * (high - low))
    beyond = sorted(y for _, y in points if y > limit)
    limit = max(y for _, y in points if y <= limit)
    while beyond and beyond[0] <= NEAR * limit:
        limit = beyond.pop(0)
    return (limit, beyond[0]) if beyond else None


def parted(points: Sequence[Point], gap: tuple[float, float] | None, above: bool) -> tuple[Point, ...]:
    """Of the points those above a gap, or below it; all where there is none."""
    return tuple(p for p in points if gap is None or (p.y + p.y_error > gap[0]) == above)


@dataclasses.dataclass(frozen=True)
class Curves:
    """The losses of a path by the tokens that its student had trained on, a line for every loss and seed."""

    title: str
    lines: tuple[tuple[str, Line], ...]  # with the name of the loss
    stages: tuple[int, ...]  # tokens at which a stage ends


def curves_of(plan: Plan, store: Store, records: list[Record]) -> list[Curves]:
    """A panel for every trial that has finished a stage, those of several seeds in one, best first."""
    trials = {trial.name: trial for trial in plan.trials}
    found = []
    for row in ends(records):
        lines: list[tuple[str, Line]] = []
        for name in row["members"]:
            lines += _lines_of(_kept(trials[name]), store).items()
        stages = tuple(step.tokens for step in _kept(trials[row["members"][0]]))
        if lines:
            found.append(Curves(f"{row['label']} {row['words']}", tuple(lines), stages))
    return found


def _kept(trial: Trial) -> list[Step]:
    """The stages that its last student comes from."""
    return [step for step in trial.steps if step.outcome != GIVEN_BACK]


def _lines_of(steps: Sequence[Step], store: Store) -> dict[str, Line]:
    """By loss its line; no number stands between two stages, so that nothing joins them."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for step in steps:
        before = step.tokens - step.own_tokens
        mine: dict[str, list[tuple[int, float]]] = {}
        for line in read_journal(store.folder(step.train.key)):
            for name, loss in line["metrics"].items():
                if name.startswith("loss/") and name != "loss/total" and name.count("/") == 1:
                    mine.setdefault(name.removeprefix("loss/"), []).append((before + line["tokens"], loss))
        for name, points in mine.items():
            earlier = lines.setdefault(name, [])
            earlier += [(before, math.nan)] if earlier else []
            earlier += _thinned(points, MOST_POINTS // len(steps))
    return {name: tuple(line) for name, line in lines.items()}


def _thinned(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    every = -(-len(points) // max(1, most))
    return points[::-every][::-1]  # the last one stays
