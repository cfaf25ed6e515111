"""Where and how often a stage runs: everything that must not decide its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from orchestrator.study.sources import Location


@dataclasses.dataclass(frozen=True)
class RunContext:
    """The surroundings of a run. No field of it enters a stage key."""

    store: str  # directory of the store
    device: str = "cpu"
    checkpoint_seconds: float = 15.0
    log_every: int = 10  # steps between journal lines; checkpoints fall on these steps
    locations: Mapping[str, Location] = dataclasses.field(default_factory=dict)
    stop: str | None = None  # a file whose appearance asks training to end at its next log step

    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self.stop is not None and Path(self.stop).exists()


@dataclasses.dataclass(frozen=True)
class Workplace:
    """What a stage function gets beside its specification.

    `inputs` are the artefact directories of its parents by role, `work` holds its checkpoints and survives a crash,
    `journal` is the directory of its journal, `out` is empty and is published as a whole when the function returns.
    """

    inputs: Mapping[str, Path]
    work: Path
    journal: Path
    out: Path
    context: RunContext
