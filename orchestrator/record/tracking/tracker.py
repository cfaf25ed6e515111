"""Store -> MLflow: study run > trial run > stage run.

One process replays what stages wrote. Invariant: replaying is idempotent and may stop anywhere: a run is found again
by its tag, a journal line has one time and one step, MLflow ignores a point that it has, and what is sent once only
carries a mark on its run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from orchestrator.distill.training.journal import read_journal
from orchestrator.record.home import Home
from orchestrator.record.probe_results import probe_numbers, probe_result
from orchestrator.record.task_results import task_numbers, task_results
from orchestrator.record.tracking.runs import MARKER, Point, Runs
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan, Trial, operator_name
from orchestrator.study.spec import ThroughputSpec, short
from orchestrator.study.stages import Step

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
    "greedy_generation_perplexity",
    "sampled_generation_perplexity",
)


class Tracker:
    """Keeps one study's MLflow runs in step with the store. Any call may raise what MLflow raises; then make a new one.

    A `live` one marks the runs it finds as running again.
    """

    def __init__(self, home: Home, plan: Plan, speeds: dict[str, ThroughputSpec], live: bool = True) -> None:
        self.plan, self.speeds = plan, speeds
        self.store, self.users = Store(home.store), plan.users()
        self.closed: set[str] = set()  # identities that need no more attention
        self.runs = Runs(home, plan.study.study, live)

    @property
    def heard(self) -> float:
        """When MLflow last answered, in monotonic seconds."""
        return self.runs.heard

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
        self._asked()
        alone = [self.plan.teacher, *self.plan.controls.values()]
        complete = all(self._finished(step) for step in alone)
        for trial in self.plan.trials:
            done = trial.name in stopped or all(self._finished(step) for step in trial.steps)
            complete &= done
            run = self.runs.ids.get(self._trial_identity(trial))
            if run is None:
                continue
            told = failures.get(trial.name) or next((e for s in trial.steps if (e := self._failure(s))), None)
            self.runs.tag(run, "layerswap.stopped_early", str(trial.name in stopped).lower())
            if told and not done:
                self.runs.tag(run, "layerswap.failure", told[:5000])
            self.runs.close(
                run, "FINISHED" if done else "FAILED" if told else "KILLED", self._ended(trial) if done else None
            )
        for step in self.plan.steps:
            identity = f"stage:{step.train.key}"
            if identity in self.runs.ids and identity not in self.closed and not self.store.finished(step.evaluate.key):
                self.runs.close(self.runs.ids[identity], "FAILED" if self._failure(step) else "KILLED")
        study, failed = self._study_run(), bool(failures) or any(self._failure(step) for step in self.plan.steps)
        self.runs.score(study, summary)
        self.runs.close(study, "FINISHED" if complete and not failures else "FAILED" if failed else "KILLED")

    def _asked(self) -> None:
        """What tasks and probes found of students and their teacher, beside the rest of their runs."""
        found = {key: task_numbers(tasks) for key, tasks in task_results(self.store).items()}
        for step in self.plan.steps:
            numbers = probe_numbers(probe_result(self.store, step)) if step.probes else {}
            found[step.train.key] = found.get(step.train.key, {}) | numbers
        for key, numbers in found.items():
            run = self.runs.ids.get(f"stage:{key}")
            if run is not None and numbers:
                self.runs.score(run, numbers)

    def add_files(self, files: list[Path]) -> None:
        """Give the study run its files, and MLflow a model for every finished student, without copying weights."""
        for path in files:
            self.runs.add_file(self._study_run(), path)
        for step in self.plan.steps:
            run = self.runs.ids.get(f"stage:{step.train.key}")
            if run is not None and step.swapped and getattr(step.train, "phases", ()) and self.runs.told(run):
                key = step.train.key
                self.runs.add_model(run, f"student-{short(key)}", key, str(self.store.artefacts(key).resolve()))

    def run_id(self, step: Step) -> str | None:
        """The MLflow run of a step's stage."""
        return self.runs.ids.get(f"stage:{step.train.key}")

    def _finished(self, step: Step) -> bool:
        return all(self.store.finished(spec.key) for spec in (step.evaluate, *step.probed))

    def _failure(self, step: Step) -> str | None:
        failures = (self.store.failure(spec.key) for spec in (step.train, step.evaluate, *step.probed))
        return next((str(failure["error"]) for failure in failures if failure is not None), None)

    def _study_run(self) -> str:
        study = self.plan.study
        tags = {"layerswap.role": "study", "mlflow.note.content": study.question}
        run = self.runs.open("study", study.study, None, tags, {})
        if "study" not in self.closed:
            self.closed.add("study")
            self.runs.reopen(run)
        return run

    def _trial_identity(self, trial: Trial) -> str:
        return f"trial:{trial.steps[-1].train.key}:{len(trial.steps)}"

    def _trial(self, trial: Trial, study: str) -> None:
        identity = self._trial_identity(trial)
        started = [step for step in trial.steps if self.store.begun(step.train.key)]
        if not started or identity in self.closed:
            return
        operator = operator_name(trial.study.operator)
        tags = {"layerswap.role": "trial", "layerswap.trial": trial.name, "layerswap.operator": operator}
        run = self.runs.open(
            identity,
            f"{trial.name} {operator}",
            study,
            tags,
            trial.values,
            lambda: min(self._began(step.train.key) for step in started),
        )
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
        told = self.runs.told(run)
        points: list[Point] = []
        lines = []
        for index, step in enumerate(trial.steps):
            if not self.store.finished(step.evaluate.key):
                break
            done = self.store.done(step.evaluate.key)
            stamp = int(done["finished"] * 1000)
            result = done["result"]
            if index >= told:
                points += [(name, float(result[name]), stamp, step.tokens) for name in SUMMARY if name in result]
                points.append(("swapped_layers", float(len(step.swapped)), stamp, step.tokens))
            stage = self.runs.ids.get(f"stage:{step.train.key}", "")
            lines.append(
                f"- layers {list(step.swapped)}: ratio {result['perplexity_ratio']:.3f} "
                f"([stage {short(step.train.key)}](#/experiments/{self.runs.experiment}/runs/{stage}))"
            )
        if told < len(lines):
            self.runs.tell(run, points, len(lines), note="\n".join(lines))

    def _stage(self, identity: str, name: str, step: Step, parent: str, tags: dict[str, str]) -> None:
        key = step.train.key
        if identity in self.closed or not self.store.begun(key):
            return
        tags = {**tags, "layerswap.stage": key, "layerswap.layers": ",".join(map(str, step.swapped))}
        params = {**step.train.model_dump(mode="json"), "stage_key": key}
        run = self.runs.open(identity, name, parent, tags, params, lambda: self._began(key))
        speed = self.speeds.get(key)
        results = [step.evaluate.key, *([] if speed is None else [speed.key])]
        if self.runs.told(run) < len(results):
            if not self.store.finished(step.evaluate.key):
                self.runs.reopen(run)
            self.runs.resume(run)
            # Asked before the journal is read: a stage that is finished writes no more lines.
            trained = self.store.finished(key)
            finished = [result for result in results if self.store.finished(result)]
            self._journal(run, key)
            if trained and finished[:1] == results[:1]:
                self._results(run, finished)
        if self.runs.told(run) and self.runs.status[run] != "FINISHED" and self.store.finished(step.evaluate.key):
            self.runs.close(run, "FINISHED", int(self.store.done(step.evaluate.key)["finished"] * 1000))
        if self.runs.told(run) == len(results):
            self.closed.add(identity)
        self.runs.heard = time.monotonic()

    def _began(self, key: str) -> int:
        """When a stage began, in milliseconds since 1970: its last attempt, or the first line of an earlier one."""
        times = [line["time"] for line in read_journal(self.store.folder(key))[:1]]
        attempt = self.store.attempt(key)
        if attempt is not None:
            times.append(attempt["started"])
        if not times:  # a mirror has no attempts
            done = self.store.done(key)
            times.append(done["finished"] - done["seconds"])
        return int(1000 * min(times))

    def _ended(self, trial: Trial) -> int | None:
        """When the last evaluation of a trial ended, in milliseconds since 1970; None before the first one."""
        finished = [key for step in trial.steps if self.store.finished(key := step.evaluate.key)]
        return max((int(1000 * self.store.done(key)["finished"]) for key in finished), default=None)

    def _journal(self, run: str, key: str) -> None:
        batch: list[Point] = []
        for line in read_journal(self.store.folder(key), after=self.runs.sent[run]):
            # The marker goes last, so that a batch that was cut is sent again as a whole.
            metrics = [*line["metrics"].items(), (MARKER, line["tokens"])]
            stamp, step = int(line["time"] * 1000), line["step"]
            points = [(name, float(value), stamp, step) for name, value in metrics]
            if len(batch) + len(points) > BATCH:
                self.runs.send(run, batch)
                batch = []
            batch += points
        self.runs.send(run, batch)

    def _results(self, run: str, keys: list[str]) -> None:
        """Send the results of a stage's evaluation and, once it is there, of its measurement of speed."""
        for index in range(self.runs.told(run), len(keys)):
            done = self.store.done(keys[index])
            stamp, last = int(done["finished"] * 1000), max(self.runs.sent[run], 0)
            points = [(name, value, stamp, last) for name, value in _numbers(done["result"]).items()]
            self.runs.tell(run, points, index + 1)


def _numbers(result: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/length_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found
