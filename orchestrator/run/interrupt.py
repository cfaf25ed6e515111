"""Ctrl-C and SIGTERM: the first asks running stages to stop at their next checkpoint, the second ends all at once.

Place in the flow: the command listens, training looks for the stop file (`RunContext.stop`), the sweep waits for it.
Invariant: the first signal ends in a `KeyboardInterrupt`, for Ray drops any other exception of a handler; the second
ends the process where it stands, and the guard (`guard.py`) what it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import TracebackType

from orchestrator.run.last_words import say_last

TOLD = "stopping at the next checkpoint; once more stops at once"
AT_ONCE = "stopped at once; nothing finished is lost, go on with the same command"


class Interrupted(KeyboardInterrupt):
    """A signal arrived.

    A class of its own, for Python remembers that a plain `KeyboardInterrupt` left an `exec` of a string, as dataclasses
    are made by, and kills itself with SIGINT at the end whatever its exit code (`python -m`).
    """


class Interrupt:
    """A context that listens, and turns whatever error leaves it after a signal into exit code 130 or 143.

    Not `KeyboardInterrupt` alone: one that lands in the import of a module leaves it half made and comes out as any
    error.
    """

    def __init__(self) -> None:
        self.stop: Path | None = None  # the file to make, known once there is a store
        self.number = 0  # the first signal that arrived

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self._tidy()
        if self.number and error is not None and not isinstance(error, SystemExit):
            _say(AT_ONCE)
            raise SystemExit(128 + self.number) from None

    def _arrived(self, number: int, _: object) -> None:
        if self.number:
            self._tidy()
            say_last(AT_ONCE)
            os._exit(128 + self.number)
        self.number = number
        self._ask()
        raise Interrupted

    def _ask(self) -> None:
        if self.stop is None:
            return
        try:
            self.stop.touch()
        except OSError:  # a store that cannot be written: there will be no checkpoint either
            return
        _say(TOLD)

    def _tidy(self) -> None:
        if self.stop is not None:
            with contextlib.suppress(OSError):
                self.stop.unlink(missing_ok=True)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # not through a stream, whose lock the interrupted code may hold
