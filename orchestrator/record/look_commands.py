"""Commands that look at one study: its plan, what became of it, its answer, a student of it, its records in a browser.

Place in the flow: `cli` names them. Invariant: nothing is computed and nothing of the store is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.record.given import bad_input, home_of, json_goes_to, load, look_at, store_of, tell
from orchestrator.record.options import (
    BestOf,
    HomeDirectory,
    Overrides,
    StageName,
    StudyFile,
    StudyName,
    TrackingUri,
    TrialName,
)
from orchestrator.study.spec import short


def plan(
    study: StudyFile,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    device: Annotated[str, typer.Option(help="where stages would run: cpu, cuda")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Print the tree of stages before anything runs."""
    from orchestrator.record.screen.plan_view import plan_summary, plan_text

    store = store_of(study, home)
    growing = load(study, overrides, store, device)
    made, speeds = growing.plan, growing.speeds
    print(json.dumps(plan_summary(made, store, speeds), indent=1) if as_json else plan_text(made, store, speeds))


def status(command: typer.Context, study: StudyName, overrides: Overrides = None, home: HomeDirectory = None) -> None:
    """Say what is finished, failed, begun or not begun."""
    from orchestrator.record.screen.plan_view import status_text

    job = look_at(command, study, overrides, home)
    print(status_text(job.plan, store_of(study, home)))


def log(
    command: typer.Context,
    study: StudyName,
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="start of a stage key, or trial-03:2; default: those failed or begun"),
    ] = None,
    overrides: Overrides = None,
    home: HomeDirectory = None,
) -> None:
    """Print what the processes of stages wrote while they computed."""
    from orchestrator.record.screen.logs import log_text

    job = look_at(command, study, overrides, home)
    store = store_of(study, home, must_exist=True)
    try:
        print(log_text(job.plan, store, job.speeds, stage))
    except ValueError as error:
        bad_input(error)


def report(
    command: typer.Context,
    study: StudyName,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the records to this file; - prints them alone")
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print the answer from what is finished, write the report's files and send MLflow what it lacks."""
    job = look_at(command, study, overrides, home, tracking_uri)
    store_of(study, home, must_exist=True)
    json_goes_to(json_file)
    from orchestrator.record import driver
    from orchestrator.record.tracking.recorder import Recorder

    recorder = Recorder(job.home, job.plan, job.speeds, live=False) if job.home.writable else None
    if recorder is None:
        print(
            f"{job.home.root} is not yours to write: its report and MLflow's records stay as they are", file=sys.stderr
        )
    records, text = driver.report(job, recorder)
    tell(text, json_file, {"study": job.name, "run": driver.cost_of(job), "records": records})


def export(
    command: typer.Context,
    study: StudyName,
    to: Annotated[Path, typer.Option("--to", help="folder to write, which must not exist")],
    overrides: Overrides = None,
    home: HomeDirectory = None,
    trial: TrialName = None,
    stage: StageName = None,
    best: BestOf = None,
) -> None:
    """Write a finished student as a Hugging Face folder for AutoModelForCausalLM."""
    job = look_at(command, study, overrides, home)
    made = job.plan
    from orchestrator.distill.models.export import export_student, swapped_layers
    from orchestrator.distill.models.origin import origin_of
    from orchestrator.record.card import model_card
    from orchestrator.record.choice import exported_stage, told_apart
    from orchestrator.record.records import make_records

    store = store_of(study, home, must_exist=True)
    if to.exists():
        bad_input(f"--to {to} exists already: give another folder, or remove it")
    try:
        records = make_records(made, store, job.speeds)
        key = exported_stage(made, store, records, trial, stage, best)
        for each in (key, made.teacher.train.key, made.tokens.key):
            if (name := store.damaged(each)) is not None:
                bad_input(f"stage {short(each)}: {name} is damaged or gone: run the study again, which computes it")
        if store.dropped(key):
            bad_input(
                f"stage {short(key)}: its weights were dropped: `layerswap prune {study} --restore {short(key)}`, then "
                "run the study, which trains it again"
            )
        tokenizer, teacher = store.artefacts(made.tokens.key) / "tokenizer", store.artefacts(made.teacher.train.key)
        student = store.artefacts(key)
        card = model_card(made, records, key, trial, swapped_layers(student), origin_of(teacher))
        spec: Any = made.specs[key]
        export_student(student, teacher, tokenizer, to, card, spec.numerics.teacher_dtype)
    except ValueError as error:
        bad_input(error)
    except OSError as error:
        bad_input(f"--to {to} cannot be written ({error.strerror or error}): give another folder")
    print(f"wrote stage {short(key)} to {to}; load it with")
    print(f"AutoModelForCausalLM.from_pretrained({str(to)!r}, trust_remote_code=True),")
    print("its tokenizer with AutoTokenizer and the same arguments")
    if (note := told_apart(records, key)) is not None:
        print(note)


def ui(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="a study of the home; default: none needed")
    ] = None,
    home: HomeDirectory = None,
    host: Annotated[str, typer.Option(help="address to serve it on; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the MLflow UI", min=1, max=65_535)] = 5000,
    auth: Annotated[bool, typer.Option("--auth", help="ask for user and password (MLflow's basic auth)")] = False,
) -> None:
    """Serve the MLflow UI on the records of all studies of a home until Ctrl-C."""
    place = home_of(study, home)
    if not place.database_file.exists():
        bad_input(f"{place.root} holds nothing yet: run the study first, or give its --home")
    from orchestrator.record.tracking.server import serve

    try:
        serve(place, host, port, auth)
    except ValueError as error:
        bad_input(error)
