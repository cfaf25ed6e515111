"""What the terminal says while a study runs, word by word, and the time left by arithmetic on known rates."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from orchestrator.record.screen import progress as module
from orchestrator.record.screen.progress import Progress
from tests.record.handmade import START, Hand, put

UNKNOWN = "time left: known once the first steps are measured"


class Terminal:
    """Progress on a clock that stands where a test puts it."""

    def __init__(self, hand: Hand, monkeypatch: pytest.MonkeyPatch, cores: int = 2) -> None:
        self.now, self.patch = 1_000.0, monkeypatch
        monkeypatch.setattr(module, "time", self)
        self.out = io.StringIO()
        self.progress = Progress(hand.plan, hand.store, hand.speeds, cores, self.out)

    def monotonic(self) -> float:
        """Seconds, as `time.monotonic` tells them."""
        return self.now

    def tick(self, after: float = 0.0) -> list[str]:
        """The lines that a look so many seconds later adds."""
        self.now += after
        self.patch.setattr(module, "time", self)
        before = len(self.out.getvalue())
        self.progress.tick()
        return self.out.getvalue()[before:].splitlines()


def test_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(tmp_path, "teacher.tokens=2_345_600")
    hand.finish("two 0", "skip 0")
    hand.train("two 1")  # its evaluation is still to do
    terminal = Terminal(hand, monkeypatch)
    terminal.progress.begin()
    assert terminal.out.getvalue() == (
        "[  0:00] 3 trials ask for 9 stages, 7 distinct (2 shared); with teacher and controls 12: 2 finished before, "
        "10 to do, 2.35 M tokens\n"
    )


def test_a_failure_is_told_when_it_happens(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for every attempt; not one of an earlier run, nor one that a later attempt made good."""
    two, heads = hand.key("two 0"), hand.steps["heads 0"].evaluate.key

    def fail(key: str, number: int, error: str) -> str:
        hand.attempt(key, number=number)
        put(hand.store.folder(key) / "failure.json", {"error": error, "traceback": "..."})
        log = hand.store.folder(key) / "log.txt"
        if number > 1:
            log.write_text("...")
        return f"          log: {log if number > 1 else log.with_name('failure.json')}"

    fail(two, 1, "OSError: earlier")
    fail(hand.key("skip 0"), 1, "OSError: made good")
    hand.finish("skip 0")
    terminal = Terminal(hand, monkeypatch)
    assert not any("FAILED" in line for line in terminal.tick())
    where = [fail(two, 2, "ValueError: heads must divide"), fail(heads, 1, "OSError: no space")]
    told = terminal.tick(after=3.0)
    assert told[-4:] == [
        "[  0:03] FAILED trial-00 stage 1/3 layers 0: ValueError: heads must divide",
        where[0],
        "[  0:03] FAILED evaluation of trial-02 stage 1/3 layers 0: OSError: no space",
        where[1],
    ]
    assert not any("FAILED" in line for line in terminal.tick())
    fail(two, 3, "ValueError: heads must divide")
    assert [line for line in terminal.tick() if "FAILED" in line] == [told[-4]]
    assert terminal.progress.failures() == [
        f"trial-00 stage 1/3 layers 0: ValueError: heads must divide\n{where[0]}",
        f"evaluation of trial-02 stage 1/3 layers 0: OSError: no space\n{where[1]}",
    ]
    hand.finish("two 0", "heads 0")
    terminal.tick()
    assert terminal.progress.failures() == []


