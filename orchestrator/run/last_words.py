"""What is said before this process ends where it stands, past all streams, whose locks somebody may hold.

Place in the flow: the second signal and a Ray that has died end the driver so. Invariant: who draws on the terminal
gives it back first, so that the words can be read and the terminal is as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable

give_back: list[Callable[[], None]] = []  # of everybody who draws on the terminal at this moment


def say_last(line: str) -> None:
    """Write a line to stderr, on a terminal that nobody draws on any more."""
    for each in give_back:
        each()
    os.write(2, f"{line}\n".encode())
