"""The log of a stage: all that its process writes while it computes, kept in the stage's folder in the store.

Place in the flow: `compute` and the ranks of `distributed` write it, `layerswap log` prints it. Each attempt appends,
below a heading. Invariant: a log is never larger than a little over `MOST`, and one that cannot be written, on a full
disk say, stops no stage.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from orchestrator.distill.context import Stopped

LOG = "log.txt"
MOST = 1 << 20  # bytes of a log; above them the first ones go
KEPT = MOST // 2  # bytes that stay then, the last ones
EVERY = 5.0  # seconds between looks at how large it has become
CUT = b"[what came before was cut]\n"


@contextlib.contextmanager
def logged(folder: Path, what: str) -> Iterator[None]:
    """While this lasts, what this process and its libraries write to stdout and stderr goes to the stage's log.

    `what` is told in the heading. The descriptors themselves are led there, so that what no Python stream sees,
    compiled code's last words say, is kept as well.
    """
    try:
        _bound(folder / LOG)
        stream = (folder / LOG).open("ab", buffering=0)
    except OSError:
        yield
        return
    with stream, _led_to(stream.fileno()), _bounded(folder / LOG):
        began = time.monotonic()
        _write(stream.fileno(), f"=== {_now()} on {platform.node()}, process {os.getpid()}: {what}\n")
        try:
            yield
        except BaseException as error:
            whole = [f"{error}\n"] if isinstance(error, Stopped) else traceback.format_exception(error)
            _flush()
            _write(stream.fileno(), "".join(whole))
            raise
        finally:
            _flush()
            _write(stream.fileno(), f"=== {_now()}, after {time.monotonic() - began:.1f} s\n")


@contextlib.contextmanager
def _led_to(target: int) -> Iterator[None]:
    """Lead stdout and stderr of this process to a descriptor."""
    _flush()
    before = {number: os.dup(number) for number in (1, 2)}
    try:
        for number in before:
            os.dup2(target, number)
        yield
    finally:
        _flush()
        for number, old in before.items():
            os.dup2(old, number)
            os.close(old)


@contextlib.contextmanager
def _bounded(path: Path) -> Iterator[None]:
    """Cut a log that grows too large while this lasts."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            with contextlib.suppress(OSError):
                _bound(path)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bound(path: Path) -> None:
    """Keep the end of a log that has become too large; whoever appends to it goes on behind that."""
    if not path.exists() or path.stat().st_size <= MOST:
        return
    with path.open("r+b") as stream:
        stream.seek(-KEPT, os.SEEK_END)
        kept = stream.read().partition(b"\n")[2]
        stream.seek(0)
        stream.write(CUT + kept)
        stream.truncate()


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode(errors="replace"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
