"""The command `layerswap`. Exit code 0: all done; 1: something failed; 2: bad input; 130, 143: interrupted."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.record import home_commands
from orchestrator.record.given import bad_input, home_of, load, look_at, needed_of_all, run_job, store_of
from orchestrator.record.measure import measure
from orchestrator.record.options import (
    BestOf,
    Claims,
    Cpus,
    HomeDirectory,
    Overrides,
    StageName,
    StudyFile,
    StudyName,
    TrackingUri,
    TrialName,
)
from orchestrator.record.regretting import regret
from orchestrator.run.environment import own_process
from orchestrator.study.spec import short

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


# Large tensors come and go every step: keep their pages instead of giving them back to the kernel (glibc), and let
# threads that wait sleep, so that a busy neighbour does not cost a stage of two threads most of its speed (OpenMP).
PROCESS = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "16777216",
    "GOMP_SPINCOUNT": "2000",
}


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"layerswap {metadata.version('layerswap')}")
        raise typer.Exit()


@app.callback()
def _begin(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    own_process()
    for name, value in PROCESS.items():  # for worker processes, and for this one where it computes: torch comes later
        os.environ.setdefault(name, value)


@app.command()
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


@app.command()
def run(
    command: typer.Context,
    study: StudyFile,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    ray_address: Annotated[
        str | None, typer.Option(help="a Ray cluster to run on; default: one on this machine")
    ] = None,
    cpus: Cpus = None,
    device: Annotated[str | None, typer.Option(help="where stages run: cpu, cuda; default: cpu")] = None,
    gpus_per_stage: Annotated[
        float | None, typer.Option(min=0, help="of each process of a stage, 0.5 for half; default: 1 on cuda, else 0")
    ] = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="seconds between checkpoints of a running stage; more where writing one takes long")
    ] = 15.0,
    claims: Annotated[
        Claims, typer.Option(help="how stages being computed are held: lease where flock does not reach")
    ] = Claims.flock,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="share finished stages through this URL (fsspec)")
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Run the study, or go on with it: what is finished is never computed again."""
    from orchestrator.run.interrupt import Interrupt

    with Interrupt() as interrupt:
        job, resolved = run_job(command, study, overrides, home, tracking_uri, device or "cpu")
        for note in job.plan.notes:
            print(f"note: {note}", file=sys.stderr)
        from orchestrator.record.running import CannotRunError, Where, start
        from orchestrator.run.store import StoreError

        where = Where(ray_address, device, gpus_per_stage, checkpoint_seconds, claims.value, mirror, cpus)
        store_of(study, home)
        try:
            code = start(job, resolved, where, interrupt)
        except (CannotRunError, StoreError) as error:
            bad_input(error)
    raise typer.Exit(code)


app.command()(measure)
app.command()(regret)


@app.command()
def status(command: typer.Context, study: StudyName, overrides: Overrides = None, home: HomeDirectory = None) -> None:
    """Say what is finished, failed, begun or not begun."""
    from orchestrator.record.screen.plan_view import status_text

    job = look_at(command, study, overrides, home)
    print(status_text(job.plan, store_of(study, home)))


@app.command()
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


