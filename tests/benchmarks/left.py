"""`python -m tests.benchmarks.left NAME=LOG ...`: the time left that runs told, held against the time that was left.

A log is what `layerswap run STUDY > LOG` prints without a terminal: a summary every twenty seconds, with the clock of
the run. A run that was interrupted is told apart by its clock, which begins again: the last one counts.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

CLOCK = re.compile(r"^\s*(?:[\d.]+ )?\[\s*(?:(\d+):)?(\d+):(\d\d)\] (.*)$")
LEFT = re.compile(r"(about|at most|at least) ([\d.]+) (s|min|h) left")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
SHARES = (1 / 3, 1 / 2, 2 / 3, 0.9)  # of the whole time, at which a run is asked


@dataclasses.dataclass(frozen=True)
class Told:
    """What a run said of itself: seconds since it began, and seconds that it took to be left."""

    at: float
    left: float
    how: str


def told_in(text: str) -> tuple[list[Told], float]:
    """Everything that a log says of the time left, and how long the run took."""
    found: list[Told] = []
    end = 0.0
    for line in text.splitlines():
        clock = CLOCK.match(line)
        if clock is None:
            continue
        hours, minutes, seconds, said = clock.groups()
        now = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
        if now < end:  # another run
            found = []
        end = now
        left = LEFT.search(said)
        if left is not None:
            found.append(Told(now, float(left[2]) * SECONDS[left[3]], left[1]))
    return found, end


def row(name: str, text: str) -> str:
    """A row of the table: what was told at each share of the run, and in brackets what was left."""
    found, end = told_in(text)
    cells = []
    for share in SHARES:
        told = min(found, key=lambda each: abs(each.at - share * end))
        mark = {"about": "", "at most": "≤ ", "at least": "≥ "}[told.how]
        cells.append(f"{mark}{told.left / 60:.1f} ({(end - told.at) / 60:.1f})")
    late = [each for each in found if each.at >= end / 3 and end - each.at > 60]
    close = sum(abs(each.left - (end - each.at)) <= 0.2 * (end - each.at) for each in late)
    return f"| {name} | {end / 60:.1f} | {' | '.join(cells)} | {close} of {len(late)} |"


def main(words: list[str]) -> int:
    """Print the table."""
    print("| study | minutes | told at a third (true) | at half | at two thirds | at nine tenths | within a fifth |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for word in words:
        name, _, log = word.partition("=")
        print(row(name, Path(log).read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
