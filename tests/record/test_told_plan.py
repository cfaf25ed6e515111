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
    """A store in which every kind of stage but `scratch` was measured.

    Rates: teacher 80, distil 40 and 20 (30 in the middle) tokens/s. Seconds beside the training: teacher 23 - 20 = 3,
    distil 10 - 4 = 6 and 10 - 8 = 2 (4 in the middle), skip 1.5, text 7, evaluations 2, 2, 9 and 2, measurement 5.
    """
    hand.text(seconds=7.0)
    hand.train("teacher", seconds=23.0, rate=80.0)
    hand.train("two 0", seconds=10.0, rate=40.0)
    hand.train("heads 0", seconds=10.0, rate=20.0)
    hand.train("skip 0", seconds=1.5)
    for name, seconds in {"teacher": 2.0, "two 0": 2.0, "heads 0": 9.0, "skip 0": 2.0}.items():
        hand.evaluate(name, seconds=seconds)
        hand.weigh(hand.steps[name].evaluate.key, MB // 2)
    hand.measure("two 0")
    sizes = {"teacher": 4, "two 0": 3, "heads 0": 1, "skip 0": 1}
    for name, size in sizes.items():
        hand.weigh(hand.key(name), size * MB)
    hand.weigh(hand.speeds[hand.key("two 0")].key, MB // 4)
    return hand


def test_the_estimate_is_the_measured_rates_times_what_is_left(measured: Hand) -> None:
    """What is left, in seconds: two 1 and heads 1 of 160 / 30 + 4 = 9.33, three joint ones of 320 / 30 + 4 = 14.67,
    scratch 640 / 30 = 21.33 at the slowest rate, two skips of 1.5, eight evaluations of 2: together 103; seven
    measurements of 5. The longest chain: 9.33 + 14.67 + 2 = 26.
    """
    found = estimate(measured.plan, measured.store, measured.speeds, 2)
    assert found == {
        "wall_seconds": pytest.approx(103 / 2 + 35),
        "core_seconds": pytest.approx(103 + 35),
        "cores": 2,
        "megabytes": pytest.approx(5 * 2 + 2 * 1 + 8 * 0.5 + 7 * 0.25),
        "unmeasured": ["scratch"],
    }
    many = estimate(measured.plan, measured.store, measured.speeds, 8)
    assert many is not None and many["wall_seconds"] == pytest.approx(26 + 35)


def test_a_resumed_stage_tells_its_rate_and_not_what_it_took_beside(measured: Hand) -> None:
    told = measured.store.result(measured.key("two 0")) | {"resumed_at": 5}
    measured.write(measured.steps["two 0"].train, told, seconds=1.0)
    found = estimate(measured.plan, measured.store, measured.speeds, 2)
    assert found is not None and found["core_seconds"] == pytest.approx(103 + 35 - 5 * 2)  # beside: 2 s, of heads 0


def test_a_stage_of_more_cores_costs_more_core_time(tmp_path: Path) -> None:
    """Six stages of three cores at 40 tokens/s, 4 s for each 160 tokens, six beside; the rest was not measured."""
    hand = Hand(tmp_path, "numerics.threads=3", "controls={skip: false, scratch: none}")
    hand.text()
    hand.train("teacher", seconds=40.0)
    hand.train("two 0", seconds=10.0)
    found = estimate(hand.plan, hand.store, {}, 4)
    assert found is not None
    assert found["core_seconds"] == pytest.approx(3 * (3 * (4 + 6) + 3 * (8 + 6)))
    assert found["wall_seconds"] == pytest.approx(3 * 72 / 4)
    assert found["unmeasured"] == ["evaluate"]
    ranks = Hand(tmp_path, "numerics.world_size=2", "controls={skip: false, scratch: none}")
    ranks.train("two 0", seconds=10.0)
    found = estimate(ranks.plan, ranks.store, {}, 4)
    assert found is not None
    assert found["core_seconds"] == pytest.approx(2 * (72 + 1_600 / 40))  # this teacher too is of two processes


def test_without_a_rate_there_is_no_estimate(hand: Hand) -> None:
    hand.text()
    hand.finish("skip 0")
    assert estimate(hand.plan, hand.store, hand.speeds, 2) is None
    hand.train("two 0")
    assert estimate(hand.plan, hand.store, hand.speeds, 2) is not None


def test_when_all_is_there_nothing_is_left(hand: Hand, two_cores: None) -> None:
    hand.all_done()
    nothing = {"wall_seconds": 0.0, "core_seconds": 0.0, "cores": 3, "megabytes": 0.0, "unmeasured": []}
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
        "to do: 3840 tokens to train; time and disk are not known yet: no stage was measured in this store",
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
        "to do: 1760 tokens to train; about 78 s on 2 cores (2 min of core time), 16 MB",
        "       (not measured in this store yet: scratch)",
    ]


def test_the_summary_for_scripts(measured: Hand, two_cores: None) -> None:
    told = plan_summary(measured.plan, measured.store, measured.speeds)
    tree, memory = told.pop("tree"), told.pop("memory")
    assert memory[measured.key("two 1")] == {"kind": "distil", "name": "hyena-2 in layers 0, 1", "megabytes": 661}
    assert told == {
        "study": "handmade", "trials": 3, "stages": 9, "distinct": 7, "done": 2, "sharing": 9 / 7, "tokens": 1_920,
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
    """At 40 tokens/s, left are 25,000 s of the teacher, three times 4 s and three times 250.4 s: 25,763 s, of which a
    path of 25,258 s in a row.
    """
    changes = ("teacher.tokens=1_000_000", "recipe.joint.0.tokens=10_016", "controls={skip: false, scratch: none}")
    hand = Hand(tmp_path, *changes)
    lines = plan_text(hand.plan, hand.store, {}).splitlines()
    assert lines[2] == "teacher  2 layers, 1.00 M tokens"
    assert lines[3].endswith("  320") and all("  10 k  trial-0" in line for line in lines[4:7])
    assert lines[7] == "controls: none"
    hand.train("two 0", seconds=4.0)
    said = plan_text(hand.plan, hand.store, {}).splitlines()[-2]
    assert said.startswith("to do: 1.03 M tokens to train; about 421 min on 2 cores (429 min of core time), ")


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
