"""Store -> MLflow: study run > trial run > stage run. The only importer of mlflow.

One process replays what stages wrote. Invariant: replaying is idempotent: a run is found again by its tag, a journal
line has one time and one step, and MLflow ignores a point that it has.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag

from orchestrator.distill.journal import read_journal
from orchestrator.record.home import Home
from orchestrator.run.store import Store
from orchestrator.run.sweep import Outcome
from orchestrator.study.loader import dump
from orchestrator.study.plan import Plan, Step, Trial, operator_name
from orchestrator.study.spec import ThroughputSpec, short

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)
IDENTITY = "layerswap.id"
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
    """Keeps one study's MLflow runs in step with the store. `sync` may be called at any time, from one thread."""

    def __init__(self, home: Home, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        self.home, self.plan, self.speeds = home, plan, speeds
        self.store = Store(home.store)
        self.client = MlflowClient(tracking_uri=home.database)
        self.experiment = self._experiment()
        self.runs = self._known_runs()
        self.sent: dict[str, int] = {}  # run id -> last step sent
        self.closed: set[str] = set()  # identities that need no more attention
        self.users = plan.users()

    def sync(self) -> None:
        """Send what is new: runs of started stages, journal points, results of finished ones."""
        study = self._study_run()
        for name, step in [("teacher", self.plan.teacher), *self.plan.controls.items()]:
            role = "teacher" if name == "teacher" else "control"
            self._stage(f"stage:{step.train.key}", name, step, study, {"layerswap.role": role})
        for trial in self.plan.trials:
            self._trial(trial, study)

    def finish(self, outcome: Outcome, summary: dict[str, float], files: list[Path], interrupted: bool = False) -> None:
        """Send the rest and give every run its true status."""
        self.sync()
        failed = set(outcome.failures)
        for trial in self.plan.trials:
            run = self.runs.get(self._trial_identity(trial))
            if run is None:
                continue
            complete = all(self.store.finished(step.evaluate.key) for step in trial.steps)
            stopped = trial.name in outcome.stopped
            status = "FINISHED" if complete or stopped else "FAILED" if trial.name in failed else "KILLED"
            self.client.set_tag(run, "layerswap.stopped_early", str(stopped).lower())
            if trial.name in outcome.failures:
                self.client.set_tag(run, "layerswap.failure", outcome.failures[trial.name][:5000])
            self.client.set_terminated(run, status)
        for step in self.plan.steps:
            identity = f"stage:{step.train.key}"
            if identity in self.runs and identity not in self.closed:
                lost = self.store.failure(step.train.key) or self.store.failure(step.evaluate.key)
                self.client.set_terminated(self.runs[identity], "FAILED" if lost else "KILLED")
        study = self._study_run()
        for key, value in summary.items():
            self.client.log_metric(study, key, value)
        for path in files:
            self.client.log_artifact(study, str(path))
        self.client.set_terminated(study, "KILLED" if interrupted else "FAILED" if failed else "FINISHED")

    def run_id(self, step: Step) -> str | None:
        """The MLflow run of a step's stage."""
        return self.runs.get(f"stage:{step.train.key}")

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.plan.study.study)
        if found is not None:
            return str(found.experiment_id)
        name = self.plan.study.study
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on runs and metrics
        return str(self.client.create_experiment(name, f"{self.home.artefacts}/{name}", tags))

    def _known_runs(self) -> dict[str, str]:
        known: dict[str, str] = {}
        token = None
        while True:
            page = self.client.search_runs([self.experiment], max_results=1000, page_token=token)
            known |= {run.data.tags[IDENTITY]: run.info.run_id for run in page if IDENTITY in run.data.tags}
            token = page.token
            if not token:
                return known

    def _run(self, identity: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, Any]) -> str:
        if identity not in self.runs:
            tags = {**tags, IDENTITY: identity, "layerswap.study": self.plan.study.study, "mlflow.runName": name}
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            run = self.client.create_run(self.experiment, tags=tags, run_name=name)
            self.runs[identity] = run.info.run_id
            entries = [Param(key, value) for key, value in _flat(params).items()]
            for start in range(0, len(entries), 100):
                self.client.log_batch(run.info.run_id, params=entries[start : start + 100])
        return self.runs[identity]

    def _study_run(self) -> str:
        study = self.plan.study
        known = "study" in self.runs
        run = self._run(
            "study", study.study, None, {"layerswap.role": "study", "mlflow.note.content": study.question}, {}
        )
        if "study" not in self.sent:
            self.sent["study"] = 0
            if known:
                self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
        return run

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
        metrics: list[Metric] = []
        lines = []
        for step in trial.steps:
            if not self.store.finished(step.evaluate.key):
                break
            done = self.store.done(step.evaluate.key)
            stamp = int(done["finished"] * 1000)
            result = done["result"]
            metrics += [Metric(name, float(result[name]), stamp, step.tokens) for name in SUMMARY if name in result]
            metrics.append(Metric("swapped_layers", float(len(step.swapped)), stamp, step.tokens))
            stage = self.runs.get(f"stage:{step.train.key}", "")
            lines.append(
                f"- layers {list(step.swapped)}: ratio {result['perplexity_ratio']:.3f} "
                f"([stage {short(step.train.key)}](#/experiments/{self.experiment}/runs/{stage}))"
            )
        if self.sent.get(run, 0) < len(lines):
            self.client.log_batch(run, metrics=metrics, tags=[RunTag("mlflow.note.content", "\n".join(lines))])
            self.sent[run] = len(lines)

    def _stage(self, identity: str, name: str, step: Step, parent: str, tags: dict[str, str]) -> None:
        key = step.train.key
        if identity in self.closed or self.store.attempt(key) is None:
            return
        tags = {**tags, "layerswap.stage": key, "layerswap.layers": ",".join(map(str, step.swapped))}
        known = identity in self.runs
        run = self._run(identity, name, parent, tags, {**step.train.model_dump(mode="json"), "stage_key": key})
        if run not in self.sent:
            self.sent[run] = self._last_step(run) if known else -1
            if known and not self.store.finished(step.evaluate.key):
                self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
        self._journal(run, key)
        if self.store.finished(key) and self.store.finished(step.evaluate.key):
            self._results(run, step, name)
            speed = self.speeds.get(key)
            if speed is None or self.store.finished(speed.key):
                self.closed.add(identity)

    def _last_step(self, run: str) -> int:
        history = self.client.get_metric_history(run, "stage_tokens")
        return max((point.step for point in history), default=-1)

    def _journal(self, run: str, key: str) -> None:
        lines = read_journal(self.store.folder(key), after=self.sent[run])
        points: list[Metric] = []
        for line in lines:
            stamp, step = int(line["time"] * 1000), line["step"]
            # The marker goes last, so that a batch that was cut is sent again as a whole.
            metrics = [*line["metrics"].items(), ("stage_tokens", line["tokens"])]
            fresh = [Metric(name, float(value), stamp, step) for name, value in metrics]
            if len(points) + len(fresh) > BATCH:
                self.client.log_batch(run, metrics=points)
                points = []
            points += fresh
            self.sent[run] = step
        if points:
            self.client.log_batch(run, metrics=points)

    def _results(self, run: str, step: Step, name: str) -> None:
        marker = f"results:{run}"
        speed = self.speeds.get(step.train.key)
        measured = speed is not None and self.store.finished(speed.key)
        stage = 2 if measured else 1
        if self.sent.get(marker, 0) >= stage:
            return
        stamped = [self.store.done(step.evaluate.key)]
        if measured and speed is not None:
            stamped.append(self.store.done(speed.key))
        last = max(self.sent[run], 0)
        for done in stamped:
            stamp = int(done["finished"] * 1000)
            metrics = [Metric(k, float(v), stamp, last) for k, v in _numbers(done["result"]).items()]
            self.client.log_batch(run, metrics=metrics)
        if marker not in self.sent and step.swapped and getattr(step.train, "phases", ()):
            self._register(run, step, name)
        self.client.set_terminated(run, "FINISHED", end_time=int(stamped[0]["finished"] * 1000))
        self.sent[marker] = stage

    def _register(self, run: str, step: Step, name: str) -> None:
        """A logged model that points into the store; no file is copied."""
        import mlflow

        if self.client.get_run(run).data.tags.get("layerswap.model"):
            return
        mlflow.set_tracking_uri(self.home.database)
        model = mlflow.create_external_model(
            name=f"student-{short(step.train.key)}",
            source_run_id=run,
            tags={"stage_key": step.train.key, "artefacts": str(self.store.artefacts(step.train.key)), "stage": name},
            model_type="layerswap-student",
            experiment_id=self.experiment,
        )
        self.client.set_tag(run, "layerswap.model", model.model_id)


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
