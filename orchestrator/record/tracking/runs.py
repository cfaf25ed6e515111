"""MLflow's runs by what they stand for: found again by a tag, made once, told each thing once.

Imports mlflow, as `client` does. What the runs stand for is `entry`'s to say. Invariant: runs of other homes are not
touched, and neither is what a user wrote: a run's name and note are renewed only where they are as this program left
them, other tags are not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import DatasetInput, Metric, Param, RunTag

from orchestrator.record.home import Home
from orchestrator.record.tracking.client import connect, tracking_at
from orchestrator.record.tracking.entry import MARKER, Entry, Point, Result
from orchestrator.record.tracking.experiment import LONGEST_NOTE, NOTE, NOTED, digest, experiment_of, is_ours
from orchestrator.record.tracking.identity import HOME, home_id

IDENTITY = "layerswap.id"
TOLD = "layerswap.told"  # tag: which results of the run's stages were sent
MODEL = "layerswap.model"
IN_PLAN = "layerswap.in_plan"  # tag: whether the study, as it was run last, asks for the run
NAMED = "layerswap.name"  # tag: how this program called the run last
NAME, PARENT = "mlflow.runName", "mlflow.parentRunId"
LONGEST_VALUE = 500  # letters; MLflow refuses 6,000
BATCH = 500  # metrics in a call; MLflow takes 1,000
MARK = 8  # letters that tell what was sent


class Runs:
    """The runs of one study in MLflow. Any call may raise what MLflow raises; then make a new one.

    Only `live` ones are reopened; `heard` is when MLflow last answered (monotonic seconds). `newest` says whether this
    is how the study was run last, so that runs are called and marked by it. `source` are tags of what makes a run,
    `data` what it reads.
    """

    def __init__(
        self,
        home: Home,
        study: str,
        live: bool = True,
        newest: bool = True,
        source: dict[str, str] | None = None,
        data: list[DatasetInput] | None = None,
    ) -> None:
        self.home, self.study, self.live, self.newest = home, study, live, newest
        self.source, self.data = source or {}, data or []
        self.client = connect(home)
        self.own = home.tracking in (None, home.database)  # whether all runs there are of this home
        self.home_id = home_id(home)
        self.ids: dict[str, str] = {}  # identity -> run id
        self.tags: dict[str, dict[str, str]] = {}  # run id -> its tags
        self.params: dict[str, dict[str, str]] = {}  # run id -> its parameters
        self.status: dict[str, str] = {}  # run id -> RUNNING, FINISHED, FAILED or KILLED
        self.sent: dict[str, int] = {}  # run id -> last journal step sent
        self.with_data: set[str] = set()  # run ids
        self.experiment = experiment_of(self.client, home, study, self.home_id)
        self.heard = 0.0
        self.find()

    def open(self, entry: Entry, began: Callable[[], int | None] = lambda: None) -> str:
        """The id of an entry's run, made where there is none yet, and as the entry says where it was otherwise.

        `began` tells when the work of a new run began, in milliseconds since 1970; None stands for now.
        """
        parameters = {key: value[:LONGEST_VALUE] for key, value in entry.parameters.items()}
        run = self.ids.get(entry.identity)
        if (
            run is not None
            and self.newest
            and any(self.params[run].get(key, value) != value for key, value in parameters.items())
        ):
            # MLflow changes no parameter: from now on another run stands for this.
            self._set_aside(entry.identity, {IDENTITY: f"{entry.identity}:{run}"})
            run = None
        tags = {**entry.tags, IN_PLAN: str(self.newest).lower(), HOME: self.home_id}
        if entry.parent is not None:
            tags[PARENT] = self.ids[entry.parent]
        if run is None:
            first = {**self.source, IDENTITY: entry.identity, "layerswap.study": self.study, **_named(entry)}
            made = self.client.create_run(
                self.experiment, start_time=began(), tags={**tags, **first}, run_name=entry.name
            )
            self._know(entry.identity, made)
            run = made.info.run_id
        if self.newest:
            self.renew(run, tags)
            self._rename(run, entry.name)
            self.note(run, entry.note)
        self._complete(run, parameters)
        return str(run)

    def renew(self, run: str, tags: dict[str, str]) -> None:
        """Give a run tags that it does not have with these values."""
        changed = {key: value for key, value in tags.items() if self.tags[run].get(key) != value}
        if changed:
            self.client.log_batch(run, tags=[RunTag(key, value) for key, value in changed.items()])
            self.tags[run] |= changed

    def forget(self, run: str, *tags: str) -> None:
        """Take tags from a run."""
        for tag in tags:
            if tag in self.tags[run]:
                self.client.delete_tag(run, tag)
                del self.tags[run][tag]

    def note(self, run: str, text: str) -> None:
        """Give a run a note for people, unless a person wrote or removed it."""
        text = text[:LONGEST_NOTE]
        if not text or digest(text) == self.tags[run].get(NOTED):
            return
        there = self.client.get_run(run).data.tags.get(NOTE)  # somebody may have written since
        ours = is_ours(there, self.tags[run].get(NOTED))
        self.renew(run, {NOTED: digest(text), **({NOTE: text} if ours else {})})

    def set_aside(self, wanted: set[str]) -> None:
        """Mark the runs that the study, as it was run last, does not ask for."""
        for identity in self.ids.keys() - wanted:
            self._set_aside(identity)

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

    def lacks(self, run: str, results: list[Result]) -> bool:
        """Whether a run was not sent all of these."""
        return not {_mark(result) for result in results} <= self._told(run)

    def tell(self, run: str, results: list[Result]) -> None:
        """Send those results of finished stages that a run lacks; MLflow writes the tag of it last.

        Where it was told others in their place, before a study was edited, these count from now on: of two values at
        one step MLflow shows the later one.
        """
        told, marks = self._told(run), [_mark(result) for result in results]
        points = [
            point for mark, (_, several) in zip(marks, results, strict=True) if mark not in told for point in several
        ]
        if not points:
            return
        if told - set(marks):
            points = [(name, value, int(time.time() * 1000), step) for name, value, _, step in points]
        for start in range(0, len(points), BATCH):
            last = start + BATCH >= len(points)
            tags = [RunTag(TOLD, ",".join(marks))] if last else []
            self.client.log_batch(run, metrics=[Metric(*point) for point in points[start : start + BATCH]], tags=tags)
        self.tags[run][TOLD] = ",".join(marks)

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

    def add_file(self, run: str, path: Path, folder: str | None = None) -> None:
        """Give a run a file, in place of one of the same name."""
        self.client.log_artifact(run, str(path), folder)
        self.heard = time.monotonic()

    def add_text(self, run: str, name: str, text: str) -> None:
        """Give a run a file of this name and text."""
        self.client.log_text(run, text, name)
        self.heard = time.monotonic()

    def add_model(self, run: str, name: str, key: str, artefacts: str) -> None:
        """A logged model that points into the store, in place of what earlier attempts left half made."""
        if MODEL in self.tags[run]:
            return
        with tracking_at(self.home.tracking_uri):
            model = mlflow.create_external_model(
                name=name,
                source_run_id=run,
                tags={"stage_key": key, "artefacts": artefacts, "stage": self.tags[run][NAME]},
                model_type="layerswap-student",
                experiment_id=self.experiment,
            )
        for half in self.client.search_logged_models([self.experiment], f"name = '{name}'"):
            if half.source_run_id == run and half.model_id != model.model_id:  # another home may have one of that name
                self.client.delete_logged_model(half.model_id)
        self.renew(run, {MODEL: model.model_id})
        self.heard = time.monotonic()

    def _told(self, run: str) -> set[str]:
        return {mark for mark in self.tags[run].get(TOLD, "").split(",") if len(mark) == MARK}

    def _complete(self, run: str, parameters: dict[str, str]) -> None:
        """Give a run the parameters and the data that it lacks."""
        entries = [Param(key, value) for key, value in parameters.items() if key not in self.params[run]]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run, params=entries[start : start + 100])
            self.params[run] |= {entry.key: entry.value for entry in entries[start : start + 100]}
        if self.data and run not in self.with_data:
            self.client.log_inputs(run, self.data)
            self.with_data.add(run)

    def _rename(self, run: str, name: str) -> None:
        if self.tags[run].get(NAMED) == name:
            return
        there = self.client.get_run(run).info.run_name
        if self.tags[run].get(NAMED, there) == there:  # none: from before this program noted what it wrote
            self.client.update_run(run, name=name)
            self.tags[run][NAME] = name
        self.renew(run, {NAMED: name})

    def _set_aside(self, identity: str, more: dict[str, str] | None = None) -> None:
        """Let a run stand for what another variant of the study asks for: it keeps its numbers, and is told apart."""
        run = self.ids.pop(identity)
        if self.tags[run].get(IN_PLAN) == "false":
            return
        name, behind = self.tags[run].get(NAMED, self.tags[run][NAME]), f" · another variant {run[:6]}"
        self._rename(run, name.removesuffix(behind) + behind)
        self.forget(run, "layerswap.trial", "layerswap.trials")
        if self.status[run] == "RUNNING":
            self.close(run, "KILLED")
        self.renew(run, {IN_PLAN: "false", HOME: self.home_id, **(more or {})})  # last: then nothing is left to do

    def find(self) -> None:
        """Learn the home's runs that are there; where an answer was lost and a run made twice, one stays: the one that
        is known, else the first."""
        token = None
        of_this_home = "" if self.own else f"tags.`{HOME}` = '{self.home_id}'"
        while True:
            page = self.client.search_runs(
                [self.experiment], of_this_home, max_results=1000, page_token=token, order_by=["attributes.start_time"]
            )
            for run in page:
                identity = run.data.tags.get(IDENTITY)
                if identity is None or run.data.tags.get(HOME, self.home_id) != self.home_id:
                    continue
                if self.ids.get(identity, run.info.run_id) != run.info.run_id:
                    self.client.delete_run(run.info.run_id)
                elif identity not in self.ids:
                    self._know(identity, run)
            self.heard = time.monotonic()
            token = page.token
            if not token:
                return

    def _know(self, identity: str, run: Any) -> None:
        self.ids[identity] = run.info.run_id
        self.tags[run.info.run_id] = dict(run.data.tags)
        self.params[run.info.run_id] = dict(run.data.params)
        self.status[run.info.run_id] = run.info.status
        if run.inputs is not None and run.inputs.dataset_inputs:
            self.with_data.add(run.info.run_id)


def _named(entry: Entry) -> dict[str, str]:
    """Tags of a new run's name and note."""
    note = entry.note[:LONGEST_NOTE]
    return {NAME: entry.name, NAMED: entry.name, **({NOTE: note, NOTED: digest(note)} if note else {})}


def _mark(result: Result) -> str:
    """A result and its place on the curve, in few letters: a tag holds those of all stages of a path."""
    key, points = result
    return digest(f"{key} {points[0][3] if points else 0}")[:MARK]
