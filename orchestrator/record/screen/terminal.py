"""A terminal that is drawn on while a run goes on: the newest frame below, all that anybody prints above it.

Place in the flow: `Progress` gives the frames. Whatever is written to the terminal meanwhile, by this process, its
libraries or its children, comes through a pipe and is printed line by line above the frame. Invariant: when the drawing
ends, however it ends, the terminal is as it was and its last frame can be read.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.run.last_words import give_back

Draw = Callable[[tuple[int, int]], Text]  # columns and lines -> the frame
KEPT = 200  # lines above the frame that are printed again where it has to be drawn anew
USUAL = (80, 24)  # of a terminal that does not tell its size
DUMB = ("dumb", "unknown", "")
RESTORED = b"\x1b[?25h\n"  # the cursor is shown again, on a line of its own


def is_drawable(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can be drawn on."""
    try:
        return stream.isatty() and os.isatty(stream.fileno()) and os.environ.get("TERM", "") not in DUMB
    except (OSError, ValueError):
        return False


class Terminal:
    """From `start` to `stop` the frame is drawn at each `draw`, and on none of them the terminal is left torn."""

    def __init__(self, stream: TextIO, frame: Draw) -> None:
        self.frame = frame
        self.stream = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
        self.console = Console(file=self.stream, highlight=False, soft_wrap=True)
        self.size = self._size()
        self.live = self._live()
        self.saved: dict[int, int] = {}  # descriptors that are led through the pipe -> where they led before
        self.above: deque[Text] = deque(maxlen=KEPT)
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.started = False

    def start(self) -> None:
        """Begin to draw."""
        self.source, sink = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        for number in self.saved:
            os.dup2(sink, number)
        os.close(sink)
        give_back.append(self._give_back)
        self.thread = threading.Thread(target=self._relay, daemon=True)
        self.thread.start()
        self.live.start()
        self.started = True

    def draw(self) -> None:
        """Draw the frame as it is now."""
        with self.lock, contextlib.suppress(OSError):  # a terminal that is gone stops nothing
            size = self._size()
            if size != self.size:
                self._begin_anew(size)
            self.live.update(self.frame(size), refresh=True)

    def _begin_anew(self, size: tuple[int, int]) -> None:
        """Clear a terminal that has become another: it has broken the lines anew, and nobody knows where they begin."""
        self.live.transient = True
        self.live.stop()
        self.console.clear()
        self.size = size
        self.live = self._live()
        for line in list(self.above)[-size[1] :]:
            self.console.print(line, soft_wrap=True)
        self.live.start()

    def stop(self) -> None:
        """Draw for the last time, below all that was printed, and give the terminal back."""
        if not self.started:
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._lead_back()
        self.over.set()
        self.thread.join()
        self.draw()
        with contextlib.suppress(OSError):
            self.live.stop()
            self.stream.close()
        give_back.remove(self._give_back)

    def _live(self) -> Live:
        self.console.size = self.size
        return Live(
            self.frame(self.size),
            console=self.console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _size(self) -> tuple[int, int]:
        try:
            columns, lines = os.get_terminal_size(self.stream.fileno())
        except OSError:
            return USUAL
        return columns or USUAL[0], lines or USUAL[1]

    def _relay(self) -> None:
        """Print above the frame what comes through the pipe, each line when it is whole."""
        rest = b""
        while True:
            ready, _, _ = select.select([self.source], [], [], 0.1)
            if not ready and self.over.is_set():
                break
            read = os.read(self.source, 1 << 16) if ready else b""
            if ready and not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            self._print(lines)
        self._print([rest] if rest else [])
        os.close(self.source)

    def _print(self, lines: list[bytes]) -> None:
        for line in lines:
            shown = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # of a bar, where it is last
            with self.lock, contextlib.suppress(OSError):
                self.above.append(Text.from_ansi(shown))
                self.console.print(self.above[-1], soft_wrap=True)

    def _lead_back(self) -> None:
        while self.saved:
            number, before = self.saved.popitem()
            os.dup2(before, number)
            os.close(before)

    def _give_back(self, *_: Any) -> None:
        """Before the process ends where it stands, in a signal's handler or any thread: without a lock."""
        with contextlib.suppress(OSError):
            os.write(self.stream.fileno(), RESTORED)
        self._lead_back()
