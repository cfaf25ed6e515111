"""Trackers that a study asks for beside MLflow: Weights & Biases, TensorBoard.

Imported where a study names them only. Invariant: what a board is told is what MLflow is told, under the same names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from pathlib import Path
from typing import Any, Protocol

from orchestrator.record.home import Home
from orchestrator.record.tracking.entry import Entry, Point
from orchestrator.record.tracking.identity import home_id
from orchestrator.study.schema import Study, Wandb

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}  # by the key of a study, which is also the extra's name


class Board(Protocol):
    """A tracker of runs. Points of a run come in the order of their steps; a method may raise whatever it likes."""

    def send(self, entry: Entry, points: list[Point]) -> None:
        """Add points to the run of an entry, which is made where there is none."""

    def end(self, entry: Entry, status: str) -> None:
        """Say how a run ended: FINISHED, FAILED or KILLED."""

    def close(self) -> None:
        """Write what is held back."""


def asked(study: Study) -> list[str]:
    """The names of the boards that a study asks for."""
    return [name for name in PACKAGES if getattr(study.record, name) is not None]


def lacking(names: list[str]) -> str | None:
    """What to do about a board that is not installed; None where all of these are."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            told = f"record.{name}: {PACKAGES[name]} is not installed"
            return f"{told}: pip install 'layerswap[{name}]', or take the key out"
    return None


def board_of(name: str, home: Home, study: Study) -> Board:
    """The board of this name. Raises `ImportError` where it is not installed."""
    if (lack := lacking([name])) is not None:
        raise ImportError(lack)
    if name == "tensorboard":
        return TensorBoard(home.study(study.study) / "tensorboard")
    assert study.record.wandb is not None
    return WeightsAndBiases(study.record.wandb, study.study, home_id(home), home.study(study.study))


class TensorBoard:
    """Event files: a folder a run, named as the run is; `tensorboard --logdir` shows them.

    What was sent is on the disk: tensorboardX's own writer of events would write it some time later, in a thread.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writers: dict[str, Any] = {}

    def send(self, entry: Entry, points: list[Point]) -> None:
        """Add points; parameters and tags stand as text beside a new run."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        writer = self._writer(entry)
        for name, value, stamp, step in points:
            told = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            writer.write(Event(wall_time=stamp / 1000, step=step, summary=told).SerializeToString())
        writer.flush()

    def end(self, entry: Entry, status: str) -> None:
        """Close the run's file; TensorBoard knows no status."""
        writer = self.writers.pop(entry.identity, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """Close all files."""
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _writer(self, entry: Entry) -> Any:
        if entry.identity not in self.writers:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.record_writer import RecordWriter
            from tensorboardX.summary import text

            folder = self.root / entry.name.replace("/", " of ").replace("\\", " ")
            new = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            now = time.time()
            writer = RecordWriter(str(folder / f"events.out.tfevents.{int(1e6 * now)}.{os.getpid()}"))
            writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            if new:
                told = "\n".join(f"    {key}: {value}" for key, value in {**entry.parameters, **entry.tags}.items())
                writer.write(Event(wall_time=now, summary=text("run", told)).SerializeToString())
            self.writers[entry.identity] = writer
        return self.writers[entry.identity]


class WeightsAndBiases:
    """Runs of a project, a group for every study; a run is found again by its id, which no other home has."""

    def __init__(self, asked: Wandb, study: str, home: str, folder: Path) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        self.asked, self.study, self.home, self.folder = asked, study, home, folder
        self.runs: dict[str, Any] = {}

    def send(self, entry: Entry, points: list[Point]) -> None:
        """Add points, those of one step at once; of steps that the run has left behind, as its summary."""
        run, steps = self._run(entry), dict[int, dict[str, float]]()
        for name, value, _, step in points:
            steps.setdefault(step, {})[name] = value
        for step, values in steps.items():
            if step < run.step:  # a curve takes none but the newest step
                run.summary.update(values)
            else:
                run.log(values, step=step)

    def end(self, entry: Entry, status: str) -> None:
        """Finish the run, with an exit code that says whether it failed."""
        self._run(entry).finish(exit_code=0 if status == "FINISHED" else 1)
        del self.runs[entry.identity]

    def close(self) -> None:
        """Finish what goes on another time."""
        for run in self.runs.values():
            run.finish()
        self.runs.clear()

    def _run(self, entry: Entry) -> Any:
        if entry.identity not in self.runs:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.runs[entry.identity] = self.wandb.init(
                project=self.asked.project,
                entity=self.asked.entity,
                mode=self.asked.mode,
                id=f"{self.home[:8]}-{entry.identity.replace(':', '-')}"[:128],
                name=entry.name,
                group=self.study,
                job_type=entry.tags["layerswap.role"],
                config={**entry.parameters, **entry.tags},
                resume="allow",
                reinit="create_new",
                dir=str(self.folder),
                settings=self.wandb.Settings(console="off", silent=True),
            )
        return self.runs[entry.identity]
