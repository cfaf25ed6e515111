"""Where and how often a stage runs: everything that must not decide its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from orchestrator.study.sources import Location


class Stopped(Exception):
    """The run was asked to stop: the stage wrote a checkpoint and goes on from there the next time. Not a failure."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The surroundings of a run. No field of it enters a stage key."""

    store: str  # directory of the store
    device: str = "cpu"
    checkpoint_seconds: float = 15.0  # at least, and so long that writing takes 3 % of the time; 0: at every log step
    log_every: int = 10  # steps between journal lines; checkpoints fall on these steps
    locations: Mapping[str, Location] = dataclasses.field(default_factory=dict)
    gpus_per_stage: float = 0.0  # of each process of a stage that computes on the device
    claims: Literal["flock", "lease"] = "flock"  # how a stage that is being computed is held; one kind for one store
    lease_seconds: float = 30.0  # without a sign of life until a lease counts as left behind
    mirror: str | None = None  # URL below which finished stages are shared between stores
    stop: str | None = None  # a file whose appearance asks training to end at its next log step

    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self.stop is not None and Path(self.stop).exists()


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What a stage function gets beside its specification.

    `inputs` are the artefact directories of its parents by role, `work` holds its checkpoints and survives a crash,
    `journal` is the directory of its journal, `out` is empty and is published as a whole when the function returns.
    `say` tells whoever drives a run what it has to know at once, whatever becomes of the stage.
    """

    inputs: Mapping[str, Path]
    work: Path
    journal: Path
    out: Path
    context: RunContext
    say: Callable[[str], object]


def checkpoint_folders(work: Path) -> list[Path]:
    """The checkpoints of an unfinished stage, the newest last."""
    found = [path for path in work.glob("step-*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # steps of more than six digits come last


def newest_step(work: Path) -> int:
    """The step that training would go on from, 0 where there is no checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoint_folders(work)), default=0)
