"""Who runs what with which software on which machine: what a run is remembered with, here and in MLflow."""

from __future__ import annotations

import dataclasses
import functools
import getpass
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from orchestrator.run.hardware import hardware

PACKAGES = ("layerswap", "torch", "transformers", "datasets", "ray", "mlflow", "pandas")
GIT_SECONDS = 10.0  # a repository on a file system that does not answer must not hold up a run


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where results come from."""

    command: str  # as it was typed, but for what `commands_of` leaves out
    user: str
    host: str
    hardware: str
    python: str
    versions: dict[str, str]  # of `PACKAGES`
    commit: str | None  # of the repository that holds this code, "+changes" behind it where files differ; None: no git

    @classmethod
    def of(cls, command: str) -> Provenance:
        """That of this process."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return cls(command, _user(), platform.node(), hardware(), platform.python_version(), versions, commit())


@functools.cache
def commit() -> str | None:
    """The commit of the repository that this code is run from; None where it is installed, or git is not."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
    )
    return done.stdout.strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user id has no name
        return "unknown"
