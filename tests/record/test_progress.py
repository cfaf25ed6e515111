"""What the terminal shows: read from the store, true whatever the clock says and whatever is withdrawn."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import write_json
from orchestrator.record.screen.progress import Progress
from orchestrator.run.store import Store
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan
from orchestrator.study.sources import resolve

ROOT = Path(__file__).resolve().parents[2]
RESULT = {"perplexity": 8.0, "perplexity_ratio": 1.0, "agreement": 1.0}


@pytest.fixture(scope="module")
def plan() -> Plan:
    document = read_document(ROOT / "studies" / "smoke.yaml")
    study = validate(document)
    return make_plan(document, study, resolve(study, ROOT / "studies"))


def finish(store: Store, key: str) -> None:
    write_json(store.folder(key) / "DONE.json", {"result": RESULT, "files": {"gone": ""}})


def test_a_stage_is_told_whatever_the_clock_says(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out, teacher = Store(tmp_path), io.StringIO(), plan.teacher
    attempt: dict[str, Any] = {"pid": 1, "host": "here", "started": 2e9}
    write_json(store.folder(teacher.train.key) / "attempt.json", attempt)
    progress = Progress(plan, store, {}, 2, out)
    progress.tick()
    assert "start" not in out.getvalue()  # it was begun by somebody who is gone
    monkeypatch.setattr(time, "time", lambda: 0.0)
    write_json(store.folder(teacher.train.key) / "attempt.json", {**attempt, "pid": 2, "started": 5.0})
    progress.tick()
    assert "start  teacher" in out.getvalue()


def test_damage_that_a_worker_found_is_told_and_the_stage_told_again(plan: Plan, tmp_path: Path) -> None:
    store, out, teacher = Store(tmp_path), io.StringIO(), plan.teacher
    progress = Progress(plan, store, {}, 2, out)
    for key in (teacher.train.key, teacher.evaluate.key):
        finish(store, key)
    progress.tick()
    store.withdraw_damaged([teacher.train.key])
    progress.tick()
    finish(store, teacher.train.key)
    progress.tick()
    lines = [line.split("] ")[1] for line in out.getvalue().splitlines()]
    assert [line[:13] for line in lines] == ["done   teache", f"stage {teacher.train.key[:7]}", "done   teache"]
    assert "gone is damaged or gone: the stage is computed again" in lines[1]
