"""Which sources are mutated together, and by which tests they are to be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Room:
    """Sources and their tests, each as patterns of files from the root of the checkout."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]

    def files(self, root: Path = ROOT) -> list[str]:
        return _files(root, self.sources)

    def test_files(self, root: Path = ROOT) -> list[str]:
        return _files(root, self.tests)


def _files(root: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)})


_PARTS = ("filters", "convolution", "mixing", "decoding", "transfer")
_AROUND = ("tests/study/test_*.py", "tests/run/test_*.py", "tests/record/test_*.py", "tests/test_*.py")
_OPERATORS = Room(
    ("operators/*.py", *(f"operators/{part}/*.py" for part in _PARTS)),
    ("tests/operators/test_*.py",),
)
_ORCHESTRATION = Room(
    ("orchestrator/*.py", *(f"orchestrator/{part}/**/*.py" for part in ("study", "run", "record"))), _AROUND
)
ROOMS = {
    "distill": Room(("orchestrator/distill/**/*.py",), ("tests/distill/test_*.py", "tests/models/test_*.py")),
    "operators": _OPERATORS,
    "study": Room(("orchestrator/files.py", "orchestrator/study/*.py"), _AROUND),
    "run": Room(("orchestrator/run/*.py",), _AROUND),
    "record": Room(("orchestrator/cli.py", "orchestrator/record/**/*.py"), _AROUND),
    "elsewhere": Room(_OPERATORS.sources + _ORCHESTRATION.sources, _OPERATORS.tests + _ORCHESTRATION.tests),
}
