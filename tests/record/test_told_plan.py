"""What `plan`, `status` and `gc` say of a store with known numbers, word by word, and the estimate by arithmetic."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from orchestrator.record.screen.estimate import estimate
from orchestrator.record.screen.plan_view import gc_text, plan_summary, plan_text, status_text
from orchestrator.study.spec import ImportSpec, short
from tests.record.handmade import Hand, put

MB = 2**20


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.fixture
def measured(hand: Hand) -> Hand:
    return with_measures(hand)


def with_measures(hand: Hand) -> Hand:
    """A store in which every kind of stage but `scratch` was measured, of both operators.

    Rates: teacher 80, order 2 40 and two heads 20 tokens/s. Seconds beside the training: teacher 23 - 20 = 3, order 2
    10 - 4 = 6, two heads 10 - 8 = 2, skip 1.5, text 7, evaluations 2, 2, 9 and 2, measurements 5.
    """
    hand.text(seconds=7.0)
    hand.train("teacher", seconds=23.0, rate=80.0)
    hand.train("two 0", seconds=10.0, rate=40.0)
    hand.train("heads 0", seconds=10.0, rate=20.0)
    hand.train("skip 0", seconds=1.5)
    for name, seconds in {"teacher": 2.0, "two 0": 2.0, "heads 0": 9.0, "skip 0": 2.0}.items():
        hand.evaluate(name, seconds=seconds)
        hand.weigh(hand.steps[name].evaluate.key, MB // 2)
    hand.measure("two 0", "heads 0", "skip 0")
    sizes = {"teacher": 4, "two 0": 3, "heads 0": 1, "skip 0": 1}
    for name, size in sizes.items():
        hand.weigh(hand.key(name), size * MB)
    for name in ("two 0", "heads 0", "skip 0"):
        hand.weigh(hand.speeds[hand.key(name)].key, MB // 4)
    return hand


def span(least: float, most: float) -> Any:
    """From the least to the most, which tests have worked out."""
    return (pytest.approx(least), pytest.approx(most))


def test_the_estimate_is_the_measured_rates_times_what_is_left(measured: Hand) -> None:
    """What is left, in seconds: two 1 of 160 / 40 + 6 = 10, two joint ones of 320 / 40 + 6 = 14, heads 1 of 160 / 20 +
    2 = 10, their joint one of 320 / 20 + 2 = 18, two skips of 1.5, six evaluations of 2 and two of 9: together 99. Of
    scratch nothing was measured: other training of this model gives 640 / 80 + 3 = 11, 640 / 40 + 6 = 22 or
    640 / 20 + 2 = 34, so 5.5 to 68. Four measurements of 5. The longest chains: heads with 10 + 18 + 9 = 37, scratch
    with 68 + 2 = 70.
    """
    found = estimate(measured.plan, measured.store, measured.speeds, 2)
    assert found == {
        "wall_seconds": span(104.5 / 2 + 20, 167 / 2 + 20),
        "unit_seconds": span(104.5 + 20, 167 + 20),
        "megabytes": span(3 * 3 + 4 * 1 + 8 / 2 + 4 / 4 + 1 / 2, 3 * 3 + 4 * 1 + 8 / 2 + 4 / 4 + 4 * 2),
        "device": "cpu",
        "units": 2,
        "near": ["scratch"],
        "unknown": [],
    }
    many = estimate(measured.plan, measured.store, measured.speeds, 8)
    assert many["wall_seconds"] == span(37 + 20, 70 + 20)


def test_a_resumed_stage_tells_its_rate_and_not_what_it_took_beside(measured: Hand) -> None:
    told = measured.store.result(measured.key("two 0")) | {"resumed_at": 5}
    measured.write(measured.steps["two 0"].train, told, seconds=1.0)
    found = estimate(measured.plan, measured.store, measured.speeds, 2)
    assert found["unit_seconds"] == span(104.5 + 20 - 3 * 6, 167 + 20 - 3 * 6)  # three stages of its sort


def test_a_stage_of_more_cores_costs_more_core_time(tmp_path: Path) -> None:
    """At 40 tokens/s with 6 s beside: 10 + 14 + 14 s. Heads: half of 160 / 40 without, to twice 160 / 40 + 6 s."""
    hand = Hand(tmp_path, "numerics.threads=3", "controls={skip: false, scratch: none}")
    hand.text()
    hand.train("teacher", seconds=40.0)
    hand.train("two 0", seconds=10.0)
    found = estimate(hand.plan, hand.store, {}, 4)
    assert found["unit_seconds"] == span(3 * (38 + 2 + 2 + 4), 3 * (38 + 20 + 20 + 28))
    assert found["wall_seconds"] == span(3 * 46 / 4, 3 * 106 / 4)
    assert (found["near"], found["unknown"]) == (["distil"], ["evaluate"])
    ranks = Hand(tmp_path, "numerics.world_size=2", "controls={skip: false, scratch: none}")
    ranks.train("two 0", seconds=10.0)
    found = estimate(ranks.plan, ranks.store, {}, 4)
    assert found["unit_seconds"] == span(2 * (46 + 20), 2 * (106 + 92))  # this teacher too is of two processes


def test_where_nothing_like_a_stage_that_trains_was_measured_there_is_no_number(hand: Hand) -> None:
    hand.text()
    hand.finish("skip 0")
    found = estimate(hand.plan, hand.store, hand.speeds, 2)
    assert (found["wall_seconds"], found["unit_seconds"], found["megabytes"]) == (None, None, None)
    assert found["unknown"] == ["distil", "scratch", "teacher", "throughput"]
    hand.train("two 0")
    found = estimate(hand.plan, hand.store, hand.speeds, 2)
    assert found["wall_seconds"] is not None
    assert (found["near"], found["unknown"]) == (["distil", "evaluate", "scratch", "teacher"], ["throughput"])


def test_when_all_is_there_nothing_is_left(hand: Hand, two_cores: None) -> None:
    hand.all_done()
    none = dict.fromkeys(("wall_seconds", "unit_seconds", "megabytes"), (0.0, 0.0))
    nothing = {**none, "device": "cpu", "units": 3, "near": [], "unknown": []}
    assert estimate(hand.plan, hand.store, hand.speeds, 3) == nothing
    lines = plan_text(hand.plan, hand.store, hand.speeds).splitlines()
    assert lines[-2:] == ["in the store: 7 of them; with teacher and controls 12 of 12", "to do: nothing"]
    (hand.store.folder(hand.speeds[hand.key("two 0")].key) / "DONE.json").unlink()
    last = plan_text(hand.plan, hand.store, hand.speeds).splitlines()[-1]
    assert last == "to do: 0 tokens to train; about 5 s on 2 cores (5 s of core time), 0 MB"


def test_the_plan_of_an_empty_store_word_by_word(hand: Hand) -> None:
    assert plan_text(hand.plan, hand.store, hand.speeds).splitlines() == [
        "handmade: Which of two operators costs less?",
        "",
        "teacher  2 layers, 1600 tokens",
        "├─ hyena-2  0 → 1           320",
        "│  ├─ joint                 320  trial-00  losses=kl:1.0",
        "│  └─ joint                 320  trial-01  losses=kl:1.0,ce:0.5",
        "└─ hyena-2h  0 → 1 → joint  640  trial-02  operator=hyena-2h",
        "controls: scratch hyena-2, skip (3)",
        "",
        "3 trials ask for 9 stages, 7 distinct: sharing factor 1.29 in stages, 1.20 in tokens",
        "in the store: 0 of them; with teacher and controls 0 of 12",
        "memory of a stage: teacher 660 MB, evaluate 660 MB, throughput 660 MB, scratch 661 MB, distil 660-661 MB",
        "to do: 3840 tokens to train; time and disk are unknown: nothing like it was measured here",
        "       (unknown: distil, evaluate, scratch, skip, teacher, throughput, tokens)",
    ]


def test_the_plan_of_a_measured_store_word_by_word(measured: Hand, two_cores: None) -> None:
    measured.attempt(measured.key("two 1"))
    measured.train("heads 1")  # not evaluated
    measured.weigh(measured.key("heads 1"), 2 * MB)
    lines = plan_text(measured.plan, measured.store, measured.speeds).splitlines()
    assert lines[2:7] == [
        "teacher  2 layers, 1600 tokens ✓",
        "├─ hyena-2  0 ✓ → 1 …           320",
        "│  ├─ joint                     320  trial-00  losses=kl:1.0",
        "│  └─ joint                     320  trial-01  losses=kl:1.0,ce:0.5",
        "└─ hyena-2h  0 ✓ → 1 … → joint  640  trial-02  operator=hyena-2h",
    ]
    # Rates of 20, 40 and 40: the middle is 40. Beside: 2, 6 and 6. Left are two 1, 4 + 6 s; three joint ones, 8 + 6;
    # scratch, 16; two skips, 3; eight evaluations, 16; together 87 s; seven measurements, 35. 8 + 2 + 4 + 1.75 MB.
    assert lines[-4:] == [
        "in the store: 3 of them; with teacher and controls 4 of 12",
        "memory of a stage: throughput 660 MB, scratch 661 MB, evaluate 660 MB, distil 660-661 MB",
        "to do: 1760 tokens to train; about 66 s to 2 min on 2 cores (2 min to 3 min of core time), 18 MB to 26 MB",
        "       (by what others took, other models, operators, losses or lengths: scratch)",
    ]


def test_trials_that_are_one_path_are_counted_once_and_told(tmp_path: Path) -> None:
    hand = Hand(tmp_path, "search.space.1.operator=[{kind: hyena, order: 2}]")  # as the study's own
    lines = plan_text(hand.plan, hand.store, {}).splitlines()
    assert lines[3:8] == [
        "└─ hyena-2  0 → 1  320",
        "   ├─ joint        320  trial-00, trial-02  losses=kl:1.0",
        "   └─ joint        320  trial-01            losses=kl:1.0,ce:0.5",
        "controls: scratch hyena-2, skip (3)",
        "note: trial-00, trial-02 are one path, whose values mean the same: it is computed once",
    ]
    assert lines[9].startswith("3 trials of 2 different paths ask for 6 stages, 4 distinct: sharing factor 1.50 in")
    told = plan_summary(hand.plan, hand.store, {})
    assert (told["trials"], told["paths"], told["stages"], told["tokens"]) == (3, 2, 6, 1_280)


def test_the_summary_for_scripts(measured: Hand, two_cores: None) -> None:
    told = plan_summary(measured.plan, measured.store, measured.speeds)
    tree, memory = told.pop("tree"), told.pop("memory")
    assert memory[measured.key("two 1")] == {"kind": "distil", "name": "hyena-2 in layers 0, 1", "megabytes": 661}
    assert told == {
        "study": "handmade", "trials": 3, "paths": 3, "notes": [], "later": {}, "most": 0,
        "stages": 9, "distinct": 7, "done": 2, "sharing": 9 / 7, "tokens": 1_920,
        "distinct_tokens": 1_600, "sharing_tokens": 1.2, "all_stages": 12, "all_done": 4, "tokens_to_train": 1_920,
        "estimate": estimate(measured.plan, measured.store, measured.speeds, 2),
        "controls": ["scratch hyena-2", "skip 0", "skip 1", "skip all"],
        "values": {
            "trial-00": {"recipe.joint.0.losses": {"kl": 1.0}},
            "trial-01": {"recipe.joint.0.losses": {"kl": 1.0, "ce": 0.5}},
            "trial-02": {"operator": {"kind": "hyena", "heads": 2}},
        },
        "words": {
            "trial-00": "losses=kl:1.0", "trial-01": "losses=kl:1.0,ce:0.5", "trial-02": "operator=hyena-2h",
        },
        "teacher": {"key": measured.key("teacher"), "tokens": 1_600, "state": "done"},
    }  # fmt: skip

    def node(name: str, layers: list[int], tokens: int, state: str, trials: int, *children: Any) -> dict[str, Any]:
        ends = {"two joint": ["trial-00"], "two mixed": ["trial-01"], "heads joint": ["trial-02"]}.get(name, [])
        return {
            "key": measured.key(name), "operator": "hyena-2h" if "heads" in name else "hyena-2", "layers": layers,
            "joint": bool(ends), "tokens": tokens, "trials": trials, "state": state, "ends": ends,
            "children": list(children),
        }  # fmt: skip

    ends = [node(name, [0, 1], 320, "new", 1) for name in ("two joint", "two mixed", "heads joint")]
    assert tree == [
        node("two 0", [0], 160, "done", 2, node("two 1", [1], 160, "new", 2, *ends[:2])),
        node("heads 0", [0], 160, "done", 1, node("heads 1", [1], 160, "new", 1, ends[2])),
    ]


def test_a_teacher_that_was_brought_has_no_tokens_of_its_own(hand: Hand) -> None:
    brought = dataclasses.replace(hand.plan.teacher, train=ImportSpec(fingerprint="f"))
    plan = dataclasses.replace(hand.plan, teacher=brought)
    assert plan_text(plan, hand.store, {}).splitlines()[2] == "teacher  2 layers"
    hand.write(brought.train, {})
    assert plan_text(plan, hand.store, {}).splitlines()[2] == "teacher  2 layers …"
    hand.evaluate("teacher")
    assert plan_text(plan, hand.store, {}).splitlines()[2] == "teacher  2 layers ✓"


def test_large_numbers_are_told_in_thousands_and_millions(tmp_path: Path, two_cores: None) -> None:
    """At 40 tokens/s, left are 4 s and twice 250.4 s; at least, since measured of another operator, half of 25,000 s of
    the teacher, of twice 4 s and of 250.4 s: 13,134 s, of which a path of 12,754 s in a row.
    """
    changes = ("teacher.tokens=1_000_000", "recipe.joint.0.tokens=10_016", "controls={skip: false, scratch: none}")
    hand = Hand(tmp_path, *changes)
    lines = plan_text(hand.plan, hand.store, {}).splitlines()
    assert lines[2] == "teacher  2 layers, 1.00 M tokens"
    assert lines[3].endswith("  320") and all("  10 k  trial-0" in line for line in lines[4:7])
    assert lines[7] == "controls: none"
    hand.train("two 0", seconds=4.0)
    said = plan_text(hand.plan, hand.store, {}).splitlines()[-3:]
    assert said[0].startswith("to do: 1.03 M tokens to train; at least 213 min on 2 cores (219 min of core time), ")
    assert said[1:] == [
        "       (by what others took, other models, operators, losses or lengths: distil, teacher)",
        "       (nothing like it was measured here, and it comes on top: evaluate, tokens)",
    ]


@pytest.mark.parametrize(
    ("layers", "told"), [((0,), "0"), ((0, 1), "0-1"), ((0, 2, 3, 4, 7), "0,2-4,7"), ((1, 3), "1,3"), ((), "")]
)
def test_layers_as_people_write_them(layers: tuple[int, ...], told: str) -> None:
    from orchestrator.record.screen.plan_view import layer_ranges

    assert layer_ranges(layers) == told


def test_status_is_a_line_a_stage(hand: Hand) -> None:
    hand.finish("teacher", "scratch")
    (hand.store.folder(hand.key("scratch")) / "DONE.json").unlink()  # withdrawn, for it was damaged
    hand.train("two 0")
    hand.attempt(hand.key("two 1"))
    hand.attempt(hand.key("heads 0"))
    hand.journal(hand.key("heads 0"), (3, 48, 1.0, {}), (6, 96, 2.0, {}))
    put(hand.store.folder(hand.key("skip 0")) / "failure.json", {"error": "OSError: no space"})
    put(hand.store.folder(hand.steps["skip 1"].evaluate.key) / "failure.json", {"error": "ArithmeticError: nan"})
    hand.finish("skip all")
    states = {
        "teacher": ("teacher", "finished, perplexity ratio 1.000"),
        "two 0": ("trial-00 stage 1/3 layers 0", "begun, 160 of 160 tokens"),
        "two 1": ("trial-00 stage 2/3 layers 1", "begun, 0 of 160 tokens"),
        "two joint": ("trial-00 joint layers 0,1", "not begun"),
        "two mixed": ("trial-01 joint layers 0,1", "not begun"),
        "heads 0": ("trial-02 stage 1/3 layers 0", "begun, 96 of 160 tokens"),
        "heads 1": ("trial-02 stage 2/3 layers 1", "not begun"),
        "heads joint": ("trial-02 joint layers 0,1", "not begun"),
        "scratch": ("control scratch hyena-2", "begun, 640 of 640 tokens"),
        "skip 0": ("control skip 0", "failed: OSError: no space"),
        "skip 1": ("control skip 1", "failed: ArithmeticError: nan"),
        "skip all": ("control skip all", "finished, perplexity ratio 8.000"),
    }
    told = [f"{short(hand.key(name))}  {shown:40} {state}" for name, (shown, state) in states.items()]
    assert status_text(hand.plan, hand.store).splitlines() == told


def test_garbage_in_megabytes_that_are_deleted_only_when_asked(hand: Hand) -> None:
    hand.finish("teacher", "two 0")
    hand.attempt(hand.key("heads 0"))
    sizes = {"teacher": 3 * MB, "two 0": 5 * MB // 2, "heads 0": 10 * MB}
    for name, size in sizes.items():
        hand.weigh(hand.key(name), size)
    kept = {hand.key("teacher"), *(step.evaluate.key for step in hand.steps.values())}
    line: Callable[[str, str], str] = lambda name, said: f"{short(hand.key(name))}  {said}"  # noqa: E731

    def told(delete: bool) -> list[str]:
        *lines, end = gc_text(hand.store, kept, delete).splitlines()
        return [*sorted(lines), end]

    both = [line("two 0", "     2.5 MB  finished"), line("heads 0", "    10.0 MB  unfinished")]
    total = "2 stages that no given study needs, 12.5 MB would be freed by --delete"
    assert told(delete=False) == [*sorted(both), total]
    assert hand.store.finished(hand.key("two 0"))
    with FileLock(hand.store.folder(hand.key("heads 0")) / "lock"):
        gone = [line("two 0", "     2.5 MB  deleted"), line("heads 0", "    10.0 MB  stays: it is being computed")]
        assert told(delete=True) == [*sorted(gone), "2 stages that no given study needs, 2.5 MB freed"]
    assert not hand.store.finished(hand.key("two 0"))
    assert hand.store.finished(hand.key("teacher"))
