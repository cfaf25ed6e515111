"""A run from the plan to the answer: sweep in the foreground, progress and MLflow beside it, the report at the end.

Invariant: whatever goes wrong with telling, the computing goes on; whatever goes wrong with computing is told and ends
in an exit code that is not 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from orchestrator.distill.context import RunContext
from orchestrator.files import canonical_json
from orchestrator.record.home import Home
from orchestrator.record.progress import Progress
from orchestrator.record.records import Record, best_path, make_records
from orchestrator.record.report import answer, write_report
from orchestrator.record.tracking import Tracker
from orchestrator.run.cluster import Cluster
from orchestrator.run.store import Store
from orchestrator.run.sweep import Outcome, missing, run_plan
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec


@dataclasses.dataclass(frozen=True)
class Job:
    """A study that is ready to run, and the words that started it."""

    plan: Plan
    home: Home
    speeds: dict[str, ThroughputSpec]
    study_file: Path
    command: str  # the same command goes on after an interruption

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.study.study


class Terminated(BaseException):
    """SIGTERM arrived."""


def run_study(job: Job, context: RunContext, cluster: Cluster) -> int:
    """Compute what is missing, tell everything, and return the exit code."""
    began = time.time()
    store = Store(job.home.store)
    for line in store.withdraw_damaged([*job.plan.specs, *(spec.key for spec in job.speeds.values())]):
        print(line, file=sys.stderr)
    before = _finished(job.plan, store)
    watch = _Watch(job, cluster.cpus)
    outcome, stopped_by = Outcome(_stopped_before(job)), 0
    watch.start()
    try:
        if missing(job.plan, store, job.speeds, outcome.stopped):
            outcome = run_plan(job.plan, context, job.speeds, cluster)
    except KeyboardInterrupt:
        stopped_by = signal.SIGINT
    except Terminated:
        stopped_by = signal.SIGTERM
    finally:
        watch.stop()
    run = {
        "started": began,
        "seconds": time.time() - began,
        "trained": sorted(_finished(job.plan, store) - before),
        "reused": len(before),
        "peak_rss_mb": watch.peak_mb,
        "disk_mb": store.disk_bytes() / 2**20,
        "plan": _digest(job),
        "stopped": None if stopped_by or outcome.failures else outcome.stopped,
    }
    job.home.add_run(job.name, run)
    records, text = report(job, watch.tracker)
    watch.finish(outcome, records, bool(stopped_by))
    return _tell(job, outcome, text, stopped_by)


def report(job: Job, tracker: Tracker | None) -> tuple[list[Record], str]:
    """Write the report's files from what is finished; returns the records and the answer for the terminal."""
    last = last_run(job)
    records = make_records(
        job.plan,
        Store(job.home.store),
        job.speeds,
        set(last.get("trained", [])),
        tracker.run_id if tracker else lambda _: None,
    )
    folder = job.home.study(job.name)
    write_report(job.plan, records, last, folder)
    commands = [
        f"report:   {folder / 'report.md'}",
        f"records:  layerswap report {job.study_file} --json records.json",
        f"export:   layerswap export {job.study_file} --to student",
        f"browse:   make ui STUDY={job.study_file}",
    ]
    return records, answer(job.plan, records, last, commands)


def exported_stage(job: Job, begins: str | None) -> str:
    """The key of the finished student to export: the one that `begins` so, or the end of the best path.

    Raises `ValueError` where none or several finished students fit.
    """
    store = Store(job.home.store, write=False)
    steps = {step.train.key: step for trial in job.plan.trials for step in trial.steps}
    if begins is not None:
        found = [key for key in steps if key.startswith(begins) and store.finished(key)]
        if len(found) != 1:
            raise ValueError(f"--stage {begins}: {len(found)} finished students begin so; layerswap status lists them")
        return found[0]
    path = best_path(make_records(job.plan, store, job.speeds, set(), lambda _: None))
    if not path:
        raise ValueError("no student is finished yet: run the study first")
    return str(path[-1]["stage_key"])


