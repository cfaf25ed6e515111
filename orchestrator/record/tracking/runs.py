"""MLflow's runs by what they stand for: found again by a tag, made once, told each thing once.

The only importer of mlflow. What the runs stand for is `tracking`'s to say.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from mlflow.entities import Metric, Param, RunTag
from sqlalchemy.engine import make_url

from orchestrator.record.home import Home, sqlite_uri
from orchestrator.record.records import leaves
from orchestrator.record.tracking.database import renew_places
from orchestrator.study.loader import dump

for noisy in ("mlflow", "alembic", "urllib3"):  # what fails is raised too, and told in one line by the recorder
    logging.getLogger(noisy).setLevel(logging.CRITICAL)
IDENTITY = "layerswap.id"
TOLD = "layerswap.told"  # tag: how many results of the run's stages were sent
MODEL = "layerswap.model"
MARKER = "stage_tokens"  # the last metric of every journal line
Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step


class Runs:
    """The runs of one study in MLflow. Any call may raise what MLflow raises; then make a new one.

    Only `live` ones are reopened; `heard` is when MLflow last answered (monotonic seconds).
    """

    def __init__(self, home: Home, study: str, live: bool = True) -> None:
        self.home, self.study, self.live = home, study, live
        if home.tracking is None:
            make_database(home)
        with _of_this_version(home.tracking_uri):
            self.client = MlflowClient(tracking_uri=home.tracking_uri)
        self.ids: dict[str, str] = {}  # identity -> run id
        self.tags: dict[str, dict[str, str]] = {}  # run id -> its tags
        self.params: dict[str, set[str]] = {}  # run id -> names of its parameters
        self.status: dict[str, str] = {}  # run id -> RUNNING, FINISHED, FAILED or KILLED
        self.sent: dict[str, int] = {}  # run id -> last journal step sent
        self.experiment = self._experiment()
        self._find()
        self.heard = time.monotonic()

    def open(
        self,
        identity: str,
        name: str,
        parent: str | None,
        tags: dict[str, str],
        params: dict[str, Any],
        began: Callable[[], int | None] = lambda: None,
    ) -> str:
        """The id of the run of `identity`, made where there is none yet, with these parameters.

        `began` tells when the work of a new run began, in milliseconds since 1970; None stands for now.
        """
        if identity not in self.ids:
            tags = {**tags, IDENTITY: identity, "layerswap.study": self.study, "mlflow.runName": name}
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            made = self.client.create_run(self.experiment, start_time=began(), tags=tags, run_name=name)
            self._know(identity, made)
        run = self.ids[identity]
        entries = [Param(k, str(dump(v))[:500]) for k, v in leaves(params).items() if k not in self.params[run]]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run, params=entries[start : start + 100])
            self.params[run] |= {entry.key for entry in entries[start : start + 100]}
        return run

    def reopen(self, run: str) -> None:
        """Mark a run as running again, if runs are live."""
        if self.live and self.status[run] != "RUNNING":
            self.client.update_run(run, status="RUNNING")
            self.status[run] = "RUNNING"

    def close(self, run: str, status: str, end_time: int | None = None) -> None:
        """Give a run its last status."""
        if self.status[run] != status:
            self.client.set_terminated(run, status, end_time=end_time)
            self.status[run] = status

    def told(self, run: str) -> int:
        """How many results of finished stages a run was sent."""
        return int(self.tags[run].get(TOLD, "0"))

    def tell(self, run: str, points: list[Point], told: int, note: str | None = None) -> None:
        """Send results of finished stages once, whatever becomes of the stages; MLflow writes the tags last."""
        tags = [] if note is None else [RunTag("mlflow.note.content", note)]
        metrics = [Metric(*point) for point in points]
        self.client.log_batch(run, metrics=metrics, tags=[*tags, RunTag(TOLD, str(told))])
        self.tags[run][TOLD] = str(told)

    def tag(self, run: str, key: str, value: str) -> None:
        """Set a tag."""
        self.client.set_tag(run, key, value)

    def resume(self, run: str) -> None:
        """Learn which journal points a run has."""
        if run not in self.sent:
            history = self.client.get_metric_history(run, MARKER)
            self.sent[run] = max((point.step for point in history), default=-1)

    def send(self, run: str, points: list[Point]) -> None:
        """Send points of a journal; `sent` is then the step of the last one."""
        if points:
            self.client.log_batch(run, metrics=[Metric(*point) for point in points])
            self.sent[run] = points[-1][3]
            self.heard = time.monotonic()

    def score(self, run: str, summary: dict[str, float]) -> None:
        """Send metrics that the run does not have with these values."""
        known = self.client.get_run(run).data.metrics
        for key, value in summary.items():
            if known.get(key) != value:
                self.client.log_metric(run, key, value)

    def add_file(self, run: str, path: Path) -> None:
        """Give a run a file, in place of one of the same name."""
        self.client.log_artifact(run, str(path))
        self.heard = time.monotonic()

    def add_model(self, run: str, name: str, key: str, artefacts: str) -> None:
        """A logged model that points into the store; one that an earlier attempt left half made is made again."""
        if MODEL in self.tags[run]:
            return
        for half in self.client.search_logged_models([self.experiment], f"name = '{name}'"):
            self.client.delete_logged_model(half.model_id)
        mlflow.set_tracking_uri(self.home.tracking_uri)
        model = mlflow.create_external_model(
            name=name,
            source_run_id=run,
            tags={
                "stage_key": key,
                "artefacts": artefacts,
                "stage": self.tags[run]["mlflow.runName"],
            },
            model_type="layerswap-student",
            experiment_id=self.experiment,
        )
        self.client.set_tag(run, MODEL, model.model_id)
        self.tags[run][MODEL] = model.model_id
        self.heard = time.monotonic()

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.study)
        place = None if self.home.artefacts is None else f"{self.home.artefacts}/{self.study}"
        if found is not None:
            if self.home.tracking is None and found.artifact_location != place:  # the home was moved
                renew_places(self.home)
            if found.lifecycle_stage == "deleted":  # in the UI, by its owner, who now runs the study again
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on runs and metrics
        return str(self.client.create_experiment(self.study, place, tags))

    def _find(self) -> None:
        """Learn the runs that are there; where an answer was lost and a run made twice, the first one stays."""
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], max_results=1000, page_token=token, order_by=["attributes.start_time ASC"]
            )
            for run in page:
                identity = run.data.tags.get(IDENTITY)
                if identity in self.ids:
                    self.client.delete_run(run.info.run_id)
                elif identity is not None:
                    self._know(identity, run)
            token = page.token
            if not token:
                return

    def _know(self, identity: str, run: Any) -> None:
        self.ids[identity] = run.info.run_id
        self.tags[run.info.run_id] = dict(run.data.tags)
        self.params[run.info.run_id] = set(run.data.params)
        self.status[run.info.run_id] = run.info.status


class AnotherVersionError(RuntimeError):
    """A database that another version of MLflow wrote; the message says what to do about it."""


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


def make_database(home: Home) -> None:
    """Make the home's own database where there is none: whole or not at all, by one process.

    MLflow makes its tables step by step; two makers at a time, or a killed one, would leave what no later one can mend.
    """
    database, unfinished = home.root / "mlflow.db", home.root / "mlflow.db.part"
    if database.exists():
        return
    home.root.mkdir(parents=True, exist_ok=True)
    with FileLock(home.root / "mlflow.lock"):
        if not database.exists():
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=sqlite_uri(unfinished)).search_experiments(max_results=1)
            unfinished.replace(database)


def still_running(database: str) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name and id of every run that says RUNNING, of any study, and what marks it KILLED.

    Raises `AnotherVersionError` where another version of MLflow wrote the database.
    """
    with _of_this_version(database):
        client = MlflowClient(tracking_uri=database)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000):
        run_id = run.info.run_id
        yield run.info.run_name, run_id, functools.partial(client.set_terminated, run_id, "KILLED")
