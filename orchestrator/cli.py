"""The command `layerswap`. Exit code 0: all done; 1: something failed; 2: bad input; 130, 143: interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from orchestrator.record import home_commands, look_commands, run_commands
from orchestrator.record.measure import measure
from orchestrator.record.regret_command import regret
from orchestrator.run.environment import own_process

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


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": look_commands.plan,
    "run": run_commands.run,
    "measure": measure,
    "regret": regret,
    "status": look_commands.status,
    "log": look_commands.log,
    "report": look_commands.report,
    "export": look_commands.export,
    "evaluate": run_commands.evaluate,
    "gc": home_commands.gc,
    "doctor": home_commands.doctor,
    "ui": look_commands.ui,
    "list": home_commands.list_studies,
    "show": home_commands.show,
    "compare": home_commands.compare,
    "prune": home_commands.prune,
    "archive": home_commands.archive,
    "delete": home_commands.delete,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app()
