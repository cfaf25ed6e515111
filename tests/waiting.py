"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 250  # seconds for what takes a few where nothing else runs; below pytest's own limit


def wait_until(look: Callable[[], T], pause: float = 0.05) -> T:
    """What `look` gives as soon as it is true; it fails where that takes longer than `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, "this has not come true"
        time.sleep(pause)
    return found
