"""The answer for a terminal: the best student for every number of swapped layers, the knee, controls, every trial."""

from __future__ import annotations

from typing import Any

import pandas as pd

from orchestrator.record.answer.decided import NOTHING, decided_lines
from orchestrator.record.answer.frames import NARROW, asked, in_order, lead_table, longest, table
from orchestrator.record.answer.probe_table import LEGEND as PROBE_LEGEND
from orchestrator.record.answer.probe_table import probe_table, probed_rows
from orchestrator.record.answer.speed_table import LEGEND as SPEED_LEGEND
from orchestrator.record.answer.speed_table import crossovers, measured_rows, speed_table
from orchestrator.record.answer.task_table import LEGEND as TASK_LEGEND
from orchestrator.record.answer.task_table import asked_rows, task_table
from orchestrator.record.answer.verdict import knee_line, legend, resources, tied
from orchestrator.record.choices import Decided
from orchestrator.record.columns import aligned, broken
from orchestrator.record.groups import Record
from orchestrator.record.records import best_path, ends
from orchestrator.study.plan import Plan

LEFT = {"stage"}  # columns of words, beside the first


def answer(
    plan: Plan, records: list[Record], run: dict[str, Any], commands: list[str], decided: Decided = NOTHING
) -> str:
    """What the terminal shows at the end, and then what comes next."""
    length, report = longest(plan), plan.study.report
    lines = [plan.study.question.strip() or plan.study.study, ""]
    lead = lead_table(records, length, report)
    if len(lead) > 1:
        knee = knee_line(records, length)
        lines += ["the best student for every number of swapped layers", text_table(lead), *tied(records)]
        lines += [*([knee] if knee else []), ""]
    controls = [row for row in records if row["kind"] in ("teacher", "control")]
    lines += ["teacher and controls", text_table(table(controls, length, columns=asked(report, [], NARROW))), ""]
    last = in_order(ends(records), report, length)
    if last:
        shown = table(last, length, "trial", asked(report, last, NARROW))
        lines += ["every trial at its last stage", text_table(shown)]
    path = best_path(records)
    lines += [f"best path: {path[-1]['label']} {path[-1]['words']}"] if path else []
    lines += [""] if last else []
    told = decided_lines(decided)
    lines += ["what was decided", *told, ""] if told else []
    best = dict([*measured_rows(records).items()][:1]) if path else {}
    lines += [text_table(speed_table(best)), SPEED_LEGEND, crossovers(best), ""] if best else []
    probed = probed_rows(records, every=False)
    lines += [text_table(probe_table(probed)), PROBE_LEGEND, ""] if probed else []
    tasks = asked_rows(records)
    lines += [text_table(task_table(tasks)), TASK_LEGEND, ""] if tasks else []
    lines += [legend(records, length), "", resources(run), "", *commands]
    return "\n".join(lines)


def text_table(frame: pd.DataFrame) -> str:
    """Aligned columns for a terminal, numbers to the right; words are broken where they make it too wide."""
    left = [index == 0 or name in LEFT for index, name in enumerate(frame.columns)]
    return aligned(broken([list(frame.columns), *frame.to_numpy().tolist()], left), left)