def last_run(job: Job) -> dict[str, Any]:
    """The newest run of a study, with the highest memory of all its runs; empty before the first."""
    runs = job.home.runs(job.name)
    return {**runs[-1], "peak_rss_mb": max(run["peak_rss_mb"] for run in runs)} if runs else {}


class _Watch:
    """The two threads beside a run: one tells the terminal and weighs the processes, one keeps MLflow in step."""

    def __init__(self, job: Job, cores: int) -> None:
        self.job = job
        self.progress = Progress(job.plan, Store(job.home.store), job.speeds, cores)
        self.tracker: Tracker | None = None
        self.behind = False
        self.peak_mb = 0.0
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self._every, args=(1.0, self._look), daemon=True),
            threading.Thread(target=self._every, args=(3.0, self._record), daemon=True),
        ]

    def start(self) -> None:
        def terminate(*_: object) -> None:
            raise Terminated

        signal.signal(signal.SIGTERM, terminate)
        self.progress.begin()
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        self._look()
        self._record()

    def finish(self, outcome: Outcome, records: list[Record], interrupted: bool) -> None:
        """Give every MLflow run its true status and the study run its files."""
        if self.tracker is None:
            return
        best = best_path(records)
        summary = {"best_perplexity_ratio": best[-1]["metrics"]["perplexity_ratio"]} if best else {}
        files = sorted(path for path in self.job.home.study(self.job.name).iterdir() if path.name != "runs.json")
        try:
            self.tracker.finish(outcome, summary, files, interrupted)
        except Exception as error:
            self._say_behind(error)

    def _record(self) -> None:
        try:
            if self.tracker is None:
                self.tracker = Tracker(self.job.home, self.job.plan, self.job.speeds)
            self.tracker.sync()
            self.behind = False
        except Exception as error:
            self._say_behind(error)

    def _say_behind(self, error: Exception) -> None:
        if not self.behind:
            told = str(error).split("\n")[0][:200]
            print(
                f"MLflow is behind, nothing is lost, the study goes on: {type(error).__name__}: {told}", file=sys.stderr
            )
        self.behind = True

    def _look(self) -> None:
        self.progress.tick()
        self.peak_mb = max(self.peak_mb, _tree_rss_mb())

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        while not self.over.wait(seconds):
            action()


def _tell(job: Job, outcome: Outcome, text: str, stopped_by: int) -> int:
    if not stopped_by:
        print(f"\n{text}", flush=True)
    for name, steps in outcome.stopped.items():
        print(f"{name} was stopped early after {steps} stages")
    for name, reason in outcome.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if stopped_by:
        print(f"stopped; nothing finished is lost, go on with: {job.command}", file=sys.stderr)
        return 128 + stopped_by
    if outcome.failures:
        print(f"{len(outcome.failures)} failed, the rest is finished; go on with: {job.command}", file=sys.stderr)
        return 1
    return 0


def _digest(job: Job) -> str:
    """What two runs have in common where early stopping has decided the same for both."""
    asked = [[step.train.key for step in trial.steps] for trial in job.plan.trials]
    text = canonical_json([asked, job.plan.study.search.model_dump(mode="json")])
    return hashlib.sha256(text.encode()).hexdigest()


def _stopped_before(job: Job) -> dict[str, int]:
    """Trials that early stopping ended in a completed run of this very plan: they stay stopped."""
    for run in reversed(job.home.runs(job.name)):
        if run["plan"] == _digest(job) and run["stopped"] is not None:
            return dict(run["stopped"])
    return {}


def _finished(plan: Plan, store: Store) -> set[str]:
    return {step.train.key for step in plan.steps if store.finished(step.train.key)}


def _tree_rss_mb() -> float:
    """Resident memory of this process and its descendants, in MB; shared pages are counted in each of them."""
    here = psutil.Process()
    total = 0
    for process in [here, *here.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**20
