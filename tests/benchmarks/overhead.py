"""What running a study costs beside its stages: `python -m tests.benchmarks.overhead STUDY HOME`, HOME new or empty.

Runs the study as it is and prints the processor seconds of every process by part, those inside stages, and the
overhead, 1 - inside / used: of all processes, and without Ray's own daemons.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.benchmarks.tree import measured, stage_seconds


def main(study: Path, home: Path) -> None:
    """Run and print one line of JSON."""
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--home", str(home)]
    wall, busy, parts = measured(command, home / "overhead.log")
    inside = stage_seconds(home / "store", set())
    told = {"wall_seconds": wall, "busy_seconds": busy, "stage_seconds": inside, "overhead": 1 - inside / busy}
    told["overhead_without_ray"] = 1 - inside / (busy - parts["ray"])
    print(json.dumps({**told, "parts": dict(parts)}))


if __name__ == "__main__":
    main(*(Path(word).resolve() for word in sys.argv[1:]))
