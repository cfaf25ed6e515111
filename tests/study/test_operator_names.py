"""What operators are called where people read of them, and what a plan says of one that does not fit its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.config import FirFilterConfig, HyenaConfig, ModalFilterConfig, WindowConfig
from orchestrator.record.records import trial_words
from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.names import operator_name
from orchestrator.study.plan import make_plan
from tests.study.test_size import RESOLVED, STUDY

WINDOW = "kind: hyena, heads: 2, feature_map: power, normalise: true, window: 32, filter: {positive: true}"


def test_operators_have_short_names() -> None:
    names = [operator_name(config) for config in (HyenaConfig(), HyenaConfig(order=3), HyenaConfig(heads=8))]
    assert names == ["hyena-2", "hyena-3", "hyena-8h"]
    assert operator_name(HyenaConfig(filter=ModalFilterConfig())) == "hyena-2-modal"
    assert operator_name(HyenaConfig(heads=2, feature_map="power", filter=FirFilterConfig())) == "hyena-2h-power-fir"
    positive = ModalFilterConfig(positive=True)
    window = HyenaConfig(heads=2, feature_map="power", normalise=True, window=32, filter=positive)
    assert operator_name(window) == "hyena-2h-power-modal-w32"
    assert operator_name(WindowConfig(window=64)) == "window-64"


@pytest.mark.parametrize("wrong", [f"{{{WINDOW}}}", "{kind: window, heads: 2}"])
def test_a_window_has_the_teachers_heads(wrong: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY, encoding="utf-8")
    document = read_document(study, [f"operator={wrong}"])
    with pytest.raises(
        StudyError, match=r"operator.heads: 2 with a window must be the teacher's 4, .*: give 4, or init"
    ):
        make_plan(document, validate(document), RESOLVED)
    for right in (wrong.replace("heads: 2", "heads: 4"), wrong.replace("heads: 2", "heads: 2, init: random")):
        document = read_document(study, [f"operator={right}"])
        assert make_plan(document, validate(document), RESOLVED).trials


def test_a_swept_operator_that_is_the_studys_own_needs_no_more_than_its_name(tmp_path: Path) -> None:
    """Others of that name are told by what differs, the study's own values included."""
    study = tmp_path / "study.yaml"
    study.write_text(STUDY, encoding="utf-8")
    own = "operator={kind: hyena, heads: 4, filter: {width: 16}}"
    for swept, wanted in (
        ("{kind: hyena, heads: 4, filter: {width: 16, depth: 2}}", "operator=hyena-4h"),
        ("{kind: hyena, heads: 4, filter: {width: 8}}", "operator=hyena-4h(filter.width:8)"),
    ):
        space = f"search.space=[{{seed: [7]}}, {{operator: [{swept}]}}]"
        document = read_document(study, [own, space])
        plan = make_plan(document, validate(document), RESOLVED)
        assert list(trial_words(plan).values()) == ["seed=7", wanted]
