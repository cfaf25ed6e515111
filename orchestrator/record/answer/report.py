"""Records -> the answer's files: a page to look at, Markdown, pictures, JSON and CSV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.files import write_json, write_text
from orchestrator.record.answer.frames import longest
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.page import page
from orchestrator.record.answer.pictures import draw_curves, draw_pareto
from orchestrator.record.answer.points import Curves, curves_of
from orchestrator.record.answer.probe_table import draw_probes, probed_rows
from orchestrator.record.answer.redrawn import redrawn
from orchestrator.record.answer.speed_table import draw_speed, measured_rows
from orchestrator.record.choices import decided_of
from orchestrator.record.groups import Record
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan

OF_A_RUN = ("run_id", "reused")  # what rows tell of MLflow and of the newest run, which no picture shows


def write_report(plan: Plan, store: Store, records: list[Record], run: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write `report.html`, `report.md`, `records.csv`, `records.json` and pictures into `folder`; returns them by name.

    The store is asked for training curves and for what was decided.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, curves = plan.study.study, curves_of(plan, store, records)
    paths = {each: folder / each for each in ("report.html", "report.md", "records.json", "records.csv")}
    write_json(paths["records.json"], {"study": name, "run": run, "records": records})
    decided = decided_of(plan, store)
    write_text(paths["records.csv"], pd.json_normalize(records).to_csv(index=False))
    drawn = _pictures(plan, records, curves, folder)
    write_text(paths["report.md"], markdown(plan, records, run, drawn, decided))
    write_text(paths["report.html"], page(plan, records, run, curves, decided))
    return paths | {each: folder / each for each in drawn}


def _pictures(plan: Plan, records: list[Record], curves: list[Curves], folder: Path) -> list[str]:
    """Draw what has changed; returns the names of all pictures that there are."""
    name, probed, measured = plan.study.study, probed_rows(records), measured_rows(records)
    rows = [{key: value for key, value in row.items() if key not in OF_A_RUN} for row in records]
    shown: dict[str, tuple[Any, Callable[[Path], bool]]] = {
        "pareto.png": ([name, plan.total_layers, longest(plan), rows], partial(draw_pareto, plan, records)),
        "curves.png": ([name, curves], partial(draw_curves, name, curves)),
        "probes.png": ([name, probed], partial(draw_probes, name, probed)),
        "speed.png": ([name, measured_rows(rows)], partial(draw_speed, name, measured)),
    }
    return [each for each, (what, draw) in shown.items() if redrawn(folder / each, what, draw)]
