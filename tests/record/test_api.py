"""The Python API against the commands: the same plan, records and errors, from a handmade home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import orchestrator as ls
from orchestrator.record import running
from orchestrator.record.records import make_records
from tests.record.handmade import Hand
from tests.record.test_remembered import other, remembered

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "api.ipynb"


@pytest.fixture
def study(hand: Hand) -> Any:
    """A finished study, as it was run."""
    hand.all_done()
    remembered(hand)
    return ls.home(hand.home.root).study("handmade")


def test_records_are_typed_and_those_of_the_report(hand: Hand, study: Any) -> None:
    frame = study.records()
    rows = make_records(hand.plan, hand.store, study.job.speeds, set(), lambda _: None)
    assert frame["name"].tolist() == [row["name"] for row in rows]
    assert frame["perplexity_ratio"].tolist() == [row["metrics"]["perplexity_ratio"] for row in rows]
    assert frame["swapped"].tolist() == [len(row["swapped_layers"]) for row in rows]
    assert [str(frame[name].dtype) for name in ("swapped", "stage_index", "hit_nll", "prefill_ratio.32")] == [
        "Int64", "Int64", "Float64", "Float64",
    ]  # fmt: skip
    joint = frame[frame["name"] == "trial-00 joint"]
    assert joint["prefill_ratio.32"].tolist() == [1.5]  # of its architecture, that of `two 1`
    scratch = frame[frame["name"].str.startswith("scratch")]
    assert scratch["stage_index"].isna().all() and (frame.loc[frame["kind"] == "teacher", "layers"] == 2).all()


def test_a_plan_is_that_of_the_command(study: Any) -> None:
    assert "3 trials ask for" in study.plan() and study.plan().endswith("to do: nothing")


def test_a_home_lists_and_finds(hand: Hand, study: Any, tmp_path: Path) -> None:
    seeded = remembered(other(hand, tmp_path, "seed=1"), 2.0)
    home = ls.home(hand.home.root)
    assert home.titles()[0] == seeded.title and home.studies()["study"].tolist() == home.titles()
    assert home.study(seeded.title).asked.values["seed"] == 1
    with pytest.raises(ValueError, match="it knows handmade"):
        home.study("unknown")


def test_a_study_file_is_loaded_with_its_overrides_and_its_mistakes_are_told(hand: Hand) -> None:
    text = hand.file.parent / "more.txt"
    text.write_text("another document\n" * 9)
    texts = ("data.train.files=[text.txt, more.txt]", "data.validation_share=0.5")
    assert ls.load(hand.file, "seed=3", *texts, home=hand.home.root).job.plan.study.seed == 3
    with pytest.raises(ValueError, match=r"--set sed=3.*did you mean seed"):
        ls.load(hand.file, "sed=3")


def test_a_run_takes_where_it_is_to_go(hand: Hand, study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def start(job: Any, resolved: Any, where: Any, interrupt: Any) -> int:
        seen.append((job, resolved, where))
        return 3

    monkeypatch.setattr(running, "start", start)
    assert study.run(checkpoint_seconds=2.0) == 3
    [(job, resolved, where)] = seen
    assert (where.checkpoint_seconds, where.device, where.claims) == (2.0, None, "flock")
    assert job.plan == hand.plan and job.home.root == hand.home.root and resolved == hand.asked.resolved
    with pytest.raises(TypeError, match="device_name"):
        study.run(device_name="cuda")


def test_the_notebook_runs(hand: Hand, study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, on the handmade study in place of the one it names."""
    monkeypatch.setattr(running, "start", lambda *_: 0)
    monkeypatch.setattr(ls.api, "load", lambda file, home: study)
    monkeypatch.setattr(ls.api, "home", lambda root, own=ls.api.home: own(hand.home.root))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        assert cell["outputs"] == []
    assert names["code"] == 0 and isinstance(names["students"], pd.DataFrame)
    assert len(names["students"]) == 9 and names["newest"].asked.values["study"] == "handmade"
