"""MLflow's client for a home: its own database, made where there is none, or the server that the user names.

The other importer of mlflow, beside `runs`. Invariant: whatever MLflow cannot read is told with what to do about it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A server that does not answer must not hold the sender for minutes: the next round tries again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")

import mlflow
import mlflow.store.db_migrations
from filelock import FileLock
from mlflow import MlflowClient
from sqlalchemy.engine import make_url

from orchestrator.record.home import Home, sqlite_uri
from orchestrator.record.tracking.identity import HOME, known_id

for noisy in ("mlflow", "alembic", "urllib3"):  # what fails is raised too, and told in one line by the recorder
    logging.getLogger(noisy).setLevel(logging.CRITICAL)


class AnotherVersionError(RuntimeError):
    """A database that another version of MLflow wrote; the message says what to do about it."""


def connect(home: Home) -> MlflowClient:
    """A client of where the records of a home go."""
    if home.tracking is None:
        make_database(home)
    with _of_this_version(home.tracking_uri):
        return MlflowClient(tracking_uri=home.tracking_uri)


@contextlib.contextmanager
def tracking_at(uri: str) -> Iterator[None]:
    """Let MLflow's functions that take no client go there; it writes the place into the environment, where our own
    commands and processes would read it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri("")  # which takes it out again
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextlib.contextmanager
def _of_this_version(uri: str) -> Iterator[None]:
    """Raise `AnotherVersionError` where MLflow refuses the database at this URI for its schema."""
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        found = re.search(r"database schema \(found version (\w+)", str(error))
        if found is None:
            raise
        told = make_url(uri).render_as_string(hide_password=True)
        known = Path(mlflow.store.db_migrations.__file__).parent.glob(f"versions/{found[1]}*.py")
        if any(known):
            upgrade = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", told])
            raise AnotherVersionError(
                f"the database is of an older MLflow than {mlflow.__version__}: make a copy of it, then run {upgrade}"
            ) from None
        raise AnotherVersionError(
            f"the database {told} is of another MLflow than {mlflow.__version__}, which does not know its schema "
            f"{found[1]}: install the MLflow that wrote it"
        ) from None


def wants_database(home: Home) -> bool:
    """Whether the home keeps its records in a database of its own, which is still to be made."""
    return home.tracking is None and not home.database_file.exists()


def make_database(home: Home) -> None:
    """Make the home's own database where there is none: whole or not at all, by one process.

    MLflow makes its tables step by step; two makers at a time, or a killed one, would leave what no later one can mend.
    """
    database = home.database_file
    unfinished = database.with_name(f"{database.name}.part")
    if not wants_database(home):
        return
    home.root.mkdir(parents=True, exist_ok=True)
    with FileLock(home.root / "mlflow.lock"):
        if not database.exists():
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=sqlite_uri(unfinished)).search_experiments(max_results=1)
            unfinished.replace(database)


def still_running(home: Home) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name and id of every run of this home in its own database that says RUNNING, and what marks it KILLED.

    Raises `AnotherVersionError` where another version of MLflow wrote the database.
    """
    with _of_this_version(home.database):
        client = MlflowClient(tracking_uri=home.database)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000):
        run_id = run.info.run_id
        if run.data.tags.get(HOME) in (None, known_id(home)):
            yield run.info.run_name, run_id, functools.partial(client.set_terminated, run_id, "KILLED")
