"""What the words of a command mean: a study laid out, its home and store, the job; bad input ends the command here.

Place in the flow: the commands of `cli` begin here. Invariant: nothing is written but by `store_of` with `write`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from orchestrator.files import json_text, write_json
from orchestrator.run.hardware import hardware
from orchestrator.study.loader import Document, StudyError, read_document, validate
from orchestrator.study.peek import check_files
from orchestrator.study.schema import Study
from orchestrator.study.sources import Location, Resolved, resolve
from orchestrator.study.spec import DEVICES, Device

EXIT_BAD_INPUT = 2


def load(study: Path, overrides: list[str] | None, store: Any, device: str = "cpu") -> Any:
    """The plan of a study on a device, `Growing` with the results of a store; the teacher's model is looked at too,
    which takes seconds."""
    try:
        return asked_of(study, tuple(overrides or ()), device, look=True).growing(store)
    except StudyError as error:
        bad_input(error)


def device_named(name: str) -> Device:
    """The device of this name. Raises `StudyError` for one that is not known."""
    if name not in DEVICES:
        raise StudyError(f"--device {name} is not known: give one of {', '.join(DEVICES)}")
    return name


def asked_of(study: Path, overrides: tuple[str, ...], device: str, *, look: bool = False) -> Any:
    """A study as it is asked for now, its inputs looked at: an `Asked`. Raises `StudyError`."""
    from orchestrator.record.remembered import Asked

    on, document = device_named(device), read_document(study, overrides)
    resolved = _resolve(document, validate(document), study.parent, look)
    text = study.read_text(encoding="utf-8")
    return Asked(str(study.absolute()), text, overrides, document.values, document.places, resolved, on, hardware(on))


def asked_before(home: Any, study: Path, overrides: tuple[str, ...]) -> Any:
    """A study as it was run in a home, by its file or its name; asked for now where it was never run as its file says.

    Raises `StudyError` for its file and inputs, `UnknownStudyError` for a name.
    """
    from orchestrator.record.remembered import UnknownStudyError, as_written, named

    if study.exists():
        document = read_document(study, overrides)
        validate(document)
        variant = as_written(home, document)
    elif study.suffix in (".yaml", ".yml"):
        variant = None
    elif overrides:
        told = f"--set {overrides[0]} belongs to a study file, and {study} is what was run: leave it out"
        raise UnknownStudyError(told)
    else:
        variant = named(home, str(study))
    return asked_of(study, overrides, "cpu") if variant is None else variant.asked()


def _resolve(document: Document, valid: Study, base: Path, look: bool) -> Resolved:
    """What the study refers to, looked at; errors placed in the study file by the key they begin with."""
    try:
        resolved = resolve(valid, base)
        check_files(valid, resolved)
        if look and resolved.teacher is not None:
            _look(resolved.locations[resolved.teacher])
        return resolved
    except StudyError as error:
        key = str(error).split(":")[0]
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        raise StudyError(f"{document.place(path)}: {error}") from None


def _look(teacher: Location) -> None:
    """Ask the loader whether a local teacher is whole, and say what stands in for what its tokenizer lacks."""
    if teacher.hub is not None:
        return  # the stage that imports it looks
    try:
        from orchestrator.distill.models.whole import Given, look  # and installed families, which may be wrong

        found = look(Given(teacher.files[0], gguf=teacher.gguf))
    except ValueError as error:
        raise StudyError(f"teacher.folder: {error}") from None
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


def bad_input(error: object) -> NoReturn:
    """Say what is wrong and end the command with code 2."""
    print(error, file=sys.stderr)
    raise typer.Exit(EXIT_BAD_INPUT)


def json_goes_to(file: Path | None) -> None:
    """Bad input where `--json` names no file that can be written; `-` is the terminal."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        bad_input(f"--json {file} cannot be written: give the path of a file in a directory that exists, or -")


def tell(text: str, file: Path | None, value: Any) -> None:
    """Print what a command says, and its numbers into the file of `--json`; where that is `-`, numbers alone."""
    if file == Path("-"):
        print(json_text(value))
        return
    print(text)
    if file is not None:
        write_json(file, value)


def home_of(study: Path | None, home: Path | None) -> Any:
    """The `Home` that was given, or the study's usual one; without a study that of a study which lies here."""
    from orchestrator.record.home import Home, default_home

    return Home(home or default_home(study or Path("study")))


def store_of(study: Path | None, home: Path | None, *, write: bool = False, must_exist: bool = False) -> Any:
    """Its `Store`, to be read unless `write`; bad input where it is unusable, or must exist and does not."""
    from orchestrator.run.store import Store, StoreError

    place = home_of(study, home)
    try:
        store = Store(place.store, write=False)
        if must_exist and not place.store.is_dir():
            bad_input(f"{place.root} holds nothing yet: run the study first, or give its --home")
        return Store(place.store) if write else store
    except StoreError as error:
        bad_input(error)


def run_job(
    command: typer.Context, study: Path, overrides: list[str] | None, home: Path | None, tracking_uri: str | None,
    device: str,
) -> tuple[Any, Resolved]:  # fmt: skip
    """The `Job` of a study that is about to run, its inputs looked at, with the words that started it."""
    from orchestrator.run.store import StoreError

    try:
        asked = asked_of(study, tuple(overrides or ()), device, look=True)
        job = _job(command, home_of(study, home).root, tracking_uri, asked)
    except (StudyError, StoreError) as error:
        bad_input(error)
    from orchestrator.record.tracking import boards

    if (lack := boards.lacking(boards.asked(job.plan.study))) is not None:
        bad_input(lack)
    return job, asked.resolved


def look_at(
    command: typer.Context, study: Path, overrides: list[str] | None, home: Path | None, tracking_uri: str | None = None
) -> Any:
    """The `Job` of a study to be looked at: as it was run, by its file or by its name in the home.

    Only a study that was never run as its file says now is resolved again, for which its inputs must be there.
    """
    from orchestrator.record.remembered import UnknownStudyError
    from orchestrator.run.store import StoreError

    place = home_of(study, home)
    try:
        return _job(command, place.root, tracking_uri, asked_before(place, study, tuple(overrides or ())))
    except (StudyError, UnknownStudyError, StoreError) as error:
        bad_input(error)


def needed_of_all(home: Any) -> set[str]:
    """Keys of all stages that what was run in a home needs."""
    from orchestrator.record.remembered import UnknownStudyError, variants

    try:
        return {key for variant in variants(home) for key in variant.needed()}
    except UnknownStudyError as error:
        bad_input(error)


def _job(command: typer.Context, root: Path, tracking_uri: str | None, asked: Any) -> Any:
    from orchestrator.record.commands import OWN_RECORDS, commands_of
    from orchestrator.record.home import Home
    from orchestrator.record.job import Job
    from orchestrator.record.passwords import without_passwords

    tracking_uri = None if tracking_uri == OWN_RECORDS else tracking_uri
    if tracking_uri is not None and re.match(r"(?!file:)[a-z][a-z0-9+.-]*://", tracking_uri) is None:
        source = command.get_parameter_source("tracking_uri")
        told = " (of the environment)" if source is not None and source.name == "ENVIRONMENT" else ""
        bad_input(
            f"--tracking-uri {without_passwords(tracking_uri)}{told}: no URI of a server or database; write "
            "http://HOST:PORT, sqlite:////FILE for a database, or home for the one in the home"
        )
    return Job.of(asked, Home(root, tracking_uri), commands_of(command))
