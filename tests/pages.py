"""What is generated in the pages, between marks that name what writes it: `python -m tests.pages --write`.

`python -m tests.models --write` writes what became of every type of transformers, in the same way.
"""

from __future__ import annotations

import argparse
import enum
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from orchestrator.cli import app

ROOT = Path(__file__).resolve().parents[1]
README, COMMANDS, FAMILIES = ROOT / "README.md", ROOT / "docs" / "commands.md", ROOT / "docs" / "families.md"
END = "<!-- end -->"
VALUES = {Path: "PATH", int: "N", float: "NUMBER"}  # what stands for an option's value, by its type
DEFAULT_STUDY = "studies/layerwise.yaml"


def written(page: Path, by: str) -> str:
    """What stands between the marks of what writes into a page."""
    return page.read_text(encoding="utf-8").partition(_mark(by))[2].partition(END)[0].strip()


def write(page: Path, by: str, text: str) -> None:
    """Put a text between them."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(_mark(by))
    assert mark, f"{page} has no marks of {by}"
    page.write_text(f"{before}{mark}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _mark(by: str) -> str:
    return f"<!-- written by python -m {by} --write -->"


def planned() -> str:
    """What `layerswap plan` prints of the default study, from the teacher to how much is shared."""
    with tempfile.TemporaryDirectory() as home:
        done = CliRunner().invoke(app, ["plan", str(ROOT / DEFAULT_STUDY), "--home", home])
    lines = done.output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("teacher"))
    last = next(number for number, line in enumerate(lines) if "sharing factor" in line)
    return "\n".join(["```", f"$ layerswap plan {DEFAULT_STUDY}", *lines[first : last + 1], "```"])


def commands() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        arguments = [one.metavar for one in command.params if one.param_type_name == "argument"]
        needed = [_option(one) for one in command.params if one.param_type_name == "option" and one.required]
        parts += [f"## {name}", f"`{' '.join(['layerswap', name, *arguments, *needed])}`", command.help.strip()]
        rows = [f"| `{_option(one)}` | {_told(one)} |" for one in command.params if one.param_type_name == "option"]
        parts += ["\n".join(["| option | |", "|---|---|", *rows])] if rows else []
    return "\n\n".join(parts)


def _option(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    value = parameter.metavar or VALUES.get(kind, parameter.opts[0].split("-")[-1].upper())
    return " ".join([parameter.opts[0], *([] if parameter.is_flag else [value])])


def _told(parameter: Any) -> str:
    """What an option says of itself, with its choices, its default where it has one, and its variable."""
    said, kind = parameter.help, parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        said += f" ({', '.join(choice.value for choice in kind)})"
    if not parameter.is_flag and parameter.default is not None:
        said += f"; default: {getattr(parameter.default, 'value', parameter.default)}"
    return said + (f"; or by `{parameter.envvar}`" if parameter.envvar else "")


GENERATED: dict[Path, Callable[[], str]] = {README: planned, COMMANDS: commands}


def main() -> None:
    """Print what is generated, or write it into its pages."""
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    for page, generate in GENERATED.items():
        if asked.write:
            write(page, "tests.pages", generate())
        else:
            print(generate())


if __name__ == "__main__":
    main()
