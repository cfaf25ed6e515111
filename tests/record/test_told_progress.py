"""What the terminal says while a study runs, word by word, and the time left by arithmetic on known rates."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

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


def left(terminal: Terminal) -> str:
    """The time left as the next summary tells it."""
    terminal.tick()  # what happened since the last look
    line = next(line for line in terminal.tick(after=20.0) if "stages done" in line)
    return line.split(" stages done, ")[1]


def rate_of(hand: Hand, name: str, done: int, *rates: float) -> None:
    """Let a stage have trained so many tokens, at these rates of its last journal lines."""
    key, count = hand.key(name), len(rates)
    hand.attempt(key, pid=2)
    tokens = [done * (n + 1) // count for n in range(count)]
    lines = [(n + 1, tokens[n], START + n, {"loss/kl": 0.5, "tokens_per_s": rates[n]}) for n in range(count)]
    hand.journal(key, *lines)


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
        return f"          traceback: {hand.store.folder(key) / 'failure.json'}"

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
        "[ 11:07] speed  1 of 8 architectures measured",
        "[ 11:07] speed  2 of 8 architectures measured",
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
    hand.finish("teacher")
    terminal = Terminal(hand, monkeypatch)
    assert terminal.tick(after=19.9) == []
    assert terminal.tick(after=0.1) == [f"[  0:20] 1 of 12 stages done, {UNKNOWN}"]
    hand.attempt(hand.key("two 0"), pid=2)
    metrics = {"loss/kl": 0.5, "loss/ce": 2.25, "loss/mse_layer_0": 9.0, "tokens_per_s": 1_234.5}
    hand.journal(hand.key("two 0"), (5, 40, START, {**metrics, "loss/kl": 0.75}), (10, 80, START, metrics))
    hand.attempt(hand.key("heads 0"), pid=2)  # has no line yet
    hand.attempt(hand.key("skip 0"), pid=2)
    assert len(terminal.tick()) == 2  # starts
    assert terminal.tick(after=20.0) == [
        "[  0:40] 1 of 12 stages done, at least 55 s left",  # 31.8 s of work on two cores, 40 s of measurements
        "          trial-00 stage 1/3 layers 0:  50%  kl 0.500 ce 2.250  1,234 tokens/s",
    ]


def test_the_time_left_is_the_work_over_the_cores(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20 tokens/s, three seconds beside each stage and two for each that trains nothing, and no rate of scratch yet:

    two 0 has 80 of 160 tokens: 7 s; two 1, heads 0 and heads 1: 11 s each; the three joint ones 19 s each;
    scratch 35 s; the skips 6 s: 138 s of work. The measurements of eight architectures: 40 s.
    """
    hand.finish("teacher")
    terminal = Terminal(hand, monkeypatch, cores=2)
    rate_of(hand, "two 0", 80, 20.0)
    assert left(terminal) == "at least 2 min left"  # 138 / 2 + 40 = 109 s
    one = Terminal(hand, monkeypatch, cores=1)
    hand.attempt(hand.key("two 0"), pid=3)
    assert left(one) == "at least 3 min left"  # 178 s
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1", "skip 0", "skip 1", "skip all")
    assert left(terminal) == "at least 70 s left"  # 69 s, told in steps of five
    assert left(one) == "at least 2 min left"  # 138 s


