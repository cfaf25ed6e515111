"""`report.html`: one file with all it needs, tables that sort by a click, charts that tell their points.

Place in the flow: frames and charts are filled into `page.html.jinja`. Invariant: nothing is loaded from elsewhere;
plotly lies in the page, compressed.
"""

from __future__ import annotations

import base64
import functools
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from orchestrator.record.answer import charts
from orchestrator.record.answer.decided import LEGEND as DECIDED_LEGEND
from orchestrator.record.answer.decided import NOTHING, choice_table, gate_table, score_table
from orchestrator.record.answer.frames import COLUMNS, SAME, asked, in_order, lead_table, longest, table, value
from orchestrator.record.answer.points import Curves
from orchestrator.record.answer.probe_table import LEGEND as PROBE_LEGEND
from orchestrator.record.answer.probe_table import drawn as drawn_rows
from orchestrator.record.answer.probe_table import probe_table, probed_rows
from orchestrator.record.answer.speed_table import LEGEND as SPEED_LEGEND
from orchestrator.record.answer.speed_table import crossovers, measured_rows, speed_table
from orchestrator.record.answer.task_table import LEGEND as TASK_LEGEND
from orchestrator.record.answer.task_table import asked_rows, task_table
from orchestrator.record.answer.verdict import knee_line, legend, resources, tied, verdict
from orchestrator.record.choices import Decided
from orchestrator.record.groups import Record
from orchestrator.record.records import best_path, ends
from orchestrator.study.plan import Plan

TEMPLATE = Path(__file__).with_name("page.html.jinja")
LEGENDS = (SPEED_LEGEND, PROBE_LEGEND, TASK_LEGEND, DECIDED_LEGEND)
Table = dict[str, Any]  # columns, and rows of (text, what to sort by)


def page(
    plan: Plan, records: list[Record], run: dict[str, Any], curves: Sequence[Curves], decided: Decided = NOTHING
) -> str:
    """The page's text."""
    length = longest(plan)
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {
        "quality": charts.quality_chart(records, length, plan.total_layers),
        "speed": charts.speed_chart(measured_rows(records)),
        "probes": charts.probes_chart(drawn_rows(probed_rows(records))),
        "curves": charts.curves_chart(curves),
    }
    drawn = {name: figure.to_json().replace("</", "<\\/") for name, figure in figures.items() if figure is not None}
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        study=plan.study.study, question=plan.study.question.strip(), verdict=verdict(records), ties=tied(records),
        knee=knee_line(records, length), tables=_tables(plan, records, length) | _decided(decided),
        legend=legend(records, length), crossovers=crossovers(measured_rows(records)), legends=LEGENDS,
        cost=resources(run), figures=drawn, plotly=_plotly() if drawn else "", shown=len(curves[: charts.MOST_CURVES]),
        paths=len(curves), length=length,
    )  # fmt: skip


def _tables(plan: Plan, records: list[Record], length: str) -> dict[str, Table]:
    report = plan.study.report
    controls = [row for row in records if row["kind"] in ("teacher", "control")]
    last = in_order(ends(records), report, length)
    path = best_path(records)
    every = in_order([row for row in records if row["kind"] == "stage"], report, length)

    def shown(rows: list[Record], name: str = "name") -> Table:
        columns = asked(report, rows, COLUMNS)
        return _table(
            table(rows, length, name, columns), [[None, *(value(r, c, length) for c in columns)] for r in rows]
        )

    lead = lead_table(records, length, report)
    found = {
        "lead": _table(lead, []),
        "controls": shown(controls),
        "trials": shown(last, "trial"),
        "path": shown(path),
        "stages": shown(every),
        "speed": _table(speed_table(measured_rows(records)), []),
        "probes": _table(probe_table(probed_rows(records)), []),
        "tasks": _table(task_table(asked_rows(records)), []),
    }
    return {name: each for name, each in found.items() if each["rows"] and not (name == "lead" and len(lead) < 2)}


def _decided(decided: Decided) -> dict[str, Table]:
    frames = {"choices": choice_table(decided), "scores": score_table(decided), "gates": gate_table(decided)}
    return {name: _table(frame, []) for name, frame in frames.items() if len(frame)}


def _table(frame: pd.DataFrame, values: Sequence[Sequence[Any]]) -> Table:
    """A frame with what its cells sort by: `values` where they are known, else the numbers that texts begin with."""
    texts = frame.to_numpy().tolist()
    keys = values or [[_number(text) for text in row] for row in texts]
    rows = [list(zip(row, key, strict=True)) for row, key in zip(texts, keys, strict=True)]
    words = {"row", "stage", "layers", "task", "metric", "at", "by", "order", "tied", "became"}
    return {"columns": [(name, name in words) for name in frame.columns], "rows": rows}


def _number(text: str) -> float | None:
    if text == SAME:
        return 1.0
    first = text.split(" ")[0].split("/")[0].removesuffix("x").replace(",", "")
    try:
        return float(first)
    except ValueError:
        return None


@functools.cache
def _plotly() -> str:
    """The library for a browser, compressed, in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
