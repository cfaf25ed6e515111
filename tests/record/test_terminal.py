"""A terminal that is drawn on: a screen made of what a pseudo-terminal gets, with other lines printed meanwhile."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.record.screen.terminal import is_drawable

CODE = """
import os, subprocess, sys
from rich.text import Text
from orchestrator.record.screen.terminal import Terminal
from orchestrator.run.last_words import say_last

state = ["one"]
terminal = Terminal(sys.stdout, lambda size: Text(f"{size[0]} columns {'.' * (size[0] - 12)}\\nnow {state[0]}"))
print("before", flush=True)
terminal.start()
terminal.draw()
%s
terminal.stop()
print("after")
"""


def size_of(descriptor: int, columns: int, lines: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@contextmanager
def run(body: str, columns: int = 40, **environment: str) -> Iterator[tuple[list[bytes], int, subprocess.Popen[bytes]]]:
    """A process on a terminal of its own; yields what that gets, growing, and the terminal's other end."""
    outer, inner = pty.openpty()
    size_of(outer, columns, 12)
    told: list[bytes] = []
    surroundings = {**os.environ, "TERM": "xterm", **environment}
    done = subprocess.Popen(
        [sys.executable, "-c", CODE % body], stdin=subprocess.DEVNULL, stdout=inner, stderr=inner, env=surroundings
    )
    os.close(inner)

    def read() -> None:
        while True:
            try:
                told.append(os.read(outer, 1 << 16))
            except OSError:  # nobody writes there any more
                return

    thread = threading.Thread(target=read)
    thread.start()
    yield told, outer, done
    done.wait(60)
    thread.join(60)
    os.close(outer)


def screen(raw: bytes) -> list[str]:
    """What stands on a terminal that is high and wide enough, by the few signs that move the cursor."""
    rows, at, text = [""], 0, raw.decode()
    while text:
        if text.startswith("\x1b["):
            end = next(index for index in range(2, len(text)) if text[index].isalpha())
            number, kind, text = text[2:end], text[end], text[end + 1 :]
            if kind == "A":
                at -= int(number or 1)
            elif kind == "K":
                rows[at] = ""
            elif kind in "JH" and number != "?25":
                rows, at = [""], 0
            continue
        sign, text = text[0], text[1:]
        if sign == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif sign == "\r":
            if not text.startswith(("\n", "\x1b")):
                rows[at] = ""
        else:
            rows[at] += sign
    return [row for row in rows if row]


def test_what_others_print_stands_above_the_frame_in_whole_lines() -> None:
    body = """
print("a line", flush=True)
os.write(2, b"half of ")
os.write(2, b"another\\n")
subprocess.run(["sh", "-c", "echo of a child; printf '10%%\\\\r20%%\\\\n' >&2; printf 'no end'"])
state[0] = "two"
terminal.draw()
"""
    with run(body) as (told, _, done):
        pass
    raw = b"".join(told)
    assert done.returncode == 0
    rows = screen(raw)
    assert rows == [
        "before", "a line", "half of another", "of a child", "20%", "no end",
        f"40 columns {'.' * 28}", "now two", "after",
    ]  # fmt: skip
    assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h") == 1  # the cursor is hidden, and shown again


@pytest.mark.parametrize("columns", [30, 60])
def test_a_terminal_that_changes_is_drawn_anew_below_what_was_printed(columns: int) -> None:
    body = """
print("ready", flush=True)
while os.get_terminal_size(terminal.stream.fileno())[0] == 40: pass
terminal.draw()
"""
    with run(body) as (told, outer, _):
        while b"ready" not in b"".join(told):
            pass
        size_of(outer, columns, 12)
    assert screen(b"".join(told)) == ["ready", f"{columns} columns {'.' * (columns - 12)}", "now one", "after"]


@pytest.mark.parametrize("words", ["say_last('the end')", "say_last('the end')\n    terminal.lock.acquire()"])
def test_last_words_are_read_and_the_cursor_is_back(words: str) -> None:
    with run(f"terminal.lock.acquire()\nif True:\n    {words}\n    os._exit(1)") as (told, _, done):
        pass
    raw = b"".join(told)
    assert done.returncode == 1
    assert raw.endswith(b"\x1b[?25h\r\nthe end\r\n")


def test_without_colour_there_is_none() -> None:
    with run("", NO_COLOR="1") as (told, _, _):
        pass
    assert b"[1m" not in b"".join(told) and b"[3" not in b"".join(told)


def test_only_a_terminal_that_can_move_its_cursor_is_drawn_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = pty.openpty()
    with os.fdopen(inner, "w") as terminal, (tmp_path / "file").open("w") as file:
        for term, drawn in {"xterm-256color": True, "dumb": False, "": False}.items():
            monkeypatch.setenv("TERM", term)
            assert is_drawable(terminal) is drawn
            assert not is_drawable(file)
    os.close(outer)
