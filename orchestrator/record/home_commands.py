"""Commands that keep a home: list, show and compare its studies, drop weights, forget, tidy up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.record.given import bad_input, home_of, look_at, needed_of_all, store_of
from orchestrator.record.options import HomeDirectory, Kept, Overrides, StudyName

Yes = Annotated[bool, typer.Option("--yes", help="do it; without it what would go is only listed")]


def list_studies(home: HomeDirectory = None) -> None:
    """List what was run in a home, newest first."""
    from orchestrator.record.catalogue import listed, table

    store_of(None, home)
    place = home_of(None, home)
    found = listed(place)
    print(table(found) if found else f"nothing was run in {place.root} yet")


def show(command: typer.Context, study: StudyName, home: HomeDirectory = None) -> None:
    """Tell who ran a study when, with which software, and how each run ended."""
    from orchestrator.record.catalogue import shown
    from orchestrator.record.remembered import UnknownStudyError

    job = _run_before(command, study, home)
    try:
        print(shown(job.variant))
    except UnknownStudyError as error:
        bad_input(error)


def compare(command: typer.Context, first: StudyName, second: StudyName, home: HomeDirectory = None) -> None:
    """Tell in which values two studies differ, what they share, and their best students side by side."""
    from orchestrator.record.catalogue import by_layers, differences, shared_stages, table

    jobs = [_run_before(command, study, home) for study in (first, second)]
    one, other = (job.variant for job in jobs)
    if one == other:
        bad_input(f"{first} and {second} are one study, {one.title}: `layerswap list` names the others")
    values, (shared, *each) = differences(one, other), shared_stages(one, other)
    students = by_layers(*map(_records, jobs))
    print(f"A: {one.title}\nB: {other.title}\n")
    print(table(values) if values else "the same values: what they read differs")
    print(f"\n{shared} stages are shared, of {each[0]} and {each[1]}\n")
    print(table(students) if students else "neither has a finished student yet")


def prune(
    command: typer.Context,
    study: StudyName,
    home: HomeDirectory = None,
    keep: Annotated[Kept, typer.Option(help="whose weights stay: best student, the front's, or all")] = Kept.front,
    disk: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="of all weights of students: drop more, worst first")
    ] = None,
    restore: Annotated[
        str | None, typer.Option(metavar="STAGE", help="start of a key: let the next run train this one again")
    ] = None,
    yes: Yes = False,
) -> None:
    """Drop weights of a study's students by a rule; all numbers stay, and what needs the weights trains them again."""
    if restore is not None:
        _restore(command, study, home, restore)
        return
    _drop(command, study, home, keep.value, None if disk is None else int(disk * 2**30), yes)


def archive(command: typer.Context, study: StudyName, home: HomeDirectory = None, yes: Yes = False) -> None:
    """Drop the weights of all students of a study; its numbers and reports stay."""
    _drop(command, study, home, "none", None, yes)


def delete(command: typer.Context, study: StudyName, home: HomeDirectory = None, yes: Yes = False) -> None:
    """Forget a study: delete its reports and the stages that no other study of the home needs."""
    from orchestrator.record import keeping
    from orchestrator.record.remembered import UnknownStudyError

    job = _run_before(command, study, home)
    _not_while_it_runs(job)
    store = store_of(study, home, write=yes, must_exist=True)
    try:
        room = keeping.to_delete(job.home, job.variant, store)
    except UnknownStudyError as error:
        bad_input(error)
    stays = f"; {room.shared} stay, which other studies need" if room.shared else ""
    verb = "deleted" if yes else "would be deleted by --yes"
    told = keeping.delete(job.variant, store, room) if yes else []
    print(
        "\n".join([*told, f"{job.variant.title}, {len(room.stages)} stages, {room.bytes / 2**20:.1f} MB {verb}{stays}"])
    )


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


def doctor(
    command: typer.Context,
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="say of each stage if it needs it")] = None,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    fix: Annotated[bool, typer.Option("--fix", help="remove what is surely safe to remove")] = False,
) -> None:
    """Name what interrupted runs left behind, and what to do about it; exit code 1 where something needs attention."""
    needed = None if study is None else look_at(command, study, overrides, home).keys
    place = home_of(study, home)
    store_of(study, home)
    from orchestrator.record.doctor import doctor_text, examine

    text, code = doctor_text(examine(place, needed), fix)
    print(text)
    raise typer.Exit(code)


def _drop(command: typer.Context, study: Path, home: Path | None, keep: Any, budget: int | None, yes: bool) -> None:
    from orchestrator.record import keeping
    from orchestrator.record.remembered import UnknownStudyError

    job = _run_before(command, study, home)
    _not_while_it_runs(job)
    store = store_of(study, home, write=yes, must_exist=True)
    try:
        elsewhere = keeping.needed_elsewhere(job.home, job.variant)
    except UnknownStudyError as error:
        bad_input(error)
    room = keeping.to_prune(job.plan, store, _records(job), keep, budget, elsewhere)
    if yes:
        keeping.prune(store, room)
    print(keeping.room_text(room, yes))


def _restore(command: typer.Context, study: Path, home: Path | None, start: str) -> None:
    job = _run_before(command, study, home)
    store = store_of(study, home, write=True, must_exist=True)
    found = [key for key in sorted(job.keys) if key.startswith(start) and store.finished(key) and store.dropped(key)]
    if len(found) != 1:
        told = f"{len(found)} stages whose weights were dropped begin so"
        bad_input(f"--restore {start}: {told}: `layerswap status {study}` lists all")
    print("\n".join([*store.withdraw_damaged(found, needed=True), f"train it with: layerswap run {job.asked.file}"]))


def _run_before(command: typer.Context, study: Path, home: Path | None) -> Any:
    """The job of a study that was run; bad input where it was not."""
    job = look_at(command, study, None, home)
    if not job.variant.runs():
        bad_input(f"{study} was not run in {job.home.root} as it is written now: `layerswap list` tells what was")
    return job


def _not_while_it_runs(job: Any) -> None:
    if job.variant.alive:
        bad_input(f"{job.variant.title} is running: end that run first, or wait for it")


def _records(job: Any) -> list[dict[str, Any]]:
    from orchestrator.record.records import make_records
    from orchestrator.run.store import Store

    store = Store(job.home.store, write=False)
    return make_records(job.plan, store, job.speeds)
