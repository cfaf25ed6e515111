"""The command `layerswap`, and `python -m orchestrator`: what a signal comes to while the command is still loaded.

That takes a second, in which Python would end in the stack of some import, or in the error of a half-made module.
"""

from __future__ import annotations

import os
import signal

EARLY = b"stopped before anything began\n"


def main() -> None:
    """Load the command and run it."""
    numbers = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _leave) for number in numbers}
    from orchestrator.cli import app

    for number, handler in before.items():
        signal.signal(number, handler)
    app()


def _leave(number: int, _: object) -> None:
    os.write(2, EARLY)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
