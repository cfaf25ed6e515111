"""Records of a store with known numbers: every field of every row, and the two paths that are chosen from them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.record.records import Record, best_path, make_records, pareto_front
from tests.record.handmade import RATIOS, SPEEDS, Hand, quality, speed

KL, MIXED = {"kl": 1.0}, {"kl": 1.0, "ce": 0.5}
HEADS: dict[str, Any] = {"kind": "hyena", "heads": 2}
STAGES = [  # name of the step, trial, place on its path, swapped layers, tokens so far, its own tokens
    ("two 0", "trial-00", 0, [0], 160, 160),
    ("two 1", "trial-00", 1, [0, 1], 320, 160),
    ("two joint", "trial-00", 2, [0, 1], 640, 320),
    ("two 0", "trial-01", 0, [0], 160, 160),
    ("two 1", "trial-01", 1, [0, 1], 320, 160),
    ("two mixed", "trial-01", 2, [0, 1], 640, 320),
    ("heads 0", "trial-02", 0, [0], 160, 160),
    ("heads 1", "trial-02", 1, [0, 1], 320, 160),
    ("heads joint", "trial-02", 2, [0, 1], 640, 320),
]
TRIALS: dict[str, tuple[str, dict[str, Any], str]] = {  # operator, point of the search space, the point in words
    "trial-00": ("hyena-2", {"recipe.joint.0.losses": KL}, "losses=kl:1.0"),
    "trial-01": ("hyena-2", {"recipe.joint.0.losses": MIXED}, "losses=kl:1.0,ce:0.5"),
    "trial-02": ("hyena-2h", {"operator": HEADS}, "operator=hyena-2h"),
}
ARCHITECTURES = {"two joint": "two 1", "two mixed": "two 1", "heads joint": "heads 1", "scratch": "two 1"}


def records_of(hand: Hand, *trained: str) -> list[Record]:
    keys = {hand.key(name) for name in trained}
    return make_records(hand.plan, hand.store, hand.speeds, keys, lambda step: f"run of {step.train.key}")


def expected(hand: Hand, step: str, tokens: int, own: int, **more: Any) -> Record:
    """The row of a step that was reused."""
    metrics = quality(RATIOS[step]) | speed(*SPEEDS[ARCHITECTURES.get(step, step)]) | {"student_tokens": tokens}
    if own:  # at forty tokens a second
        metrics |= {"stage_tokens_per_s": 40.0, "stage_seconds": own / 40}
    row = {
        "kind": "control", "name": step, "trial": None, "stage_index": None, "stage_count": None, "operator": "skip",
        "outcome": None, "last": None,
        "swapped_layers": [], "total_layers": 2, "values": {}, "words": "", "stage_key": hand.key(step),
        "run_id": f"run of {hand.key(step)}", "reused": True, "metrics": metrics, "group": None, "seed": None,
        "tasks": {}, "probes": {},
    }  # fmt: skip
    return row | more


def test_every_field_of_every_row(hand: Hand) -> None:
    hand.all_done()
    teacher, scratch, *rows = records_of(hand, "two 0", "two joint", "scratch")
    wanted = expected(hand, "teacher", 0, 1_600, kind="teacher", operator=None)
    wanted["metrics"]["teacher_tokens"] = 1_600
    assert teacher == wanted
    place: dict[str, Any] = {"name": "scratch hyena-2", "operator": "hyena-2", "swapped_layers": [0, 1]}
    assert scratch == expected(hand, "scratch", 640, 640, reused=False, **place)
    skips = [("skip 0", [0]), ("skip 1", [1]), ("skip all", [0, 1])]
    assert rows[:3] == [expected(hand, name, 0, 0, swapped_layers=layers) for name, layers in skips]
    for row, (name, trial, index, layers, tokens, own) in zip(rows[3:], STAGES, strict=True):
        operator, values, words = TRIALS[trial]
        assert row == expected(
            hand, name, tokens, own, kind="stage", name=f"{trial} {'joint' if index == 2 else f'stage {index + 1}'}",
            trial=trial, stage_index=index, stage_count=3, outcome="kept", last=index == 2, operator=operator,
            swapped_layers=layers, values=values, words=words, joint=index == 2, group=trial, seed=0,
            reused=name not in ("two 0", "two joint"),
        )  # fmt: skip


def test_a_step_is_told_once_its_stage_and_its_evaluation_are_there(hand: Hand) -> None:
    hand.train("two 0")  # not evaluated
    hand.evaluate("two 1")  # its stage was withdrawn, for it was damaged
    hand.finish("heads 0")
    [row] = records_of(hand)
    assert (row["name"], row["trial"]) == ("trial-02 stage 1", "trial-02")
    assert row["metrics"] == {
        **quality(1.2), "student_tokens": 160, "stage_tokens_per_s": 40.0, "stage_seconds": 4.0,
    }  # fmt: skip
    hand.measure("heads 0", core="native")
    assert records_of(hand)[0]["metrics"]["prefill_ratio"] == {"16": 0.65, "32": 1.3}
    assert records_of(hand)[0]["metrics"]["core"] == "native"


def test_a_teacher_of_the_hub_was_trained_on_unknown_tokens(hand: Hand) -> None:
    hand.finish("teacher")
    assert records_of(hand)[0]["metrics"]["teacher_tokens"] == 1_600
    hand.finish("two 0")
    assert "teacher_tokens" not in records_of(hand)[1]["metrics"]


def test_the_best_path_swaps_most_layers_then_costs_least(hand: Hand) -> None:
    hand.all_done()
    rows = records_of(hand)
    assert [row["name"] for row in best_path(rows)] == ["trial-00 stage 1", "trial-00 stage 2", "trial-00 joint"]
    assert best_path(rows)[-1]["metrics"]["perplexity_ratio"] == 1.1
    fewer = [row | {"swapped_layers": [0]} if row["trial"] == "trial-00" else row for row in rows]
    assert {row["trial"] for row in best_path(fewer)} == {"trial-02"}
    unfinished = [row for row in rows if row["stage_index"] != 2]
    assert best_path(unfinished) == []


ONE, TWO, HEADS_LAST = "trial-00 stage 1", "trial-00 joint", "trial-02 joint"


@pytest.mark.parametrize(
    ("name", "length", "told"),
    [
        ("prefill_ratio", "32", [(ONE, 1.1, 1.05), (TWO, 1.5, 1.1), (HEADS_LAST, 1.6, 1.12)]),
        ("decode_ratio", "32", [(ONE, 1.2, 1.05), (TWO, 2.0, 1.1)]),
        ("decode_ratio", "16", [(ONE, 0.6, 1.05), (TWO, 1.0, 1.1)]),
        ("decode_ratio", "64", []),
    ],
)
def test_the_front_holds_the_students_that_no_other_beats(
    hand: Hand, name: str, length: str, told: list[tuple[str, float, float]]
) -> None:
    hand.all_done()
    front = pareto_front(records_of(hand), name, length)
    assert [(r["name"], r["metrics"][name][length], r["metrics"]["perplexity_ratio"]) for r in front] == told


def test_of_equals_one_stands_on_the_front() -> None:
    def row(name: str, x: float, y: float) -> Record:
        place = {"kind": "stage", "name": name, "trial": name, "group": name, "seed": 0, "stage_index": 0, "last": True}
        place |= {"outcome": "kept", "swapped_layers": [0]}
        return {**place, "stage_key": name, "metrics": {"prefill_ratio": {"8": x}, "perplexity_ratio": y}}

    rows = [row("a", 1.0, 2.0), row("b", 1.0, 2.0), row("slow", 0.9, 2.0), row("poor", 1.0, 2.5), row("good", 0.5, 1.5)]
    assert [found["name"] for found in pareto_front(rows, "prefill_ratio", "8")] == ["good", "a"]
