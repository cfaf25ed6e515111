"""The commands that a run names, to go on, report, export and browse, with the options that this one was given."""

from __future__ import annotations

import shlex

import typer

from orchestrator.record.passwords import without_passwords

OWN_RECORDS = "home"  # `--tracking-uri`: the home's own database, whatever the environment says


def commands_of(command: typer.Context) -> dict[str, str]:
    """By name, this command and those that may follow it, with what it was given on its line or by the environment.

    A tracking URI of the environment is not repeated, for it is there for the next command too; passwords never are.
    """
    given: dict[str, list[str]] = {}
    for parameter in command.command.params:
        name = str(parameter.name)
        source, value = command.get_parameter_source(name), command.params[name]
        if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
            continue
        if name == "tracking_uri" and source.name == "ENVIRONMENT":
            continue
        option = [parameter.opts[0]] if parameter.param_type_name == "option" else []
        name = name if option else "study"  # the one argument, whatever else it may be
        for one in value if isinstance(value, list | tuple) else [value]:
            said = f"{one:g}" if isinstance(one, float) else without_passwords(str(getattr(one, "value", one)))
            given[name] = [*given.get(name, []), *option, said]

    def with_words(name: str, *taken: str) -> str:
        return shlex.join(["layerswap", name, *(word for each in taken for word in given.get(each, []))])

    study = ("study", "overrides", "home")
    browse = f"make ui STUDY={shlex.join(given['study'])}" if "home" not in given else with_words("ui", "study", "home")
    tracking = command.params.get("tracking_uri")
    if tracking not in (None, OWN_RECORDS):
        browse = without_passwords(str(tracking))
    return {
        str(command.info_name): with_words(str(command.info_name), *given),
        "report": with_words("report", *study, "tracking_uri"),
        "export": with_words("export", *study),
        "ui": browse,
    }
