"""`layerswap evaluate`: tasks of lm-eval asked of a student and of its teacher, as stages of the store.

Place in the flow: a plan of a stage for every model and task, what is known of them, the stages that are not, a table.
Invariant: what is finished is read, so a teacher is asked once for all its students, and a run that was interrupted
goes on with the task that it was at.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext
from orchestrator.record.answer.task_table import LEGEND, task_table
from orchestrator.record.answer.text import text_table
from orchestrator.record.choice import exported_stage
from orchestrator.record.driver import report
from orchestrator.record.job import Job
from orchestrator.record.records import make_records
from orchestrator.record.task_results import label, task_result
from orchestrator.record.tracking.recorder import Recorder
from orchestrator.run.compute import compute
from orchestrator.run.hardware import accelerators
from orchestrator.run.limits import cores
from orchestrator.run.store import Store
from orchestrator.study.loader import StudyError
from orchestrator.study.pretrained import KEY, check_teacher
from orchestrator.study.recipe import Numerics
from orchestrator.study.sources import Location, folder_fingerprint
from orchestrator.study.spec import DEVICES, TasksSpec, short


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and how. ValueError for what cannot be."""

    tasks: tuple[str, ...]  # names, or paths of files
    folder: Path | None  # with more tasks than lm-eval's own
    limit: int | None
    rotate: bool
    batch_size: int
    device: str

    def __post_init__(self) -> None:
        from orchestrator.distill.measuring.harness import check_installed

        if not self.tasks:
            raise ValueError("--tasks names no task: give names, separated by commas")
        for name, number in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name} {number} must be 1 or more{': leave it out for all' * (name == '--limit')}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--task-path {self.folder} is no folder: give one that holds files of tasks")
        if self.device not in DEVICES:
            raise ValueError(f"--device {self.device} is not known: give one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not accelerators():
            raise ValueError("--device cuda needs an accelerator that torch can use: give --device cpu")
        check_installed()


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is asked: its name for people, and what of a specification identifies it."""

    name: str
    identity: Mapping[str, Any]
    location: Mapping[str, Location] = dataclasses.field(default_factory=dict)


def of_study(
    job: Job, store: Store, given: Path | None, trial_name: str | None, stage: str | None, best: str | None
) -> list[Model]:
    """The student of a study that these mean, and its teacher; ValueError where that is none, or a damaged one.

    `given` is the folder of a teacher, which only a folder can have.
    """
    if given is not None:
        raise ValueError(f"--teacher {given}: the teacher of a study's student is the study's: leave it out")
    plan = job.plan
    records = make_records(plan, store, job.speeds)
    key = exported_stage(plan, store, records, trial_name, stage, best)
    for each in (key, plan.teacher.train.key, plan.tokens.key):
        if (name := store.damaged(each)) is not None:
            raise ValueError(f"stage {short(each)}: {name} is damaged or gone: run the study again, which computes it")
    trial, place, step = next(
        (trial, place, step)
        for trial in plan.trials
        for place, step in enumerate(trial.steps, 1)
        if step.train.key == key
    )
    teacher = plan.teacher.train.key
    shared = {"tokens": plan.tokens.key, "teacher": teacher, "numerics": step.evaluate.numerics}
    name = f"{trial.name} {'joint' if step.joint else f'stage {place}'} ({short(key)})"
    return [Model(name, {**shared, "subject": key}), Model("teacher", {**shared, "subject": teacher})]


def of_folders(student: Path, teacher: Path | None) -> list[Model]:
    """The models of folders, in float32 on all cores of this process; ValueError for a folder without one."""
    numerics = Numerics(threads=cores())
    found = []
    for option, folder in (("", student), ("--teacher ", teacher)):
        if folder is None:
            continue
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{option}{folder} holds no config.json: give the folder of a saved model, or a study file"
            )
        try:
            check_teacher(folder)
            fingerprint = folder_fingerprint(folder)
        except StudyError as error:
            raise ValueError(f"{option}{str(error).removeprefix(f'{KEY}: ')}") from None
        identity = {"tokens": None, "teacher": None, "subject": None, "folder": fingerprint, "numerics": numerics}
        found.append(Model(str(folder), identity, {fingerprint: Location(files=(str(folder),))}))
    return found


def check_no_study(trial: str | None, stage: str | None, best: str | None, overrides: list[str] | None) -> None:
    """ValueError for options of a study beside a folder."""
    given = {"--trial": trial, "--stage": stage, "--best": best, "--set": overrides}
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} belongs to a study, and this is the folder of a model: leave it out")


def evaluate(question: Question, models: list[Model], store: Store, job: Job | None) -> list[str]:
    """Ask what the store does not know yet, print a table, and bring a study's report and MLflow up to date.

    Returns a line for each stage that failed. Raises `ValueError` for tasks that cannot be asked, before anything is
    computed.
    """
    from orchestrator.distill.measuring.harness import HARNESS, SEED, find_tasks, load_task

    found = find_tasks(question.tasks, question.folder)
    tasks = [load_task(name, file, question.limit, question.rotate) for name, file in found.items()]
    locations = {task.fingerprint: Location(files=(str(found[task.name]),)) for task in tasks}
    for model in models:
        locations |= model.location
    context = RunContext(str(store.root.resolve()), question.device, locations=locations)
    shared: dict[str, Any] = {
        "limit": question.limit,
        "batch_size": question.batch_size,
        "processor": question.device,
        "harness": HARNESS,
        "seed": SEED,
    }
    specs = [
        [
            TasksSpec(task=task.name, fingerprint=task.fingerprint, rotate=task.rotated, **shared, **model.identity)
            for model in models
        ]
        for task in tasks
    ]
    for line in store.withdraw_damaged(spec.key for several in specs for spec in several):
        print(line, file=sys.stderr)
    print(_plan_text(question, models, tasks, specs, store), flush=True)
    failures = [
        failure
        for several in specs
        for model, spec in reversed(list(zip(models, several, strict=True)))  # the teacher first
        if (failure := _compute(spec, model.name, context, store)) is not None
    ]
    done = [[*several, None][:2] for several in specs if store.finished(several[0].key)]
    told = {label(own): task_result(store, own, teacher) for own, teacher in done if own is not None}
    print(f"\n{text_table(task_table({models[0].name: told}).drop(columns='row'))}\n\n{LEGEND}")
    if len(models) == 1:
        print("There is no teacher beside it, and so no relative score: give the folder of its teacher as --teacher.")
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    if job is not None:
        report(job, Recorder(job.home, job.plan, job.speeds, live=False))
    return failures


def _compute(spec: TasksSpec, name: str, context: RunContext, store: Store) -> str | None:
    """Compute a stage unless it is there; returns a line where it failed."""
    if store.finished(spec.key):
        return None
    began = time.monotonic()
    try:
        compute(spec.model_dump_json(), context)
    except Exception as error:  # of the model or the task; the other stages are asked nevertheless
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"{label(spec)} of {name}: {type(error).__name__}: {reason}"
    print(f"{label(spec)} of {name}: {time.monotonic() - began:.1f} s", flush=True)
    return None


def _plan_text(
    question: Question, models: list[Model], tasks: list[Any], specs: list[list[TasksSpec]], store: Store
) -> str:
    """Which tasks are asked of which models, and what is known already."""
    lines = [f"{' beside '.join(model.name for model in models)}, on {question.device}"]
    for task, several in zip(tasks, specs, strict=True):
        known = [model.name for model, spec in zip(models, several, strict=True) if store.finished(spec.key)]
        told = f"known of {' and '.join(known)}" if known else "nothing known yet"
        plain = question.rotate and not task.rotated and task.task.OUTPUT_TYPE == "multiple_choice"
        order = ", not rotated since the prompt does not tell the options" if plain else ""
        lines.append(f"  {label(several[0])}: {task.items} items, {task.requests} requests, {told}{order}")
    return "\n".join(lines)
