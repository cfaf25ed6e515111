"""Where everything of a user's studies lies: one directory with the store, the MLflow database and the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

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
    def database_file(self) -> Path:
        """The home's own MLflow database."""
        return self.root / "mlflow.db"

    @property
    def database(self) -> str:
        """URI of `database_file`."""
        return sqlite_uri(self.database_file)

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

    def in_use(self) -> AbstractContextManager[None]:
        """Say for the time of a run that somebody runs here."""
        return holding(self.root / IN_USE)

    @property
    def used(self) -> bool:
        """Whether a run is going on here at this moment."""
        return held(self.root / IN_USE)

    @property
    def writable(self) -> bool:
        """Whether this user may write here."""
        return os.access(self.root, os.W_OK)


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold a shared lock on a file; the kernel takes it back at any death."""
    with path.open("a") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def held(path: Path) -> bool:
    """Whether some process holds the file."""
    try:
        with path.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or on a file system without locks, where nobody can tell
        return True
    return False


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite database, whatever signs its path has."""
    plain = str(path.resolve())
    quoted = plain.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    # With a driver's name MLflow does not make the folder of the path as it is written here.
    return f"sqlite:///{plain}" if quoted == plain else f"sqlite+pysqlite:///{quoted}"


def default_home(study: Path) -> Path:
    """`runs/` of the study's repository (the nearest folder above with a .git or pyproject.toml), else beside it."""
    for folder in study.resolve().parents:
        if (folder / ".git").exists() or (folder / "pyproject.toml").exists():
            return folder / "runs"
    return study.resolve().parent / "runs"
