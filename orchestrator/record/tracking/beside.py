"""A board beside MLflow: a thread that keeps one in step with the store, apart from MLflow and from the study.

Invariant: what was sent is remembered in a file of the study's folder and is not sent again; what fails is told once
and tried again, and neither the study nor MLflow waits for a board.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.files import read_json, write_json
from orchestrator.record.home import Home
from orchestrator.record.passwords import without_passwords
from orchestrator.record.tracking.boards import Board, board_of
from orchestrator.record.tracking.entry import (
    MARKER,
    Entry,
    Point,
    Result,
    journal_points,
    path_entry,
    path_results,
    stage_entry,
    stage_results,
)
from orchestrator.record.tracking.names import shown
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step

EVERY = 5.0  # seconds between rounds
PATIENCE = 20.0  # seconds that the end of a run waits for a board
ENDED = "ended"


class Beside:
    """Sends a study's records to the board of this name."""

    def __init__(self, name: str, home: Home, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        self.name, self.home, self.plan, self.speeds = name, home, plan, speeds
        self.store, self.shown = Store(home.store), shown(plan)
        self.folder = home.study(plan.study.study)
        self.board: Board | None = None
        self.trouble: str | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def replan(self, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        """Go on with a plan that has grown."""
        self.plan, self.speeds, self.shown = plan, speeds, shown(plan)

    def start(self) -> None:
        """Begin to keep the board in step."""
        self.thread.start()

    def finish(self) -> None:
        """Send the rest, as far as the board answers in time."""
        self.over.set()
        if not self.thread.is_alive():
            self.thread.start()
        self.thread.join(PATIENCE)

    def sync(self) -> None:
        """Send what is new. Raises whatever the board raises; what was sent before that is remembered."""
        sent = self._sent()
        try:
            self.board = self.board or board_of(self.name, self.home, self.plan.study)
            for step in self._steps():
                self._stage(step, sent)
            for path in self.shown.paths:
                results = path_results(self.store, path, self.speeds)
                over = not path.open and all(self.store.finished(step.evaluate.key) for step in path.steps)
                self._tell(path_entry(path), [], results, "FINISHED" if over else None, sent)
        finally:
            write_json(self.file, sent)

    @property
    def file(self) -> Path:
        """Where it is written what the board has: by run, the last step of the journal and the results."""
        return self.folder / f"{self.name}.json"

    def _work(self) -> None:
        lock = FileLock(self.folder / f"{self.name}.lock", timeout=0, thread_local=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock:
                while not self.over.wait(EVERY):
                    self._attempt()
                self._attempt()
                if self.board is not None:
                    self.board.close()
        except Timeout:  # another run of this study has it
            return
        except Exception as error:
            self._say(error)

    def _attempt(self) -> None:
        try:
            self.sync()
            self.trouble = None
        except Exception as error:
            self.board = None  # a new one finds its runs again
            self._say(error)

    def _say(self, error: Exception) -> None:
        first = next(iter(str(error).strip().splitlines()), "")
        told = without_passwords(f"{type(error).__name__}: {first}")
        if self.trouble is None:
            print(f"{self.name} is behind, nothing is lost, the study goes on: {told}", file=sys.stderr)
        self.trouble = told

    def _sent(self) -> dict[str, Any]:
        try:
            sent: dict[str, Any] = read_json(self.file)
        except (OSError, ValueError):
            return {}
        return sent

    def _steps(self) -> list[Step]:
        return list({step.train.key: step for step in self.plan.steps}.values())

    def _stage(self, step: Step, sent: dict[str, Any]) -> None:
        key = step.train.key
        if not self.store.begun(key):
            return
        entry = stage_entry(self.shown, step)
        done, failed = self.store.finished(key), self.store.failure(key)  # before the journal: then it is whole
        after = int(sent.get(entry.identity, {}).get("step", -1))
        lines = list(journal_points(self.store, key, after))
        last = max([after, *(line[0][3] for line in lines)])
        results = stage_results(self.store, step, self.speeds.get(key), max(last, 0)) if done else []
        whole = len(results) == 1 + (key in self.speeds)
        ended = "FINISHED" if whole else "FAILED" if failed is not None and self.over.is_set() else None
        self._tell(entry, [point for line in lines for point in line], results, ended, sent)

    def _tell(self, entry: Entry, points: list[Point], results: list[Result], ended: str | None, sent: Any) -> None:
        """Send a run's points and those results that it lacks, then how it ended, and remember that."""
        assert self.board is not None
        known = sent.get(entry.identity, {})
        told = list(known.get("results", []))
        new = [(f"{key} {found[0][3]}", found) for key, found in results if found]
        points = points + [point for mark, found in new if mark not in told for point in found]
        if points:
            self.board.send(entry, points)
            step = max([known.get("step", -1), *(at for name, _, _, at in points if name == MARKER)])
            known = {"step": step, "results": [mark for mark, _ in new] or told, ENDED: known.get(ENDED)}
            sent[entry.identity] = known
        if ended is not None and known and known.get(ENDED) != ended:
            self.board.end(entry, ended)
            sent[entry.identity] = {**known, ENDED: ended}