def test_every_event_once_and_in_words(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(hand, monkeypatch)
    assert terminal.tick() == []
    hand.text()
    hand.attempt(hand.key("teacher"))
    hand.attempt(hand.key("skip 0"))  # trains nothing, so that its start is none
    assert terminal.tick(after=5.4) == [
        "[  0:05] text ready: 12,345 training and 678 validation tokens",
        "[  0:05] start  teacher: 1,600 tokens",
    ]
    assert terminal.tick(after=1.0) == []
    hand.finish("teacher", "skip 0")
    hand.attempt(hand.key("two 0"))
    hand.attempt(hand.key("two joint"))
    assert terminal.tick(after=60.0)[:4] == [
        "[  1:06] done   teacher: perplexity 8.00, ratio 1.000, agreement 0.750",
        "[  1:06] start  trial-00 stage 1/3 layers 0: 160 tokens, for 2 trials",
        "[  1:06] start  trial-00 joint layers 0,1: 320 tokens",
        "[  1:06] done   control skip 0: perplexity 12.00, ratio 1.500, agreement 0.500",
    ]
    hand.train("two 0")
    assert terminal.tick(after=1.0) == []  # not done before it is evaluated
    hand.evaluate("two 0")
    hand.finish("two joint")
    hand.write(hand.steps["two joint"].train, {"resumed_at": 7})
    hand.measure("two 0", "teacher")
    assert terminal.tick(after=600.0)[:4] == [
        "[ 11:07] done   trial-00 stage 1/3 layers 0: perplexity 8.40, ratio 1.050, agreement 0.714 "
        "(1.23 M operator and 0.45 M other parameters trained)",
        "[ 11:07] done   trial-00 joint layers 0,1: perplexity 8.80, ratio 1.100, agreement 0.682, resumed at step 7",
        "[ 11:07] speed  1 of 7 architectures measured",
        "[ 11:07] speed  2 of 7 architectures measured",
    ]
    assert terminal.tick(after=1.0) == []


def test_what_earlier_runs_did_is_not_told_again(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    hand.text()
    hand.finish("teacher")
    hand.measure("teacher")
    hand.attempt(hand.key("two 0"))  # of somebody who is gone
    terminal = Terminal(hand, monkeypatch)
    assert terminal.tick() == []
    hand.attempt(hand.key("two 0"), number=2)
    assert terminal.tick() == ["[  0:00] start  trial-00 stage 1/3 layers 0: 160 tokens, for 2 trials"]


def test_a_summary_when_nothing_happens(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(hand, monkeypatch)
    assert terminal.tick(after=19.9) == []
    assert terminal.tick(after=0.1) == [f"[  0:20] 0 of 12 stages done, {UNKNOWN}"]
    hand.finish("teacher")
    hand.attempt(hand.key("two 0"), pid=2)
    metrics = {"loss/kl": 0.5, "loss/ce": 2.25, "loss/mse_layer_0": 9.0, "tokens_per_s": 1_234.5}
    hand.journal(hand.key("two 0"), (5, 40, START, {**metrics, "loss/kl": 0.75}), (10, 80, START, metrics))
    hand.attempt(hand.key("heads 0"), pid=2)  # has no line yet
    hand.attempt(hand.key("skip 0"), pid=2)
    assert len(terminal.tick()) == 3  # two starts, and the teacher is done
    assert terminal.tick(after=20.0) == [
        "[  0:40] 1 of 12 stages done, about 2 min left (not measured yet: speeds)",
        "          trial-00 stage 1/3 layers 0:  50%  kl 0.500 ce 2.250  1,234 tokens/s",
    ]


def test_a_summary_whatever_happens(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens every five seconds, for two minutes."""
    terminal, told = Terminal(hand, monkeypatch), []
    for number in range(1, 25):
        hand.attempt(hand.key("two 0"), number=number)
        put(hand.store.folder(hand.key("two 0")) / "failure.json", {"error": "OSError: again"})
        lines = terminal.tick(after=5.0)
        assert any("FAILED" in line for line in lines)
        told += [line[:8] for line in lines if "stages done" in line]
    assert told == ["[  0:20]", "[  0:40]", "[  1:00]", "[  1:20]", "[  1:40]", "[  2:00]"]


class Drawn:
    """A terminal that keeps its frames as text."""

    def __init__(self, _: object, frame: Callable[[tuple[int, int]], Text]) -> None:
        self.frame, self.frames, self.calls = frame, list[list[str]](), list[str]()

    def start(self) -> None:
        self.calls.append("start")

    def draw(self) -> None:
        self.frames.append(self.frame((60, 40)).plain.split("\n"))

    def stop(self) -> None:
        self.draw()
        self.calls.append("stop")


def test_on_a_terminal_the_tree_stands_below_what_has_happened(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_drawable", lambda _: True)
    monkeypatch.setattr(module, "Terminal", Drawn)
    terminal = Terminal(hand, monkeypatch)
    drawn: Any = terminal.progress.terminal
    terminal.progress.begin()
    assert drawn.calls == ["start"]
    hand.attempt(hand.key("teacher"), pid=2)
    assert terminal.tick(after=30.0) == []  # that it has begun is seen below, and so is how far it is
    terminal.progress.draw()
    assert drawn.frames[-1][0] == "handmade  0 of 12 stages done, 1 running, 11 waiting"
    assert drawn.frames[-1][-1] == f"[  0:30] {UNKNOWN}"
    hand.finish("teacher", "two 0")
    hand.attempt(hand.key("two 1"), number=2)
    assert len(terminal.tick(after=30.0)) == 2
    terminal.progress.draw()
    assert drawn.frames[-1][-1].startswith("[  1:00] about ")
    terminal.progress.end()
    assert drawn.calls[-1] == "stop"
    assert drawn.frames[-1][-1] == "[  1:00] stopped, 10 of 12 stages are not done"


@pytest.mark.parametrize("failed", [False, True])
def test_the_last_frame_says_how_it_ended(failed: bool, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_drawable", lambda _: True)
    monkeypatch.setattr(module, "Terminal", Drawn)
    terminal = Terminal(hand, monkeypatch)
    hand.all_done()
    if failed:
        joint = hand.key("heads joint")
        (hand.store.folder(joint) / "DONE.json").unlink()
        put(hand.store.folder(joint) / "failure.json", {"error": "OSError: no space"})
    terminal.tick()
    terminal.progress.end()
    drawn: Any = terminal.progress.terminal
    told = "over: 1 failed, 1 of 12 stages are not done" if failed else "over"
    assert drawn.frames[-1][-1] == f"[  0:00] {told}"
