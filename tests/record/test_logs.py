"""`layerswap log`: which logs are meant, and what is said where none is."""

from __future__ import annotations

import pytest

from orchestrator.record.screen.logs import SHOWN, log_text
from orchestrator.study.spec import short
from tests.record.handmade import Hand, put


def let(hand: Hand, key: str, text: str) -> str:
    """Let a stage have begun and written this; returns the log's path."""
    hand.attempt(key)
    path = hand.store.folder(key) / "log.txt"
    path.write_text(text)
    return str(path)


def shown(hand: Hand, stage: str | None = None) -> str:
    return log_text(hand.plan, hand.store, hand.speeds, stage)


def test_without_a_name_those_that_failed_or_run(hand: Hand) -> None:
    assert shown(hand) == "no stage has failed or is running; the log of another: layerswap log STUDY STAGE"
    hand.finish("teacher")
    let(hand, hand.key("teacher"), "not told, for it is done\n")
    two, heads = hand.key("two 0"), hand.steps["heads 0"].evaluate.key
    long = "".join(f"line {number}\n" for number in range(SHOWN + 2))
    paths = [let(hand, two, "ours\n"), let(hand, heads, long)]
    put(hand.store.folder(two) / "failure.json", {"error": "OSError: no space"})
    assert shown(hand).split("\n")[:4] == [
        f"trial-00 stage 1/3 layers 0 ({short(two)}), failed: OSError: no space",
        paths[0],
        "ours",
        "",
    ]
    assert shown(hand).split("\n")[4:8] == [
        f"evaluation of trial-02 stage 1/3 layers 0 ({short(heads)}), begun",
        paths[1],
        f"[the last {SHOWN} of {SHOWN + 2} lines]",
        "line 2",
    ]


def test_a_stage_of_a_trial_with_all_that_is_measured_of_it(hand: Hand) -> None:
    hand.finish("heads joint")
    step = hand.steps["heads joint"]
    paths = [let(hand, key, "all of it\n" * 100) for key in (step.train.key, step.evaluate.key)]
    for name in ("trial-02:3", "trial-02:joint"):
        told = shown(hand, name).split("\n")
        assert [line for line in told if line.startswith("/")] == paths
        assert told.count("all of it") == 200
    assert shown(hand, step.train.key[:5]).startswith(f"trial-02 joint layers 0,1 ({short(step.train.key)}), finished")


def test_a_stage_of_no_study_by_its_key(hand: Hand) -> None:
    key = "ab12" + "0" * 60
    path = let(hand, key, "of a task\n")
    assert shown(hand, "ab12") == f"{short(key)} ({short(key)}), begun\n{path}\nof a task"


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("trial-09:1", "trial-09:1: trial-09 is no trial: the study has trial-00 to trial-02"),
        ("trial-00:7", "trial-00:7: trial-00 has the stages 1 to 3, the last of them joint"),
        ("trial-00:1", "trial-00:1: trial-00 stage 1/3 layers 0 has no log: it has not begun"),
        ("abc", "abc: give at least 4 digits of a stage key, or trial-03:2"),
        ("zzzz", "zzzz: no stage begins so: layerswap status lists them; of a trial write trial-03:2"),
        ("ab12", "ab12: 2 stages begin so: give more digits"),
    ],
)
def test_what_names_no_log_is_an_error(hand: Hand, stage: str, told: str) -> None:
    for digit in "34":
        let(hand, "ab12" + digit * 60, "")
    with pytest.raises(ValueError, match=f"^{told}$"):
        shown(hand, stage)


def test_a_stage_from_elsewhere_has_no_log(hand: Hand) -> None:
    hand.finish("two 0")
    with pytest.raises(ValueError, match="has no log: its files came from elsewhere, or are older than logs"):
        shown(hand, "trial-00:1")
