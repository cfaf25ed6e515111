"""What a run tells when its plan has grown, word by word; the computing is done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.record import driver
from orchestrator.record.provenance import Provenance
from tests.record.handmade import Hand
from tests.record.test_told_run import Quiet, Scene


def test_what_a_plan_has_grown_by_reaches_records_home_and_terminal(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a search whose next points have become known."""
    scene = Scene(hand, monkeypatch)
    whole = scene.job.plan
    scene.job.growing.plan = dataclasses.replace(whole, trials=whole.trials[:1])
    recorder, told = Quiet(), []
    with scene.job.variant.running(Provenance.of("run")) as run:
        watch = driver._Watch(scene.job, hand.store, 2, run, recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(watch.progress, "say", told.append)
    watch._look()
    assert recorder.given == []

    def grow() -> bool:
        scene.job.growing.plan = whole
        return True

    monkeypatch.setattr(scene.job.growing, "grow", grow)
    watch._look()
    watch._look()
    assert recorder.given == [(whole, scene.job.speeds)]
    assert [line for line in told if line.startswith("drawn")] == [
        "drawn  trial-01: losses=kl:1.0,ce:0.5", "drawn  trial-02: operator=hyena-2h",
    ]  # fmt: skip
    assert scene.job.variant.needed() == scene.job.keys and hand.key("heads 0") in watch.progress.steps
