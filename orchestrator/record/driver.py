"""A run from the plan to the answer: sweep in the foreground, progress and MLflow beside it, the report at the end.

Invariant: whatever goes wrong with telling, the computing goes on; whatever goes wrong with computing is told and ends
in an exit code that is not 0.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from orchestrator.distill.context import RunContext, newest_step
from orchestrator.distill.training.journal import read_journal
from orchestrator.record.answer.report import write_report
from orchestrator.record.answer.text import answer
from orchestrator.record.catalogue import summarise
from orchestrator.record.choices import decided_of
from orchestrator.record.job import Job
from orchestrator.record.provenance import Provenance
from orchestrator.record.records import Record, best_path, make_records
from orchestrator.record.remembered import Run
from orchestrator.record.screen.facts import distinct_steps
from orchestrator.record.screen.progress import Progress
from orchestrator.record.tracking.recorder import Recorder
from orchestrator.run.cluster import Cluster
from orchestrator.run.interrupt import Interrupt
from orchestrator.run.store import Store, StoreError, tree_bytes
from orchestrator.run.sweep import Outcome, missing, run_plan
from orchestrator.study.plan import Plan

LOOK_SECONDS = 2.0  # between looks at what is finished
BLIND = 5  # looks in a row that fail, after which it is told
DRAW_SECONDS = 1.0  # between frames, on a terminal
REMEMBER_SECONDS = 15.0  # of a run that a kill may take from what is told of its cost
ROUNDS = 2  # of computing what the store lacks


def run_study(job: Job, context: RunContext, cluster: Cluster, interrupt: Interrupt) -> int:
    """Compute what is missing, tell everything, and return the exit code."""
    store = Store(job.home.store)
    for line in store.withdraw_damaged(job.keys):
        print(line, file=sys.stderr)
    store.tidy(job.keys)
    provenance = Provenance.of(job.commands["run"])
    recorder = Recorder(job.home, job.plan, job.speeds, provenance=provenance)
    with ExitStack() as stack:
        try:
            job.variant.remember(job.asked, job.keys)
            run = stack.enter_context(job.variant.running(provenance))
        except OSError as error:
            told = f"{job.variant.folder} cannot be written ({error.strerror or error})"
            raise StoreError(f"{told}: free space, or give another --home") from error
        return _run(job, store, context, cluster, interrupt, run, recorder)


def _run(
    job: Job, store: Store, context: RunContext, cluster: Cluster, interrupt: Interrupt, run: Run, recorder: Recorder
) -> int:
    stopped = job.variant.stopped()
    watch = _Watch(job, store, cluster.cpus, run, recorder)
    outcome = Outcome(stopped)
    try:
        watch.start()
        recorder.start()
        outcome = _compute(job, store, context, cluster, outcome)
    except KeyboardInterrupt:  # `interrupt` knows
        pass
    except Exception as error:  # told at the end like any failure, with what is finished
        outcome.failures["run"] = f"{type(error).__name__}: {error}"
        if not interrupt.number and not isinstance(error, ValueError):  # no words for a user
            traceback.print_exc()
    finally:
        watch.stop()
    if interrupt.number:
        outcome.failures.clear()  # of stages that were asked to stop; a stage that failed itself has told the store
    status = "interrupted" if interrupt.number else "failed" if outcome.failures else "finished"
    decided = outcome.stopped if status == "finished" else None
    watch.tell(status=status, failures=outcome.failures, stopped=decided)
    _, text = report(job, recorder, outcome)
    return _tell(job, store, outcome, text, interrupt.number, watch.progress.failures())


def _compute(job: Job, store: Store, context: RunContext, cluster: Cluster, outcome: Outcome) -> Outcome:
    """Run the plan, once more where finished stages vanished or were damaged under it."""
    for _ in range(ROUNDS):
        if outcome.failures or not missing(job.plan, store, job.speeds, outcome.stopped):
            return outcome
        outcome = run_plan(job.growing, context, cluster)
    gone = [] if outcome.failures else missing(job.plan, store, job.speeds, outcome.stopped)
    if gone:
        outcome.failures["store"] = f"{len(gone)} stages were finished and are gone or damaged: look at {store.root}"
    return outcome


def report(job: Job, recorder: Recorder | None, outcome: Outcome | None = None) -> tuple[list[Record], str]:
    """Bring MLflow up to date and write the report's files from what is finished.

    Without a recorder nothing is written, in MLflow or here. Returns the records and the answer for the terminal. What
    cannot be written, or MLflow does not take, is told and stops nothing.
    """
    cost, store = cost_of(job), Store(job.home.store, write=False)
    if recorder is not None:
        recorder.catch_up()
    run_id = (lambda _: None) if recorder is None else recorder.run_id
    records = make_records(job.plan, store, job.speeds, set(cost["trained"]), run_id)
    if recorder is not None:
        _write(job, store, recorder, records, cost, outcome or Outcome(job.variant.stopped()))
    commands = [
        f"report:   {job.variant.folder / 'report.html'}",
        f"records:  {job.commands['report']} --json records.json",
        f"export:   {job.commands['export']} --to student",
        f"browse:   {job.commands['ui']}",
    ]
    return records, answer(job.plan, records, cost, commands, decided_of(job.plan, store))


def _write(
    job: Job, store: Store, recorder: Recorder, records: list[Record], cost: dict[str, Any], outcome: Outcome
) -> None:
    files: dict[str, Path] = {}
    _unless_full(lambda: files.update(write_report(job.plan, store, records, cost, job.variant.folder)))
    best = best_path(records)
    summary = {"best_perplexity_ratio": best[-1]["metrics"]["perplexity_ratio"]} if best else {}
    recorder.finish(outcome.stopped, outcome.failures, summary, sorted(files.values()))
    for line in recorder.behind(job.commands["report"]):
        print(line, file=sys.stderr)
    if job.variant.runs():
        stages = [step.train.key for _, step in distinct_steps(job.plan).values()]
        done = sum(store.finished(key) for key in stages)
        _unless_full(lambda: summarise(job.variant, records, (done, len(stages)), cost["disk_mb"]))


def _unless_full(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        print(f"cannot be written: {error.filename or 'the report'}: {error.strerror or error}", file=sys.stderr)


def cost_of(job: Job) -> dict[str, Any]:
    """What the study took in all its runs: minutes, stages, memory of the largest; and its own disk."""
    store = Store(job.home.store, write=False)
    cost, mine = job.variant.cost(), _finished(job.plan, store)
    disk = {"disk_mb": sum(tree_bytes(store.folder(key)) for key in job.keys) / 2**20}
    trained = sorted(mine.intersection(cost.trained))
    ran = {"runs": cost.runs, "seconds": cost.seconds} if cost.runs else {}
    stages = {"trained": trained, "reused": len(mine) - len(trained)}
    return {**ran, **stages, **disk, "peak_rss_mb": cost.peak_rss_mb}


class _Watch:
    """The thread beside a run that tells the terminal, weighs the processes and writes down what the run took."""

    def __init__(self, job: Job, store: Store, cores: int, run: Run, recorder: Recorder) -> None:
        self.job, self.store, self.run, self.recorder = job, store, run, recorder
        self.progress = Progress(job.plan, store, job.speeds, cores)
        self.began = self.told = time.monotonic()
        self.before = _finished(job.plan, store)
        self.told_plan = job.plan
        self.peak_mb = 0.0
        self.blind = 0  # looks in a row that failed
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._again_and_again, daemon=True)

    def start(self) -> None:
        self.tell()
        self.progress.begin()
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        self._look()
        self.progress.end()

    def tell(self, **more: Any) -> None:
        """Let the home remember the run as it is now."""
        self.told = time.monotonic()
        trained = sorted(_finished(self.job.plan, self.store) - self.before)
        cost = {"trained": trained, "reused": len(self.before), "peak_rss_mb": self.peak_mb}
        self.run.tell(seconds=self.told - self.began, **cost, **more)

    def _look(self) -> None:
        self._grow()
        try:
            self.progress.tick()
            self.blind = 0
        except (OSError, ValueError, KeyError) as error:  # a stage that is withdrawn or deleted while it is looked at
            self.blind += 1
            if self.blind == BLIND:
                said = f"{type(error).__name__}: {error}"
                self.progress.say(f"where the run stands cannot be told ({said}); it goes on all the same")
        finally:
            self.peak_mb = max(self.peak_mb, _tree_rss_mb())

    def _grow(self) -> None:
        """Tell of what has become known since the last look; the home remembers that the study needs it."""
        self.job.growing.grow()  # which whoever computes may have done as well
        if self.job.plan is not self.told_plan:
            self.told_plan = self.job.plan
            self.recorder.replan(self.job.plan, self.job.speeds)
            with contextlib.suppress(OSError):
                self.job.variant.remember(self.job.asked, self.job.keys)
            self.progress.replan(self.job.plan, self.job.speeds)

    def _again_and_again(self) -> None:
        looked = time.monotonic()
        while not self.over.wait(DRAW_SECONDS):
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                self._look()
            if time.monotonic() - self.told > REMEMBER_SECONDS:
                self.tell()
            self.progress.draw()


def _tell(job: Job, store: Store, outcome: Outcome, text: str, stopped_by: int, failed: list[str]) -> int:
    failed = [f"failed: {line}" for line in failed]
    if stopped_by:
        told = ["stopped; nothing finished is lost", *failed, *_unfinished(job), f"go on with: {job.commands['run']}"]
        print("\n".join(told), file=sys.stderr)
        return 128 + stopped_by
    print(f"\n{text}", flush=True)
    for name, steps in outcome.stopped.items():
        print(f"{name} was stopped early after {steps} stages")
    for line in failed:
        print(line, file=sys.stderr)
    for name, reason in outcome.failures.items():
        if not any(reason in line for line in failed):  # of no stage, or the stage that it is of has told itself
            print(f"failed: {name}: {reason}", file=sys.stderr)
    if outcome.failures:
        left = len(missing(job.plan, store, job.speeds, outcome.stopped))
        counts = f"{len(outcome.failures)} failed, {left} stages are not finished"
        print(f"{counts}; go on with: {job.commands['run']}", file=sys.stderr)
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
