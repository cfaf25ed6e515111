"""Commands that compute: `run` the stages of a study, `evaluate` a student of it. The third, `measure`, is a module.

Place in the flow: `cli` names them; `running` and `evaluating` do what they ask.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.record.given import bad_input, home_of, look_at, run_job, store_of
from orchestrator.record.options import (
    BestOf,
    Claims,
    Cpus,
    HomeDirectory,
    Overrides,
    RayAddress,
    StageName,
    StudyFile,
    TrackingUri,
    TrialName,
)


def run(
    command: typer.Context,
    study: StudyFile,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    ray_address: RayAddress = None,
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
