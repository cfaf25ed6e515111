"""Commands that look at what was run: by file or by name, without the inputs, and without writing where one may not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.record import driver
from orchestrator.record.home import Home
from orchestrator.record.remembered import Variant, variant_of
from tests.record.handmade import Hand
from tests.record.test_remembered import other, remembered
from tests.record.test_told_run import Quiet


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither MLflow nor pictures, which other tests look at."""
    monkeypatch.setattr("orchestrator.record.tracking.recorder.Recorder", Quiet)
    monkeypatch.setattr(driver, "write_report", lambda *_: {})
    monkeypatch.setattr("orchestrator.record.doctor._machine", lambda: iter(()))


@pytest.fixture
def ran(hand: Hand) -> Variant:
    """The study was run, and what it reads is gone."""
    hand.all_done()
    variant = remembered(hand)
    variant.remember(hand.asked, {*hand.plan.specs, *(spec.key for spec in hand.speeds.values())})
    (hand.file.parent / "text.txt").unlink()
    return variant


def call(hand: Hand, *words: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, words), "--home", str(hand.home.root)])
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("by", ["file", "name", "id"])
def test_what_was_run_is_looked_at_without_its_inputs(hand: Hand, ran: Variant, by: str) -> None:
    study = {"file": hand.file, "name": "handmade", "id": ran.title[:-2]}[by]
    assert "finished, perplexity ratio 1.100" in call(hand, "status", study).stdout
    told = call(hand, "report", study).stdout
    assert "best path: trial-00" in told and f"report:   {ran.folder / 'report.html'}" in told
    assert " 1.50x" in told  # speeds are those of the machine that measured them
    healthy = call(hand, "doctor", study).stdout
    assert healthy.splitlines()[-1] == "healthy"


def test_a_study_that_was_never_run_as_it_is_written_needs_its_inputs(hand: Hand, ran: Variant) -> None:
    told = call(hand, "status", hand.file, "--set", "seed=1", code=2)
    assert "text.txt" in told.output


def test_a_name_needs_no_overrides(hand: Hand, ran: Variant) -> None:
    told = call(hand, "status", "handmade", "--set", "seed=1", code=2)
    assert told.stderr == "--set seed=1 belongs to a study file, and handmade is what was run: leave it out\n"


@pytest.mark.parametrize("name", ["unknown", "nowhere.yaml"])
def test_what_is_neither_a_file_nor_known_is_told(hand: Hand, ran: Variant, name: str) -> None:
    told = call(hand, "report", name, code=2).stderr
    assert told.startswith(f"{name}: no s" if name == "nowhere.yaml" else f"{name}: no study file, and no study of ")
    assert "handmade" in told or name == "nowhere.yaml"


def test_variants_have_reports_of_their_own(hand: Hand, ran: Variant, tmp_path: Path) -> None:
    seeded = remembered(other(hand, tmp_path, "seed=1"), started=5.0)
    told = [call(hand, "report", study).stdout for study in (hand.file, "handmade")]
    assert f"report:   {ran.folder}/" in told[0] and f"report:   {seeded.folder}/" in told[1]


def test_who_may_only_read_is_answered_and_nothing_is_written(
    hand: Hand, ran: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Home, "writable", property(lambda _: False))
    monkeypatch.setattr(driver, "write_report", lambda *_: pytest.fail("written"))
    before = sorted(hand.home.root.rglob("*"))
    done = call(hand, "report", "handmade")
    assert "best path: trial-00" in done.stdout
    assert done.stderr == (
        f"{hand.home.root} is not yours to write: its report and MLflow's records stay as they are\n"
    )
    assert sorted(hand.home.root.rglob("*")) == before


def test_gc_keeps_what_any_variant_needs_without_being_told_their_files(
    hand: Hand, ran: Variant, tmp_path: Path
) -> None:
    seeded = other(hand, tmp_path, "seed=1")
    seeded.store = hand.store
    seeded.finish("two 0")
    assert "2 stages that no given study needs" in call(hand, "gc").stdout
    variant = remembered(seeded)
    assert call(hand, "gc").stdout.startswith("0 stages that no given study needs")
    shutil.rmtree(variant.folder)
    call(hand, "gc", "--delete")
    assert not hand.store.finished(seeded.key("two 0")) and hand.store.finished(hand.key("two 0"))
    assert hand.store.finished(hand.speeds[hand.key("two 1")].key)


def test_gc_deletes_nothing_while_it_cannot_read_what_is_needed(hand: Hand, ran: Variant) -> None:
    (ran.folder / "asked.json").write_text("{")
    told = call(hand, "gc", "--delete", code=2).stderr
    assert told.startswith(f"{ran.folder / 'asked.json'} cannot be read")
    assert hand.store.finished(hand.key("two 0"))


def test_a_run_of_another_machine_is_read_with_its_speeds(hand: Hand, ran: Variant, monkeypatch: Any) -> None:
    monkeypatch.setattr("orchestrator.record.given.hardware", lambda: "another machine")
    assert " 1.50x" in call(hand, "report", "handmade").stdout
    assert variant_of(hand.home, hand.plan).asked().hardware == "test"