@app.command()
def report(
    command: typer.Context,
    study: StudyName,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the records to this file")] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print the answer from what is finished, write the report's files and send MLflow what it lacks."""
    job = look_at(command, study, overrides, home, tracking_uri)
    store_of(study, home, must_exist=True)
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        bad_input(f"--json {json_file} cannot be written: give the path of a file in a directory that exists")
    from orchestrator.files import write_json
    from orchestrator.record import driver
    from orchestrator.record.tracking.recorder import Recorder

    recorder = Recorder(job.home, job.plan, job.speeds, live=False) if job.home.writable else None
    if recorder is None:
        print(
            f"{job.home.root} is not yours to write: its report and MLflow's records stay as they are", file=sys.stderr
        )
    records, text = driver.report(job, recorder)
    if json_file is not None:
        write_json(json_file, {"study": job.name, "run": driver.cost_of(job), "records": records})
    print(text)


@app.command()
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


@app.command()
def evaluate(
    command: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="STUDY|DIR", help="study file, or the folder of a model")],
    tasks: Annotated[str, typer.Option(metavar="A,B", help="names of tasks, or their files, separated by commas")],
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="a folder with files of tasks beside lm-eval's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="ask the first N items of each task; default: all")] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="ask multiple choice once for every rotation of its options")
    ] = False,
    teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the teacher of the model in DIR")
    ] = None,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    trial: TrialName = None,
    stage: StageName = None,
    best: BestOf = None,
    device: Annotated[str, typer.Option(help="where the models are: cpu, cuda")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 16,
    tracking_uri: TrackingUri = None,
) -> None:
    """Ask a finished student and its teacher tasks of lm-eval, which the extra `eval` installs."""
    from orchestrator.record import evaluating
    from orchestrator.run.interrupt import Interrupt

    try:
        names = tuple(filter(None, tasks.split(",")))
        question = evaluating.Question(names, task_path, limit, rotate, batch_size, device)
        if model.is_dir():
            evaluating.check_no_study(trial, stage, best, overrides)
            models, job = evaluating.of_folders(model, teacher), None
        else:
            job = look_at(command, model, overrides, home, tracking_uri)
            store = store_of(model, home, must_exist=True)
            models = evaluating.of_study(job, store, teacher, trial, stage, best)
        store = store_of(model, home, write=True)
        with Interrupt(), home_of(model, home).in_use():
            failed = evaluating.evaluate(question, models, store, job)
    except ValueError as error:
        bad_input(error)
    raise typer.Exit(1 if failed else 0)


@app.command()
def gc(
    command: typer.Context,
    studies: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[STUDY...]", help="studies to keep beside all that the home remembers"),
    ] = None,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete them; without it they are only listed")] = False,
) -> None:
    """List, or delete, the stages that no study needs: none that was run in this home, and none of those given."""
    from orchestrator.record.screen.plan_view import gc_text

    first = studies[0] if studies else Path("study")
    store = store_of(first, home, write=delete, must_exist=True)
    kept = needed_of_all(home_of(first, home))
    for study in studies or []:
        kept |= look_at(command, study, overrides, home).keys
    print(gc_text(store, kept, delete))


@app.command()
def doctor(
    command: typer.Context,
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="say of each stage if it needs it")] = None,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    fix: Annotated[bool, typer.Option("--fix", help="remove what is surely safe to remove")] = False,
) -> None:
    """Name what interrupted runs left behind, and what to do about it; exit code 1 where something needs attention."""
    needed = None if study is None else look_at(command, study, overrides, home).keys
    place = home_of(study or Path("study"), home)
    store_of(study or Path("study"), home)
    from orchestrator.record.doctor import doctor_text, examine

    text, code = doctor_text(examine(place, needed), fix)
    print(text)
    raise typer.Exit(code)


@app.command()
def ui(
    study: StudyName,
    home: HomeDirectory = None,
    host: Annotated[str, typer.Option(help="address to serve it on; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the MLflow UI", min=1, max=65_535)] = 5000,
    auth: Annotated[bool, typer.Option("--auth", help="ask for user and password (MLflow's basic auth)")] = False,
) -> None:
    """Serve the MLflow UI on the study's records until Ctrl-C."""
    place = home_of(study, home)
    if not (place.root / "mlflow.db").exists():
        bad_input(f"{place.root} holds nothing yet: run the study first, or give its --home")
    from orchestrator.record.tracking.server import serve

    try:
        serve(place, host, port, auth)
    except ValueError as error:
        bad_input(error)


app.command("list")(home_commands.list_studies)
for each in (
    home_commands.show,
    home_commands.compare,
    home_commands.prune,
    home_commands.archive,
    home_commands.delete,
):
    app.command()(each)

if __name__ == "__main__":
    app()