def test_the_time_left_is_never_less_than_the_longest_path(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight cores the work is 17 s, and the path of trial-02 takes 11 + 11 + 19 = 41 s."""
    hand.finish("teacher")
    terminal = Terminal(hand, monkeypatch, cores=8)
    rate_of(hand, "two 0", 80, 20.0)
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1", "skip 0", "skip 1", "skip all")
    assert left(terminal) == "at least 40 s left"
    hand.finish("heads 0", "heads 1")
    assert left(terminal) == "at least 35 s left"  # trial-00: 7 + 11 + 19 = 37 s
    rate_of(hand, "two 0", 159, 20.0)
    assert left(terminal) == "at least 35 s left"  # 0.05 + 3 + 11 + 19 = 33 s
    hand.finish("two 0", "two 1", "two joint", "two mixed", "scratch", "skip 0", "skip 1", "skip all")
    rate_of(hand, "heads joint", 319, 200.0)
    assert left(terminal) == "about 5 s left"
    hand.finish("heads joint")
    assert left(terminal) == "about 5 s left"  # never none, while somebody looks


def test_every_path_waits_for_the_teacher(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher has 800 of 1,600 tokens at 10 tokens/s: 83 s; trial-02 then 19 + 19 + 35 s at its rate."""
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1", "skip 0", "skip 1", "skip all")
    terminal = Terminal(hand, monkeypatch, cores=100)
    rate_of(hand, "teacher", 800, 10.0)
    assert left(terminal) == "at least 3 min left"  # 156 s


def test_each_kind_has_the_middle_of_its_last_nine_rates(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1", "skip 0", "skip 1", "skip all")
    hand.finish("teacher", "heads 0", "heads 1", "heads joint", "two 0", "two 1", "two joint")
    hand.finish("skip 0", "skip 1", "skip all")
    terminal = Terminal(hand, monkeypatch, cores=1)
    rate_of(hand, "two mixed", 80, 900.0, 900.0, 1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0, 50.0)
    rate_of(hand, "scratch", 320, 40.0)
    assert left(terminal) == "about 40 s left"  # 240 / 10 + 3 and 320 / 40 + 3, together 38 s
    rate_of(hand, "scratch", 320, 10.0)
    assert left(terminal) == "about 60 s left"  # 27 + 35 = 62 s


def test_phases_without_logits_have_a_rate_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers first: 80 tokens of 160 after the teacher's layers, 80 after its next tokens; then 320 jointly, thrice."""
    phases = "[{tokens: 80, losses: {mixer_mse: 1.0, hidden_mse: 1.0}}, {tokens: 80, losses: {ce: 1.0}}]"
    hand = Hand(tmp_path, "controls={skip: false, scratch: none}", f"recipe.phases={phases}")
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1")
    hand.finish("teacher", "two 0", "two 1", "two joint")
    terminal = Terminal(hand, monkeypatch, cores=1)
    rate_of(hand, "heads 0", 64, 16.0)
    assert left(terminal) == "at least 70 s left"  # 96 + 160 + 320 + 320 tokens at 16 a second, 3 s beside each: 68 s
    rate_of(hand, "heads 0", 96, 16.0, 16.0, 4.0)  # 32 and 64 tokens without logits, the next with
    assert left(terminal) == "about 4 min left"  # 64 / 4, 80 / 16 + 80 / 4, 640 / 4, 12: 213 s
    hand.finish("heads 0", "heads 1")
    assert left(terminal) == "about 3 min left"  # 166 s


def test_evaluations_and_speeds_take_as_long_as_those_before(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    hand.finish(*(name for name in hand.steps if name != "two mixed"))
    for name, seconds in {"teacher": 50.0, "two 0": 30.0}.items():
        hand.evaluate(name, seconds=seconds)
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1")
    for name in ("skip 0", "skip 1", "skip all"):
        hand.write(hand.speeds[hand.key(name)], {}, seconds=20.0)
    terminal = Terminal(hand, monkeypatch, cores=1)
    rate_of(hand, "two mixed", 160, 16.0)
    assert left(terminal) == "about 15 s left"  # 160 / 16 and 1 of training, the median of 50, 30 and nine of 2 seconds
    for name in ("skip 0", "skip 1", "skip all", "two 1", "heads 0", "heads 1"):
        hand.evaluate(name, seconds=40.0)
    assert left(terminal) == "about 50 s left"  # 11 and 40 s
    for name in ("heads 0", "heads 1"):
        (hand.store.folder(hand.speeds[hand.key(name)].key) / "DONE.json").unlink()
    fresh = Terminal(hand, monkeypatch, cores=1)
    hand.attempt(hand.key("two mixed"), pid=3)
    assert left(fresh) == "about 75 s left"  # and two of 12.5 s, the median of three of 5 and three of 20


def test_without_an_evaluation_before_there_may_be_more_to_do(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hand.steps:
        hand.train(name)
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1", "skip 0", "skip 1", "skip all")
    terminal = Terminal(hand, monkeypatch, cores=1)
    rate_of(hand, "teacher", 1_600, 10.0)
    assert left(terminal) == "at least 35 s left"  # nine of 3 and three of 2 seconds


def test_a_stage_that_takes_two_cores_takes_twice_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(tmp_path, "numerics.threads=2", "controls={skip: false, scratch: none}")
    hand.finish("teacher", "heads 0", "heads 1", "heads joint", "two 0", "two 1")
    hand.measure("teacher", "two 0", "two 1", "heads 0", "heads 1")
    terminal = Terminal(hand, monkeypatch, cores=2)
    rate_of(hand, "two joint", 160, 10.0)
    assert left(terminal) == "about 55 s left"  # (19 + 35) * 2 / 2
