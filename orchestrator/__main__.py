"""The command `layerswap`, and `python -m orchestrator`: what a signal comes to while the command is still loaded.

That takes a second, in which Python would end in the stack of some import, or in the error of a half-made module.
"""

from __future__ import annotations

import os
import signal

EARLY = b"stopped before anything began\n"


def main() -> None:
    """Load the command and run it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, _leave)
    from orchestrator.cli import app

    for number, handler in heard.items():
        signal.signal(number, handler)
    app()


def _leave(number: int, _: object) -> None:
    os.write(2, EARLY)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
