"""Where everything of a user's studies lies: one directory with the store, the MLflow database and the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.files import read_json, write_json

IN_USE = "in-use"  # a file that every running driver holds a shared lock on


@dataclasses.dataclass(frozen=True)
class Home:
    """The `--home` directory."""

    root: Path
    tracking: str | None = None  # a tracking server or database of the user's instead of the home's own

    @property
    def store(self) -> Path:
        """Stages, shared by all studies of this home."""
        return self.root / "store"

    @property
    def database(self) -> str:
        """URI of the home's own MLflow database."""
        return sqlite_uri(self.root / "mlflow.db")

    @property
    def tracking_uri(self) -> str:
        """Where MLflow's records go."""
        return self.tracking or self.database

    @property
    def artefacts(self) -> str | None:
        """Where MLflow keeps files; None where a tracking server decides."""
        served = self.tracking is not None and self.tracking.startswith("http")
        return None if served else (self.root / "mlartifacts").resolve().as_uri()

    def study(self, name: str) -> Path:
        """Reports of one study."""
        return self.root / "studies" / name

    def runs(self, name: str) -> list[dict[str, Any]]:
        """What earlier runs of a study used and trained, oldest first."""
        try:
            runs: list[dict[str, Any]] = read_json(self.study(name) / "runs.json")
        except (OSError, json.JSONDecodeError):
            return []
        return runs

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Say for the time of a run that somebody runs here; the kernel takes it back at any death."""
        with (self.root / IN_USE).open("a") as stream:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    @property
    def used(self) -> bool:
        """Whether a run is going on here at this moment."""
        try:
            with (self.root / IN_USE).open() as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:  # held, or on a file system without locks, where nobody can tell
            return True
        return False

    def add_run(self, name: str, run: dict[str, Any]) -> None:
        """Remember a run."""
        write_json(self.study(name) / "runs.json", [*self.runs(name), run])


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite database, whatever signs its path has."""
    plain = str(path.resolve())
    quoted = plain.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    # With a driver's name MLflow does not make the folder of the path as it is written here.
    return f"sqlite:///{plain}" if quoted == plain else f"sqlite+pysqlite:///{quoted}"


def default_home(study: Path) -> Path:
    """`runs/` beside the study's repository: the nearest folder above with a .git or pyproject.toml, else here."""
    for folder in study.resolve().parents:
        if (folder / ".git").exists() or (folder / "pyproject.toml").exists():
            return folder / "runs"
    return Path.cwd() / "runs"
