"""A recipe that reads the same text again: the windows of its stages, and what stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.loader import StudyError
from tests.study.test_plan import only, planned


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_students_and_their_control_read_so_many_windows_of_text() -> None:
    plan = planned("recipe.text_tokens=1023", "controls={skip: false, scratch: own}")
    specs = [step.train for step in (*plan.trials[0].steps, *plan.controls.values())]
    assert [spec.kind for spec in specs] == ["distil"] * 4 + ["scratch"]  # type: ignore[attr-defined]
    assert {spec.text_windows for spec in specs} == {31}  # type: ignore[attr-defined]
    assert plan.teacher.train.key == planned().teacher.train.key
    assert {step.train.text_windows for step in only().steps} == {None}  # type: ignore[attr-defined]


def test_a_text_shorter_than_a_batch_is_told() -> None:
    with pytest.raises(
        StudyError, match=r"recipe\.text_tokens: 63 tokens are less than one step of 64 \(batch_size x "
    ):
        planned("recipe.text_tokens=63")
