"""The report as a page of Markdown."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd

from orchestrator.record.answer.decided import LEGEND as DECIDED_LEGEND
from orchestrator.record.answer.decided import NOTHING, choice_table, gate_table, score_table
from orchestrator.record.answer.frames import COLUMNS, asked, in_order, lead_table, longest, table
from orchestrator.record.answer.probe_table import LEGEND as PROBE_LEGEND
from orchestrator.record.answer.probe_table import drawn, probe_table, probed_rows
from orchestrator.record.answer.speed_table import LEGEND as SPEED_LEGEND
from orchestrator.record.answer.speed_table import crossovers, measured_rows, speed_table
from orchestrator.record.answer.task_table import LEGEND as TASK_LEGEND
from orchestrator.record.answer.task_table import asked_rows, task_table
from orchestrator.record.answer.verdict import knee_line, legend, resources, tied, verdict
from orchestrator.record.choice import SPEED
from orchestrator.record.choices import Decided
from orchestrator.record.groups import Record
from orchestrator.record.records import best_path, ends, pareto_front
from orchestrator.study.plan import Plan


def markdown(
    plan: Plan,
    records: list[Record],
    run: dict[str, Any],
    pictures: Collection[str] = (),
    decided: Decided = NOTHING,
) -> str:
    """The page; `pictures` are the files beside it that there are."""
    study, length = plan.study, longest(plan)
    parts = [f"# {study.study}", study.question.strip(), "## Verdict", verdict(records), *_lead(plan, records)]
    controls = [row for row in records if row["kind"] in ("teacher", "control")]
    parts += ["## Teacher and controls", pipe_table(table(controls, length, columns=asked(study.report, [], COLUMNS)))]
    parts += _students(plan, records, pictures)
    parts += _decided(decided)
    if measured := measured_rows(records):
        parts += ["## Speed and memory by length", pipe_table(speed_table(measured)), SPEED_LEGEND]
        parts += [crossovers(measured), *_picture("Speed and memory by length", "speed.png", pictures)]
    if probed := probed_rows(records):
        parts += ["## What perplexity hides", pipe_table(probe_table(probed)), PROBE_LEGEND]
        parts += _picture("Loss by position and by length", "probes.png", pictures) if drawn(probed) else []
    tasks = asked_rows(records)
    parts += ["## Tasks", pipe_table(task_table(tasks)), TASK_LEGEND] if tasks else []
    parts += _picture("Training curves by tokens, a panel a path", "curves.png", pictures, "## Training")
    parts += ["## Cost", resources(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lead(plan: Plan, records: list[Record]) -> list[str]:
    """What was asked: the best student for every number of swapped layers, ties, the knee."""
    lead = lead_table(records, longest(plan), plan.study.report)
    if len(lead) < 2:
        return []
    parts = ["## The best student for every number of swapped layers", pipe_table(lead)]
    parts += ["\n".join(f"- {line}" for line in tied(records))]
    return [*parts, knee_line(records, longest(plan)) or ""]


def _students(plan: Plan, records: list[Record], pictures: Collection[str]) -> list[str]:
    """Every trial at its end, the best path, the front, every stage of every seed."""
    report, length = plan.study.report, longest(plan)
    last, path = in_order(ends(records), report, length), best_path(records)
    front = pareto_front(records, SPEED, length)
    every = in_order([row for row in records if row["kind"] == "stage"], report, length)

    def shown(rows: list[Record], name: str = "name") -> str:
        return pipe_table(table(rows, length, name, asked(report, rows, COLUMNS)))

    parts = ["## Every trial at its last stage", shown(last, "trial")]
    if path:
        parts += [f"## Best path: {path[-1]['label']}", f"`{path[-1]['words']}`", shown(path)]
    parts += _picture("Quality against speed and layers", "pareto.png", pictures, "## Quality against speed and layers")
    parts += ["Students that no other beats in quality and prefill:", shown(front)] if front else []
    return [*parts, "## Every stage", shown(every), legend(records, length)]


def _decided(decided: Decided) -> list[str]:
    """Choices of layers with the scores they rest on, and what gates made of stages."""
    parts = ["## What was decided"] if decided != NOTHING else []
    if decided.choices:
        parts += [pipe_table(choice_table(decided)), pipe_table(score_table(decided)), DECIDED_LEGEND]
    return parts + ([pipe_table(gate_table(decided))] if decided.gates else [])


def _picture(title: str, name: str, pictures: Collection[str], heading: str = "") -> list[str]:
    return [heading, f"![{title}]({name})"] if name in pictures else []


def pipe_table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    head = "| " + " | ".join(frame.columns) + " |"
    rule = "|---" + "|---:" * (len(frame.columns) - 1) + "|"
    rows = ([cell.replace("|", "\\|") for cell in row] for row in frame.to_numpy().tolist())
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)])
