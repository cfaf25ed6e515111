"""The card of a student, from records that are written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.distill.models.origin import Origin
from orchestrator.record.card import model_card
from orchestrator.record.records import make_records
from tests.record.handmade import Hand


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    made = Hand(tmp_path)
    made.all_done()
    return made


def card(hand: Hand, step: str, trial: str | None = None, **origin: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    records = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    text = model_card(hand.plan, records, hand.key(step), trial, hand.steps[step].swapped, Origin(**origin))
    _, metadata, text = text.split("---\n", 2)
    return yaml.safe_load(metadata), text


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_rows_end_with_the_student(hand: Hand) -> None:
    _, text = card(hand, "two 1")
    names = [row[0] for row in rows_of(text)]
    assert names[1:6] == ["teacher", "scratch hyena-2", "skip 0", "skip 1", "skip all"]
    assert names[6:9] == ["trial-00 stage 1", "trial-00 stage 2", "stage"]
    last = rows_of(text)[7]
    assert last[1:5] == ["2/2", "320", "10.00", "1.250"] and last[-2:] == ["1.50x", "2.00x"]
    lineage = rows_of(text)[9:]
    assert lineage == [
        ["text", "", "", f"`{hand.plan.tokens.key}`"],
        ["teacher", "", "1,600", f"`{hand.key('teacher')}`"],
        ["trial-00 stage 1", "0", "160", f"`{hand.key('two 0')}`"],
        ["trial-00 stage 2", "1", "160", f"`{hand.key('two 1')}`"],
    ]
    assert "The last row is this model, of losses=kl:1.0" in text and "Which of two operators costs less?" in text
    assert "compiled core" not in text and "float32" not in text


def test_a_shared_stage_is_told_on_the_path_that_was_asked_for(hand: Hand) -> None:
    assert "| trial-01 stage 1 | 0 |" in card(hand, "two 0", "trial-01")[1]
    assert "| trial-00 stage 1 | 0 |" in card(hand, "two 0")[1]
    assert "| trial-01 joint | 0-1 |" in card(hand, "two mixed")[1]


def test_what_the_teacher_came_with_is_in_the_metadata(hand: Hand) -> None:
    told, text = card(hand, "two joint", dtype="float16", name="a/b", license="other", license_name="own")
    assert told == {
        "base_model": "a/b", "base_model_relation": "finetune", "library_name": "transformers", "license": "other",
        "license_name": "own", "pipeline_tag": "text-generation",
        "tags": ["layerswap", "hyena", "long-convolution", "distillation", "custom_code"],
    }  # fmt: skip
    assert "The weights here are rounded to float16, the precision of the teacher's" in text
    told, text = card(hand, "two joint")
    assert told.keys() == {"library_name", "pipeline_tag", "tags"} and "rounded" not in text


def test_what_is_not_measured_is_told(hand: Hand) -> None:
    (hand.store.folder(hand.steps["two joint"].evaluate.key) / "DONE.json").unlink()
    text = card(hand, "two joint")[1]
    assert "This model was not measured yet." in text and "| trial-00 stage 2 | 2/2 |" in text


def test_the_speed_of_the_compiled_core_is_not_that_of_the_folder(hand: Hand) -> None:
    hand.measure("two 1", core="native")
    assert "The code of this folder runs in torch, which decodes slower" in card(hand, "two 1")[1]
