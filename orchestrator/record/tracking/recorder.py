"""MLflow beside a run: a thread that keeps it in step with the store and never makes anybody wait for long.

Invariant: what MLflow lacks is in the store, so whatever fails here is tried again, by this run, the next one or a
report; a study has one recorder at a time, the others leave it to that one.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.record.home import Home
from orchestrator.record.passwords import without_passwords
from orchestrator.record.provenance import Provenance
from orchestrator.record.tracking.beside import Beside
from orchestrator.record.tracking.boards import asked, lacking
from orchestrator.record.tracking.client import AnotherVersionError, wants_database
from orchestrator.record.tracking.tracker import Tracker
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step

EVERY = 3.0  # seconds between rounds
PATIENCE = 6.0  # seconds without an answer after which the end of a run does not wait any more
REPORT_PATIENCE = 60.0  # and a report
MAKING = 60.0  # seconds more that a home's own database may take to be made: what is half made is made anew

Action = Callable[[Tracker], None]


class Recorder:
    """Sends a study's records from a thread. A `live` one marks runs as running and tells when MLflow is behind."""

    def __init__(
        self,
        home: Home,
        plan: Plan,
        speeds: dict[str, ThroughputSpec],
        live: bool = True,
        provenance: Provenance | None = None,
    ) -> None:
        self.home, self.plan, self.speeds, self.live, self.provenance = home, plan, speeds, live, provenance
        self.store = Store(home.store)
        self.tracker: Tracker | None = None
        self.trouble: str | None = None  # why MLflow is behind
        self.remedy = ""  # what has to be done before it can catch up, where that is known
        self.complete: set[str] = set()  # identities of runs that need no more
        self.elsewhere = False  # another recorder of this study is at work
        self.patience = PATIENCE if live else REPORT_PATIENCE
        self.hopeless = False  # somebody waited in vain
        self.asked: queue.Queue[tuple[Action, threading.Event] | None] = queue.Queue()
        self.lock = FileLock(home.study(plan.study.study) / "recorder.lock", timeout=0, thread_local=False)
        self.thread = threading.Thread(target=self._work, daemon=True)
        boards = [name for name in asked(plan.study) if live or lacking([name]) is None]
        self.boards = [Beside(name, home, plan, speeds) for name in boards]

    def start(self) -> None:
        """Begin to keep MLflow and what is beside it in step, every few seconds."""
        self.thread.start()
        for board in self.boards:
            board.start()

    def replan(self, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        """Go on with a plan that has grown."""
        self.plan, self.speeds = plan, speeds
        for board in self.boards:
            board.replan(plan, speeds)

    def catch_up(self) -> None:
        """Send what is new now, as far as MLflow answers."""
        self._wait_for(Tracker.sync)

    def finish(
        self, stopped: dict[str, int], failures: dict[str, str], summary: dict[str, float], files: list[Path]
    ) -> None:
        """Give every run its true status and its files, as far as MLflow answers; nothing is sent after that."""
        self._wait_for(lambda tracker: tracker.finish(stopped, failures, summary))
        self._wait_for(lambda tracker: tracker.add_files(files))
        self.asked.put(None)
        if not self.hopeless:
            self.thread.join()
        for board in self.boards:
            board.finish()

    def run_id(self, step: Step) -> str | None:
        """The MLflow run of a step's stage, as far as it is known."""
        tracker = self.tracker
        return None if tracker is None else tracker.run_id(step)

    def behind(self, command: str) -> list[str]:
        """Lines that say what MLflow lacks and that `command` sends it; none where it lacks nothing."""
        if self.trouble is None and not self.hopeless:
            return []
        begun = {step.train.key for step in self.plan.steps if self.store.begun(step.train.key)}
        lacking = sum(f"stage:{key}" not in self.complete for key in begun)
        what = f"{lacking} of {len(begun)} stages" if lacking else "the study's files"
        if self.remedy:
            return [f"MLflow lacks {what}: {self.remedy}; nothing is lost: after that, {command} sends them"]
        return [
            f"MLflow lacks {what} ({self.trouble or 'it does not answer'}); nothing is lost: the next run sends them, "
            f"or {command}"
        ]

    def _wait_for(self, action: Action) -> None:
        if not self.thread.is_alive():
            self.thread.start()
        if self.hopeless:
            return
        done, began = threading.Event(), time.monotonic()
        made = began
        self.asked.put((action, done))
        while not done.wait(0.1):
            if time.monotonic() - began < MAKING and wants_database(self.home):
                made = time.monotonic()
            heard = 0.0 if self.tracker is None else self.tracker.heard
            if time.monotonic() - max(made, heard) > self.patience:
                self.hopeless = True
                return

    def _work(self) -> None:
        while True:
            try:
                asked = self.asked.get(timeout=EVERY)
            except queue.Empty:
                asked = (Tracker.sync, threading.Event())
            if asked is None:
                self.lock.release()
                return
            action, done = asked
            self._attempt(action)
            done.set()

    def _attempt(self, action: Action) -> None:
        try:
            if not self.lock.is_locked:
                self.home.study(self.plan.study.study).mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
            if self.elsewhere:
                self.tracker, self.elsewhere = None, False
            if self.tracker is None:
                self.tracker = Tracker(self.home, self.plan, self.speeds, self.live, self.provenance)
            self.tracker.replan(self.plan, self.speeds)
            action(self.tracker)
        except Timeout:
            if not self.elsewhere:
                self._look()
            self.elsewhere = True
        except Exception as error:
            self.complete |= set() if self.tracker is None else self.tracker.closed
            self.tracker = None  # a new one asks MLflow what it has
            self._say_behind(error)
        else:
            self.complete |= self.tracker.closed
            if self.trouble is not None and self.live:
                print("MLflow has caught up", file=sys.stderr)
            self.trouble, self.remedy = None, ""

    def _look(self) -> None:
        """Learn the runs that the recorder at work has made."""
        try:
            self.tracker = Tracker(self.home, self.plan, self.speeds, live=False)
        except Exception:
            self.tracker = None  # telling of it is that recorder's

    def _say_behind(self, error: Exception) -> None:
        self.remedy = str(error) if isinstance(error, AnotherVersionError) else ""
        reason = without_passwords(next(iter(str(error).strip().splitlines()), ""))[:160]
        told = self.remedy or f"{type(error).__name__}: {reason}"
        if self.trouble is None and self.live:
            print(f"MLflow is behind, nothing is lost, the study goes on: {told}", file=sys.stderr)
        self.trouble = told
