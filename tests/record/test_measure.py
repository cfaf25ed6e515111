"""`layerswap measure`: which measurements it asks for, what it leaves alone, and how it ends."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.record import driver
from orchestrator.run import preflight, sweep
from orchestrator.run.growing import Growing
from orchestrator.run.sweep import Outcome
from orchestrator.study.spec import ThroughputSpec
from tests.record.handmade import Hand, speed
from tests.record.test_remembered import remembered

TURNS = {"prefill_turns": {"16": [0.9] * 9, "32": [1.7] * 9}}


class Asked:
    """What the command wants to be computed, which is done by hand."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.rounds: list[dict[str, ThroughputSpec]] = []
        self.failures: dict[str, str] = {}

    def run_plan(self, growing: Growing, context: Any, cluster: Any) -> Outcome:
        assert (growing.plan.trials, growing.plan.controls) == ((), {})  # nothing is trained
        assert pickle.loads(pickle.dumps(growing.planner)) == growing.planner  # on its way to the broker
        self.rounds.append(growing.speeds)
        for spec in growing.speeds.values():
            self.hand.write(spec, {**speed(1.7, 2.0), **TURNS})
        return Outcome(failures=self.failures)

    def __call__(self) -> Result:
        return CliRunner().invoke(app, ["measure", str(self.hand.file), "--home", str(self.hand.home.root)])


@pytest.fixture
def asked(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked(hand)
    remembered(hand)
    monkeypatch.setattr("orchestrator.record.measure.hardware", lambda _: "test")
    monkeypatch.setattr("orchestrator.record.tracking.recorder.Recorder", lambda *_, **__: None)
    monkeypatch.setattr(preflight, "check_run", lambda *_: None)
    monkeypatch.setattr(sweep, "run_plan", made.run_plan)
    monkeypatch.setattr(driver, "report", lambda *_: ([], "the answer"))
    return made


def test_every_finished_architecture_is_measured_once_more(hand: Hand, asked: Asked) -> None:
    hand.all_done()
    before = {key: (hand.store.folder(spec.key) / "DONE.json").read_bytes() for key, spec in hand.speeds.items()}
    done = asked()
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["measurement 2 of 7 architectures", "", "the answer"]
    assert asked().stdout.startswith("measurement 3 of 7 architectures\n")
    assert [{spec.again for spec in each.values()} for each in asked.rounds] == [{1}, {2}]
    assert [each.keys() for each in asked.rounds] == [hand.speeds.keys()] * 2
    for key, spec in hand.speeds.items():
        assert (hand.store.folder(spec.key) / "DONE.json").read_bytes() == before[key]
        assert json.loads((hand.store.folder(spec.changed(again=2).key) / "spec.json").read_text())["again"] == 2


def test_a_measurement_that_failed_is_told_with_an_exit_code(hand: Hand, asked: Asked) -> None:
    hand.all_done()
    asked.failures = {"throughput 12345678": "OutOfMemoryError"}
    done = asked()
    assert done.exit_code == 1 and "the answer" in done.stdout
    assert done.stderr == "failed: throughput 12345678: OutOfMemoryError\n"


def test_before_a_student_is_finished_there_is_nothing_to_measure(hand: Hand, asked: Asked) -> None:
    hand.text()
    done = asked()
    assert (done.exit_code, asked.rounds) == (2, [])
    assert done.stderr == "handmade has no finished student to measure: run the study first\n"
