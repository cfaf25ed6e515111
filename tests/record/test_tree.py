"""The tree of a run on a terminal: every line of a frame by hand, and every size of a frame by its rules."""

from __future__ import annotations

import pytest

from orchestrator.record.screen.facts import Facts, Stage
from orchestrator.record.screen.tree import FANCY, PLAIN, Branch, Tree, _item
from tests.record.handmade import Hand

NOW = 500.0
TIMES = ("  8:20", "about 4 min left")


def facts_of(hand: Hand) -> Facts:
    """The teacher and two stages are done, one trains, one is evaluated, one has failed, one probe of speed runs."""
    keys = [*hand.plan.specs, *(spec.key for spec in hand.speeds.values())]
    found: Facts = {key: Stage() for key in keys}
    found[hand.plan.tokens.key] = Stage("done")
    for name in ("teacher", "two 0", "skip 0"):
        found |= {hand.key(name): Stage("done"), hand.steps[name].evaluate.key: Stage("done")}
    found[hand.key("two 1")] = Stage("done")
    found[hand.steps["two 1"].evaluate.key] = Stage("running", since=NOW - 7, memory_mb=512.4)
    found[hand.key("heads 0")] = Stage(
        "running", since=0.0, tokens=80, points=((80, 1_234.5),), losses={"kl": 0.5, "total": 0.5}, memory_mb=1_024.0
    )
    found[hand.key("scratch")] = Stage("failed", error="NonFiniteLoss: step 4")
    found[hand.speeds[hand.key("two 0")].key] = Stage("running", since=NOW - 61)
    return found


def lines(hand: Hand, width: int, height: int, facts: Facts | None = None, signs: object = FANCY) -> list[str]:
    tree = Tree(hand.plan, hand.speeds, signs)  # type: ignore[arg-type]
    return [line.plain for line in tree.frame(facts or facts_of(hand), TIMES, NOW, (width, height))]


def test_a_frame_with_room_for_all(hand: Hand) -> None:
    bar = "━" * 15 + "─" * 15
    assert lines(hand, 100, 40) == [
        "handmade  3 of 12 stages done · 2 running · 1 failed · 6 waiting",
        "teacher ✓",
        "├─ hyena-2  0 ✓ → 1 ▸",
        "│  ▸ evaluation of layers 1  0:07  512 MB",
        "│  ├─ joint  trial-00",
        "│  └─ joint  trial-01",
        "└─ hyena-2h  0 ▸ → 1 → joint  trial-02",
        f"   ▸ layers 0  {bar}  50%  1,234 tokens/s  kl 0.500  1,024 MB",
        "controls  scratch hyena-2 ✗  skip 0 ✓  skip 1  skip all",
        "  ✗ scratch hyena-2: NonFiniteLoss: step 4",
        "speeds 0 of 7",
        "  ▸ speed of hyena-2 layers 0  1:01",
        "[  8:20] about 4 min left",
    ]


def test_a_low_terminal_has_what_runs_and_failed_and_counts_the_rest(hand: Hand) -> None:
    assert lines(hand, 100, 8) == [
        "handmade  3 of 12 stages done · 2 running · 1 failed · 6 waiting",
        "├─ hyena-2  0 ✓ → 1 ▸",
        "│  ▸ evaluation of layers 1  0:07  512 MB",
        f"   ▸ layers 0  {'━' * 15}{'─' * 15}  50%  1,234 tokens/s  kl 0.500  1,024 MB",
        "  ✗ scratch hyena-2: NonFiniteLoss: step 4",
        "  ▸ speed of hyena-2 layers 0  1:01",
        "… 2 done, 6 waiting",
        "[  8:20] about 4 min left",
    ]
    assert lines(hand, 100, 4) == [
        "handmade  3 of 12 stages done · 2 running · 1 failed · 6 waiting",
        "│  ▸ evaluation of layers 1  0:07  512 MB",
        "… 3 done, 2 running, 1 failed, 6 waiting",
        "[  8:20] about 4 min left",
    ]
    assert lines(hand, 100, 1) == ["[  8:20] about 4 min left"]


@pytest.mark.parametrize("signs", [FANCY, PLAIN])
def test_no_frame_is_larger_than_the_terminal_and_the_time_left_is_in_all(hand: Hand, signs: object) -> None:
    for width in (1, 10, 20, 40, 60, 80, 200):
        for height in (1, 2, 3, 5, 8, 12, 13, 14, 50):
            found = lines(hand, width, height, signs=signs)
            assert len(found) <= height and max(map(len, found)) <= width
            assert found[-1].startswith("[  8:20] about 4 min left"[: max(0, width - 3)])


def test_a_narrow_terminal_drops_the_least_first(hand: Hand) -> None:
    def row(width: int) -> str:
        return lines(hand, width, 40)[7]

    ten, twenty = "━" * 5 + "─" * 5, "━" * 10 + "─" * 10
    assert row(70) == f"   ▸ layers 0  {ten}  50%  1,234 tokens/s  kl 0.500  1,024 MB"
    assert row(60) == f"   ▸ layers 0  {ten}  50%  1,234 tokens/s  kl 0.500"
    assert row(50) == f"   ▸ layers 0  {ten}  50%  1,234 tokens/s"
    assert row(40) == f"   ▸ layers 0  {twenty}  50%"
    assert row(22) == "   ▸ layers 0   50%"
    assert row(12) == "   ▸ layers…"
    assert lines(hand, 45, 40)[0] == "3 of 12 stages done · 2 running · 1 failed"


def test_a_path_too_wide_counts_steps_that_are_alike(hand: Hand) -> None:
    steps = ("teacher", "two 0", "two 1", "skip 0", "skip 1", "skip all")
    items = tuple(_item(str(place), hand.steps[name]) for place, name in enumerate(steps))
    facts = {key: Stage() for key in hand.plan.specs}
    for name in steps[:3]:
        facts |= {hand.key(name): Stage("done"), hand.steps[name].evaluate.key: Stage("done")}
    facts[hand.key("skip 0")] = Stage("running")
    tree, branch = Tree(hand.plan, {}), Branch("└─ ", "   ", "hyena", items, "trial-00")
    assert tree._line(branch, facts, 60).plain == "└─ hyena  0 ✓ → 1 ✓ → 2 ✓ → 3 ▸ → 4 → 5  trial-00"
    assert tree._line(branch, facts, 42).plain == "└─ hyena  0 ✓ → 1 ✓ → 2 ✓ → 3 ▸ → 4 → 5"
    assert tree._line(branch, facts, 38).plain == "└─ hyena  3 steps ✓ → 3 ▸ → 2 steps"


def test_without_unicode_all_signs_are_ascii(hand: Hand) -> None:
    assert all(line.isascii() for size in (30, 100) for line in lines(hand, size, 40, signs=PLAIN))
    assert "|- hyena-2  0 + > 1 >" in lines(hand, 100, 40, signs=PLAIN)


def test_a_cause_of_many_lines_stays_on_its_own(hand: Hand) -> None:
    facts = facts_of(hand)
    facts[hand.key("scratch")] = Stage("failed", error="ValueError: one\n  two\n")
    assert lines(hand, 100, 40, facts)[9] == "  ✗ scratch hyena-2: ValueError: one two"


def test_a_trial_that_is_a_control_too_is_counted_once(hand: Hand) -> None:
    tree = Tree(hand.plan, hand.speeds)
    tree.branches.append(tree.branches[-1])
    assert tree._first(facts_of(hand), 100).plain.startswith("handmade  3 of 12 stages done")
