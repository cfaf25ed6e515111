"""A run from the plan to the answer: sweep in the foreground, progress and MLflow beside it, the report at the end.

Invariant: whatever goes wrong with telling, the computing goes on; whatever goes wrong with computing is told and ends
in an exit code that is not 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from orchestrator.distill.context import RunContext, newest_step
from orchestrator.distill.training.journal import read_journal
from orchestrator.files import canonical_json
from orchestrator.record.answer.report import answer, write_report
from orchestrator.record.home import Home
from orchestrator.record.records import Record, best_path, make_records
from orchestrator.record.screen.progress import Progress, distinct_steps
from orchestrator.record.tracking.recorder import Recorder
from orchestrator.run.cluster import Cluster
from orchestrator.run.interrupt import Interrupt
from orchestrator.run.store import Store
from orchestrator.run.sweep import Outcome, missing, run_plan
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec

LOOK_SECONDS = 2.0  # between looks at what is finished
ROUNDS = 2  # of computing what the store lacks


@dataclasses.dataclass(frozen=True)
class Job:
    """A study that is ready to run, and the words that started it."""

    plan: Plan
    home: Home
    speeds: dict[str, ThroughputSpec]
    commands: dict[str, str]  # by name, with the words that belong to this study

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.study.study


def run_study(job: Job, context: RunContext, cluster: Cluster, interrupt: Interrupt) -> int:
    """Compute what is missing, tell everything, and return the exit code."""
    began = time.monotonic()
    started = time.time()
    store = Store(job.home.store)
    keys = [*job.plan.specs, *(spec.key for spec in job.speeds.values())]
    for line in store.withdraw_damaged(keys):
        print(line, file=sys.stderr)
    store.tidy(keys)
    before = _finished(job.plan, store)
    watch = _Watch(job, cluster.cpus)
    recorder = Recorder(job.home, job.plan, job.speeds)
    outcome = Outcome(_stopped_before(job))
    watch.start()
    recorder.start()
    with suppress(KeyboardInterrupt):  # `interrupt` knows
        outcome = _compute(job, store, context, cluster, outcome)
    watch.stop()
    if interrupt.number:
        outcome.failures.clear()  # of stages that were asked to stop; a stage that failed itself has told the store
    run = {
        "started": started,
        "seconds": time.monotonic() - began,
        "trained": sorted(_finished(job.plan, store) - before),
        "reused": len(before),
        "peak_rss_mb": watch.peak_mb,
        "disk_mb": store.disk_bytes() / 2**20,
        "plan": _digest(job),
        "stopped": None if interrupt.number or outcome.failures else outcome.stopped,
    }
    _unless_full(lambda: job.home.add_run(job.name, run))
    _, text = report(job, recorder, run, outcome)
    return _tell(job, outcome, text, interrupt.number)


def _compute(job: Job, store: Store, context: RunContext, cluster: Cluster, outcome: Outcome) -> Outcome:
    """Run the plan, once more where finished stages vanished or were damaged under it."""
    for _ in range(ROUNDS):
        if outcome.failures or not missing(job.plan, store, job.speeds, outcome.stopped):
            return outcome
        outcome = run_plan(job.plan, context, job.speeds, cluster)
    gone = [] if outcome.failures else missing(job.plan, store, job.speeds, outcome.stopped)
    if gone:
        outcome.failures["store"] = f"{len(gone)} stages were finished and are gone or damaged: look at {store.root}"
    return outcome


def report(
    job: Job, recorder: Recorder, run: dict[str, Any] | None = None, outcome: Outcome | None = None
) -> tuple[list[Record], str]:
    """Bring MLflow up to date and write the report's files from what is finished.

    `run` is the newest run, which the home may have failed to remember. Returns the records and the answer for the
    terminal. What cannot be written, or MLflow does not take, is told and stops nothing.
    """
    last = last_run(job, run)
    recorder.catch_up()
    records = make_records(
        job.plan, Store(job.home.store), job.speeds, set(last.get("trained", [])), recorder.run_id
    )  # fmt: skip
    folder = job.home.study(job.name)
    files: dict[str, Path] = {}
    _unless_full(lambda: files.update(write_report(job.plan, records, last, folder)))
    best = best_path(records)
    summary = {"best_perplexity_ratio": best[-1]["metrics"]["perplexity_ratio"]} if best else {}
    told = outcome or Outcome(last.get("stopped") or {})
    recorder.finish(told.stopped, told.failures, summary, sorted(files.values()))
    for line in recorder.behind(job.commands["report"]):
        print(line, file=sys.stderr)
    commands = [
        f"report:   {folder / 'report.md'}",
        f"records:  {job.commands['report']} --json records.json",
        f"export:   {job.commands['export']} --to student",
        f"browse:   {job.commands['ui']}",
    ]
    return records, answer(job.plan, records, last, commands)


def _unless_full(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        print(f"cannot be written: {error.filename or 'the report'}: {error.strerror or error}", file=sys.stderr)


def last_run(job: Job, newest: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `newest` or last remembered run, with the highest memory of all runs; empty before the first."""
    runs = job.home.runs(job.name)
    last = newest or (runs[-1] if runs else {})
    return {**last, "peak_rss_mb": max(run["peak_rss_mb"] for run in [*runs, last])} if last else {}


class _Watch:
    """The thread beside a run that tells the terminal and weighs the processes."""

    def __init__(self, job: Job, cores: int) -> None:
        self.progress = Progress(job.plan, Store(job.home.store), job.speeds, cores)
        self.peak_mb = 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._again_and_again, daemon=True)

    def start(self) -> None:
        self.progress.begin()
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        self._look()

    def _look(self) -> None:
        try:
            self.progress.tick()
        except (OSError, ValueError, KeyError):  # a stage that is withdrawn or deleted while it is looked at
            return
        finally:
            self.peak_mb = max(self.peak_mb, _tree_rss_mb())

    def _again_and_again(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            self._look()


def _tell(job: Job, outcome: Outcome, text: str, stopped_by: int) -> int:
    if stopped_by:
        told = ["stopped; nothing finished is lost", *_unfinished(job), f"go on with: {job.commands['run']}"]
        print("\n".join(told), file=sys.stderr)
        return 128 + stopped_by
    print(f"\n{text}", flush=True)
    for name, steps in outcome.stopped.items():
        print(f"{name} was stopped early after {steps} stages")
    for name, reason in outcome.failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if outcome.failures:
        print(
            f"{len(outcome.failures)} failed, the rest is finished; go on with: {job.commands['run']}", file=sys.stderr
        )
        return 1
    return 0


def _unfinished(job: Job) -> list[str]:
    """A line for every stage that is begun and will go on from a checkpoint."""
    store, lines = Store(job.home.store), []
    for key, (name, step) in distinct_steps(job.plan).items():
        at = newest_step(store.folder(key) / "work")
        if at and not store.finished(key):
            tokens = next((line["tokens"] for line in read_journal(store.folder(key)) if line["step"] == at), 0)
            lines.append(f"  {name} goes on after step {at}, {tokens:,} of {step.own_tokens:,} tokens")
    return lines


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
