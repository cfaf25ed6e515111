"""Records -> the answer's files: a page to look at, Markdown, pictures, JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.files import write_json, write_text
from orchestrator.record.answer.markdown import markdown
from orchestrator.record.answer.page import page
from orchestrator.record.answer.pictures import draw_curves, draw_pareto
from orchestrator.record.answer.points import curves_of
from orchestrator.record.answer.probe_table import draw_probes, probed_rows
from orchestrator.record.answer.speed_table import draw_speed, measured_rows
from orchestrator.record.choices import decided_of
from orchestrator.record.groups import Record
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan


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
    pictures = {
        "pareto.png": draw_pareto(plan, records, folder / "pareto.png"),
        "curves.png": draw_curves(name, curves, folder / "curves.png"),
        "probes.png": draw_probes(name, probed_rows(records), folder / "probes.png"),
        "speed.png": draw_speed(name, measured_rows(records), folder / "speed.png"),
    }
    drawn = [each for each, there in pictures.items() if there]
    write_text(paths["report.md"], markdown(plan, records, run, drawn, decided))
    write_text(paths["report.html"], page(plan, records, run, curves, decided))
    return paths | {each: folder / each for each in drawn}
