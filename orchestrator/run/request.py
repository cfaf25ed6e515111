"""What a run asks its broker for, on its way from the driver: by a file, for Ray complains of words over 100 KB."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

from orchestrator.files import write_bytes
from orchestrator.study.plan import Planner


@dataclasses.dataclass(frozen=True)
class Request:
    """The plan as a function of results, and the bytes that stages may take together; none: not counted."""

    planner: Planner
    free: int | None = None

    def write(self, path: Path) -> Path:
        """Leave it in a file."""
        write_bytes(path, pickle.dumps(self))
        return path


def read_request(path: Path) -> Request:
    """What was left in a file, by a process of this program."""
    found = pickle.loads(path.read_bytes())
    assert isinstance(found, Request)
    return found
