"""The command that holds ways of choosing layers against all sets of layers.

Light: whatever takes long to load, or could be shadowed by a file of the user's, comes when the command runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.record.given import bad_input, json_goes_to, look_at, store_of, tell
from orchestrator.record.options import HomeDirectory, StudyName

Truthful = Annotated[
    Path,
    typer.Option(
        "--truth", metavar="STUDY", help="the study, or its name, whose trials swap each set of layers at once"
    ),
]


def regret(
    command: typer.Context,
    study: StudyName,
    truth: Truthful,
    home: HomeDirectory = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write every number to this file; - prints them alone")
    ] = None,
) -> None:
    """Hold a study's ways of choosing layers against the best set of as many; exit code 2 where no set is known."""
    job, other = look_at(command, study, None, home), look_at(command, truth, None, home)
    store = store_of(study, home, must_exist=True)
    json_goes_to(json_file)
    from orchestrator.files import write_text
    from orchestrator.record.answer.regret_table import draw_regret, regret_json, regret_markdown, regret_text
    from orchestrator.record.regretting import judged, truth_of

    if job.plan.teacher.train.key != other.plan.teacher.train.key:
        bad_input(f"--truth {truth} has another teacher than {study}: its sets say nothing of this one's")
    try:
        known = truth_of(other.plan, store)
        ways, notes = judged(job.plan, known, store, other.name)
    except ValueError as error:
        bad_input(error)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not any(each.rows for each in ways if each.way.cost is not None):
        bad_input(f"{other.name} has none of the sets that {job.name} comes to")
    title = f"{job.name}: regret against the best of all sets of {other.name}"
    text = regret_text(title, ways)
    if job.home.writable:
        folder = job.variant.folder
        folder.mkdir(parents=True, exist_ok=True)
        draw_regret(title, ways, folder / "regret.png")
        write_text(folder / "regret.md", regret_markdown(title, ways, notes))
        text += f"\n\nregret:   {folder / 'regret.md'}"
    tell(text, json_file, regret_json(job.name, other.name, known, ways))
