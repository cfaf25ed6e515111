"""What a look at the store finds: states of stages, journals that grow, and the memory of processes of this machine."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import pytest

from orchestrator.record.screen import facts as module
from orchestrator.record.screen.facts import Look, Stage, done_stage, stage_names
from tests.record.handmade import START, Hand, put


def look_of(hand: Hand) -> Look:
    return Look(hand.store, {**hand.plan.specs, **{spec.key: spec for spec in hand.speeds.values()}})


def line(tokens: int, rate: float, **losses: float) -> tuple[int, int, float, dict[str, float]]:
    return (
        tokens // 16,
        tokens,
        START,
        {f"loss/{name}": value for name, value in losses.items()} | {"tokens_per_s": rate},
    )


def test_a_stage_waits_runs_fails_runs_again_and_is_done(hand: Hand) -> None:
    key = hand.key("two 0")
    hand.attempt(key, number=1)  # of an earlier run
    looking = look_of(hand)
    assert looking.look(1.0)[key] == Stage()
    hand.attempt(key, number=2, pid=2)
    assert (looking.look(2.0)[key].state, looking.look(3.0)[key].since) == ("running", 2.0)
    put(hand.store.folder(key) / "failure.json", {"error": "OSError: no space"})
    failed = looking.look(4.0)[key]
    assert (failed.state, failed.attempt, failed.error) == ("failed", 2, "OSError: no space")
    (hand.store.folder(key) / "failure.json").unlink()
    hand.attempt(key, number=3, pid=3)
    assert (looking.look(5.0)[key].state, looking.look(6.0)[key].since) == ("running", 5.0)
    hand.train("two 0", rate=40.0, seconds=10.0)
    done = looking.look(7.0)[key]
    assert (done.state, done.seconds, done.beside, done.fresh) == ("done", 10.0, 10.0 - 160 / 40, True)
    (hand.store.folder(key) / "DONE.json").unlink()  # withdrawn
    hand.attempt(key, number=4, pid=4)
    assert looking.look(8.0)[key].state == "running"
    hand.train("two 0", seconds=20.0)
    assert looking.look(9.0)[key].seconds == 20.0


def test_what_earlier_runs_left_is_not_of_this_run(hand: Hand) -> None:
    failed, done = hand.key("two 0"), hand.key("teacher")
    hand.attempt(failed)
    put(hand.store.folder(failed) / "failure.json", {"error": "OSError: of yesterday"})
    hand.finish("teacher")
    found = look_of(hand).look(1.0)
    assert found[failed].state == "waiting"
    assert (found[done].state, found[done].fresh) == ("done", False)


def test_a_journal_is_read_on_from_where_it_was(hand: Hand) -> None:
    key, looking = hand.key("two 0"), look_of(hand)
    hand.attempt(key, pid=2)
    hand.journal(key, line(32, 10.0, kl=1.0), line(64, 20.0, kl=0.5, mse_layer_0=9.0))
    found = looking.look(1.0)[key]
    assert (found.tokens, found.points, found.heard) == (64, ((32, 10.0), (64, 20.0)), 1.0)
    assert found.losses == {"kl": 0.5}
    path = hand.store.folder(key) / "journal.jsonl"
    torn = json.dumps({"step": 6, "tokens": 96, "time": START, "metrics": {"tokens_per_s": 30.0}})
    with path.open("a") as stream:
        stream.write(torn[:20])
    assert (looking.look(2.0)[key].tokens, looking.look(2.0)[key].heard) == (64, 1.0)
    with path.open("a") as stream:
        stream.write(torn[20:] + "\nno line\n")
    assert looking.look(3.0)[key].points[-1] == (96, 30.0)
    hand.journal(key, line(16, 5.0))  # removed, and begun again
    assert (looking.look(4.0)[key].tokens, looking.look(4.0)[key].points) == (16, ((16, 5.0),))


def test_of_a_long_journal_the_end_is_read(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAIL", 200)
    key = hand.key("two 0")
    hand.journal(key, *(line(16 * number, float(number)) for number in range(1, 11)))
    found = look_of(hand).look(1.0)[key]
    assert found.tokens == 160 and 0 < len(found.points) < 4


def test_memory_is_told_of_processes_of_this_machine(hand: Hand) -> None:
    key, looking = hand.key("two 0"), look_of(hand)
    attempt: dict[str, Any] = {"pid": os.getpid(), "host": platform.node(), "started": START, "number": 1}
    put(hand.store.folder(key) / "attempt.json", attempt)
    mine = looking.look(1.0)[key].memory_mb
    assert mine is not None and 10 < mine < 100_000
    for other in ({"host": "elsewhere"}, {"pid": 2**22 + 1}):
        put(hand.store.folder(key) / "attempt.json", {**attempt, **other})
        assert looking.look(2.0)[key].memory_mb is None


def test_a_stage_that_was_resumed_tells_no_seconds() -> None:
    result = {"tokens_per_s": 40.0, "seconds": 4.0, "resumed_at": 10}
    assert done_stage({"result": result, "seconds": 1.0}, (), fresh=True) == Stage("done", fresh=True)


def test_all_that_may_run_has_a_name(hand: Hand) -> None:
    names = stage_names(hand.plan, hand.speeds)
    assert set(names) == set(look_of(hand).keys)
    assert names[hand.speeds[hand.key("two 1")].key] == "speed of hyena-2 layers 0,1"
    assert names[hand.speeds[hand.key("teacher")].key] == "speed of teacher"
    assert names[hand.steps["heads joint"].evaluate.key] == "evaluation of trial-02 joint layers 0,1"
