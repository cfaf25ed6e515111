"""Store -> MLflow: study run > trial run > stage run. The only importer of mlflow.

One process replays what stages wrote. Invariant: replaying is idempotent and may stop anywhere: a run is found again
by its tag, a journal line has one time and one step, MLflow ignores a point that it has, and what is sent once only
carries a mark on its run.
"""

from __future__ import annotations

import functools
import logging
import os
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
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from orchestrator.distill.journal import read_journal
from orchestrator.record.home import Home
from orchestrator.run.store import Store
from orchestrator.study.loader import dump
from orchestrator.study.plan import Plan, Step, Trial, operator_name
from orchestrator.study.spec import ThroughputSpec, short

for noisy in ("mlflow", "alembic", "urllib3"):  # what fails is raised too, and told in one line by the recorder
    logging.getLogger(noisy).setLevel(logging.CRITICAL)
IDENTITY = "layerswap.id"
TOLD = "layerswap.told"  # tag: how many results of the run's stages were sent
MODEL = "layerswap.model"
BATCH = 500
SUMMARY = (
    "perplexity",
    "perplexity_ratio",
    "accuracy",
    "agreement",
    "kl",
    "hit_nll",
    "miss_nll",
    "generation_agreement",
)


class Tracker:
    """Keeps one study's MLflow runs in step with the store. Any call may raise what MLflow raises; then make a new one.

    A `live` one marks the runs it finds as running again; `heard` is when MLflow last answered (monotonic seconds).
    """

    def __init__(self, home: Home, plan: Plan, speeds: dict[str, ThroughputSpec], live: bool = True) -> None:
        self.home, self.plan, self.speeds, self.live = home, plan, speeds, live
        self.store = Store(home.store)
        if home.tracking is None:
            make_database(home)
        self.client = MlflowClient(tracking_uri=home.tracking_uri)
        self.runs: dict[str, str] = {}  # identity -> run id
        self.tags: dict[str, dict[str, str]] = {}  # run id -> its tags
        self.params: dict[str, set[str]] = {}  # run id -> names of its parameters
        self.status: dict[str, str] = {}  # run id -> RUNNING, FINISHED, FAILED or KILLED
        self.sent: dict[str, int] = {}  # run id -> last journal step sent
        self.closed: set[str] = set()  # identities that need no more attention
        self.users = plan.users()
        self.experiment = self._experiment()
        self._find_runs()
        self.heard = time.monotonic()

    def sync(self) -> None:
        """Send what is new: runs of started stages, journal points, results of finished ones."""
        study = self._study_run()
        for name, step in [("teacher", self.plan.teacher), *self.plan.controls.items()]:
            role = "teacher" if name == "teacher" else "control"
            self._stage(f"stage:{step.train.key}", name, step, study, {"layerswap.role": role})
        for trial in self.plan.trials:
            self._trial(trial, study)

    def finish(self, stopped: dict[str, int], failures: dict[str, str], summary: dict[str, float]) -> None:
        """Send the rest and give every run its true status: trials of `stopped` were ended early, the rest is read."""
        self.sync()
        alone = [self.plan.teacher, *self.plan.controls.values()]
        complete = all(self.store.finished(step.evaluate.key) for step in alone)
        for trial in self.plan.trials:
            done = trial.name in stopped or all(self.store.finished(step.evaluate.key) for step in trial.steps)
            complete &= done
            run = self.runs.get(self._trial_identity(trial))
            if run is None:
                continue
            told = failures.get(trial.name) or next((e for s in trial.steps if (e := self._failure(s))), None)
            self.client.set_tag(run, "layerswap.stopped_early", str(trial.name in stopped).lower())
            if told and not done:
                self.client.set_tag(run, "layerswap.failure", told[:5000])
            self._close(run, "FINISHED" if done else "FAILED" if told else "KILLED")
        for step in self.plan.steps:
            identity = f"stage:{step.train.key}"
            if identity in self.runs and identity not in self.closed and not self.store.finished(step.evaluate.key):
                self._close(self.runs[identity], "FAILED" if self._failure(step) else "KILLED")
        study, failed = self._study_run(), bool(failures) or any(self._failure(step) for step in self.plan.steps)
        known = self.client.get_run(study).data.metrics
        for key, value in summary.items():
            if known.get(key) != value:
                self.client.log_metric(study, key, value)
        self._close(study, "FINISHED" if complete and not failures else "FAILED" if failed else "KILLED")

    def add_files(self, files: list[Path]) -> None:
        """Give the study run its files, and MLflow a model for every finished student, without copying weights."""
        for path in files:
            self.client.log_artifact(self._study_run(), str(path))
            self.heard = time.monotonic()
        for step in self.plan.steps:
            run = self.runs.get(f"stage:{step.train.key}")
            if run is not None and step.swapped and getattr(step.train, "phases", ()) and self.tags[run].get(TOLD):
                self._register(run, step)

    def run_id(self, step: Step) -> str | None:
        """The MLflow run of a step's stage."""
        return self.runs.get(f"stage:{step.train.key}")

    def _failure(self, step: Step) -> str | None:
        failure = self.store.failure(step.train.key) or self.store.failure(step.evaluate.key)
        return None if failure is None else str(failure["error"])

    def _experiment(self) -> str:
        name = self.plan.study.study
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":  # in the UI, by its owner, who now runs the study again
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on runs and metrics
        place = None if self.home.artefacts is None else f"{self.home.artefacts}/{name}"
        return str(self.client.create_experiment(name, place, tags))

    def _find_runs(self) -> None:
        """Learn the runs that are there; where an answer was lost and a run made twice, the first one stays."""
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], max_results=1000, page_token=token, order_by=["attributes.start_time ASC"]
            )
            for run in page:
                identity = run.data.tags.get(IDENTITY)
                if identity in self.runs:
                    self.client.delete_run(run.info.run_id)
                elif identity is not None:
                    self._know(identity, run)
            token = page.token
            if not token:
                return

    def _know(self, identity: str, run: Any) -> None:
        self.runs[identity] = run.info.run_id
        self.tags[run.info.run_id] = dict(run.data.tags)
        self.params[run.info.run_id] = set(run.data.params)
        self.status[run.info.run_id] = run.info.status

    def _run(self, identity: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, Any]) -> str:
        if identity not in self.runs:
            tags = {**tags, IDENTITY: identity, "layerswap.study": self.plan.study.study, "mlflow.runName": name}
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            self._know(identity, self.client.create_run(self.experiment, tags=tags, run_name=name))
        run = self.runs[identity]
        entries = [Param(key, value) for key, value in _flat(params).items() if key not in self.params[run]]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run, params=entries[start : start + 100])
            self.params[run] |= {entry.key for entry in entries[start : start + 100]}
        return run

    def _study_run(self) -> str:
        study = self.plan.study
        tags = {"layerswap.role": "study", "mlflow.note.content": study.question}
        run = self._run("study", study.study, None, tags, {})
        if "study" not in self.closed:
            self.closed.add("study")
            self._reopen(run)
        return run

    def _reopen(self, run: str) -> None:
        if self.live and self.status[run] != "RUNNING":
            self.client.update_run(run, status="RUNNING")
            self.status[run] = "RUNNING"

    def _close(self, run: str, status: str, end_time: int | None = None) -> None:
        if self.status[run] != status:
            self.client.set_terminated(run, status, end_time=end_time)
            self.status[run] = status

    def _trial_identity(self, trial: Trial) -> str:
        return f"trial:{trial.steps[-1].train.key}:{len(trial.steps)}"

    def _trial(self, trial: Trial, study: str) -> None:
        identity = self._trial_identity(trial)
        started = [step for step in trial.steps if self.store.attempt(step.train.key) is not None]
        if not started or identity in self.closed:
            return
        operator = operator_name(trial.study.operator)
        tags = {"layerswap.role": "trial", "layerswap.trial": trial.name, "layerswap.operator": operator}
        run = self._run(identity, f"{trial.name} {operator}", study, tags, trial.values)
        for index, step in enumerate(trial.steps):
            owner = run if len(self.users[step.train.key]) == 1 else study
            layers = ",".join(map(str, getattr(step.train, "layers", ())))
            name = f"{'joint' if step.joint else f'stage {index + 1}'} · layers {layers} · {operator}"
            shared = ",".join(self.users[step.train.key])
            tags = {"layerswap.role": "stage", "layerswap.trials": shared, "layerswap.operator": operator}
            self._stage(f"stage:{step.train.key}", name, step, owner, tags)
        self._summarise(trial, run)
        if all(f"stage:{step.train.key}" in self.closed for step in trial.steps):
            self.closed.add(identity)

    def _summarise(self, trial: Trial, run: str) -> None:
        """The trial's own curve: quality over the tokens of its path, one point a stage, with links to the stages."""
        told = self._told(run)
        metrics: list[Metric] = []
        lines = []
        for index, step in enumerate(trial.steps):
            if not self.store.finished(step.evaluate.key):
                break
            done = self.store.done(step.evaluate.key)
            stamp = int(done["finished"] * 1000)
            result = done["result"]
            if index >= told:
                metrics += [Metric(name, float(result[name]), stamp, step.tokens) for name in SUMMARY if name in result]
                metrics.append(Metric("swapped_layers", float(len(step.swapped)), stamp, step.tokens))
            stage = self.runs.get(f"stage:{step.train.key}", "")
            lines.append(
                f"- layers {list(step.swapped)}: ratio {result['perplexity_ratio']:.3f} "
                f"([stage {short(step.train.key)}](#/experiments/{self.experiment}/runs/{stage}))"
            )
        if told < len(lines):
            self._tell(run, metrics, len(lines), RunTag("mlflow.note.content", "\n".join(lines)))

    def _told(self, run: str) -> int:
        return int(self.tags[run].get(TOLD, "0"))

    def _tell(self, run: str, metrics: list[Metric], told: int, *tags: RunTag) -> None:
        """Send results of finished stages once, whatever becomes of the stages; MLflow writes the tags last."""
        self.client.log_batch(run, metrics=metrics, tags=[*tags, RunTag(TOLD, str(told))])
        self.tags[run][TOLD] = str(told)

    def _stage(self, identity: str, name: str, step: Step, parent: str, tags: dict[str, str]) -> None:
        key = step.train.key
        if identity in self.closed or self.store.attempt(key) is None:
            return
        tags = {**tags, "layerswap.stage": key, "layerswap.layers": ",".join(map(str, step.swapped))}
        run = self._run(identity, name, parent, tags, {**step.train.model_dump(mode="json"), "stage_key": key})
        speed = self.speeds.get(key)
        results = [step.evaluate.key, *([] if speed is None else [speed.key])]
        if self._told(run) < len(results):
            if not self.store.finished(step.evaluate.key):
                self._reopen(run)
            if run not in self.sent:
                history = self.client.get_metric_history(run, "stage_tokens")
                self.sent[run] = max((point.step for point in history), default=-1)
            # Asked before the journal is read: a stage that is finished writes no more lines.
            trained = self.store.finished(key)
            finished = [result for result in results if self.store.finished(result)]
            self._journal(run, key)
            if trained and finished[:1] == results[:1]:
                self._results(run, finished)
        if self._told(run) and self.status[run] != "FINISHED" and self.store.finished(step.evaluate.key):
            self._close(run, "FINISHED", int(self.store.done(step.evaluate.key)["finished"] * 1000))
        if self._told(run) == len(results):
            self.closed.add(identity)
        self.heard = time.monotonic()

    def _journal(self, run: str, key: str) -> None:
        batch: list[Metric] = []
        for line in read_journal(self.store.folder(key), after=self.sent[run]):
            # The marker goes last, so that a batch that was cut is sent again as a whole.
            metrics = [*line["metrics"].items(), ("stage_tokens", line["tokens"])]
            stamp, step = int(line["time"] * 1000), line["step"]
            points = [Metric(name, float(value), stamp, step) for name, value in metrics]
            if len(batch) + len(points) > BATCH:
                self._send(run, batch)
                batch = []
            batch += points
        self._send(run, batch)

    def _send(self, run: str, points: list[Metric]) -> None:
        if points:
            self.client.log_batch(run, metrics=points)
            self.sent[run] = points[-1].step
            self.heard = time.monotonic()

    def _results(self, run: str, keys: list[str]) -> None:
        """Send the results of a stage's evaluation and, once it is there, of its measurement of speed."""
        for index in range(self._told(run), len(keys)):
            done = self.store.done(keys[index])
            stamp, last = int(done["finished"] * 1000), max(self.sent[run], 0)
            metrics = [Metric(name, value, stamp, last) for name, value in _numbers(done["result"]).items()]
            self._tell(run, metrics, index + 1)

    def _register(self, run: str, step: Step) -> None:
        """A logged model that points into the store; one that an earlier attempt left half made is made again."""
        if MODEL in self.tags[run]:
            return
        name, key = f"student-{short(step.train.key)}", step.train.key
        for half in self.client.search_logged_models([self.experiment], f"name = '{name}'"):
            self.client.delete_logged_model(half.model_id)
        mlflow.set_tracking_uri(self.home.tracking_uri)
        model = mlflow.create_external_model(
            name=name,
            source_run_id=run,
            tags={
                "stage_key": key,
                "artefacts": str(self.store.artefacts(key)),
                "stage": self.tags[run]["mlflow.runName"],
            },
            model_type="layerswap-student",
            experiment_id=self.experiment,
        )
        self.client.set_tag(run, MODEL, model.model_id)
        self.tags[run][MODEL] = model.model_id
        self.heard = time.monotonic()


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
            MlflowClient(tracking_uri=f"sqlite:///{unfinished.resolve()}").search_experiments(max_results=1)
            unfinished.replace(database)


def still_running(database: str) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name and id of every run that says RUNNING, of any study, and what marks it KILLED."""
    client = MlflowClient(tracking_uri=database)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000):
        run_id = run.info.run_id
        yield run.info.run_name, run_id, functools.partial(client.set_terminated, run_id, "KILLED")


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    if isinstance(values, dict) and values:
        for key, value in values.items():
            found |= _flat(value, f"{prefix}{key}.")
    elif isinstance(values, list | tuple) and values and isinstance(values[0], dict):
        for index, value in enumerate(values):
            found |= _flat(value, f"{prefix}{index}.")
    elif prefix:
        found[prefix.rstrip(".")] = str(dump(values))[:500]
    return found


def _numbers(result: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/length_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found
