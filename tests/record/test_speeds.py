"""Speeds that were measured once, again, or before turns were kept: what is told of them, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.answer.frames import times
from orchestrator.record.answer.verdict import legend
from orchestrator.record.records import make_records
from orchestrator.record.screen.plan_view import gc_text
from orchestrator.record.speeds import measured_again, measurements, next_round, speed_of, together
from orchestrator.run.sweep import missing
from orchestrator.study.spec import ThroughputSpec
from tests.record.handmade import Hand


def result(*turns: float, tokens: float = 100.0) -> dict[str, Any]:
    """A measurement of one length whose turns had these ratios, nine of each."""
    every, bounds = sorted(turns * 9), [turns[0], turns[-1]]
    middle = every[len(every) // 2]
    return {
        "core": "torch",
        "prefill_ratio": {"32": middle}, "prefill_turns": {"32": every}, "prefill_interval": {"32": bounds},
        "prefill_tokens_per_s": {"32": tokens},
        "train_ratio": middle, "train_turns": every, "train_interval": bounds, "train_tokens_per_s": tokens,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "bounds", "told"),
    [
        (1.64, None, "1.64x"),
        (1.64, (1.60, 1.69), "1.64 ± 0.05x"),  # the farther side
        (1.64, (1.59, 1.65), "1.64 ± 0.05x"),
        (0.50, (0.499, 0.501), "0.50 ± 0.01x"),  # never none
        (1.01, (0.99, 1.02), "same"),
        (0.97, (0.9, 1.0), "same"),
        (1.2, (1.0, 1.4), "same"),
        (0.97, (0.95, 0.99), "0.97 ± 0.02x"),
    ],
)
def test_a_ratio_is_told_with_its_interval(ratio: float, bounds: tuple[float, float] | None, told: str) -> None:
    assert times(ratio, bounds) == told


def test_one_measurement_is_itself_without_its_turns() -> None:
    assert together([]) == {}
    one = result(1.5)
    assert together([one]) == {name: value for name, value in one.items() if not name.endswith("_turns")}
    old = {"core": "torch", "prefill_ratio": {"32": 1.5}, "train_ratio": 0.8}
    assert together([old]) == old


def test_several_measurements_are_told_together() -> None:
    """The median of all turns; whole measurements are drawn, so what they differ by is in the interval."""
    told = together([result(1.4, tokens=100.0), result(1.6, tokens=110.0), result(1.5, tokens=150.0)])
    assert told["prefill_ratio"] == {"32": 1.5} and told["train_ratio"] == 1.5
    assert told["prefill_interval"]["32"] == pytest.approx([1.4, 1.6])
    assert told["train_interval"] == pytest.approx([1.4, 1.6])
    assert told["prefill_tokens_per_s"] == {"32": 110.0} and told["train_tokens_per_s"] == 110.0
    assert told["measurements"] == 3 and "prefill_turns" not in told


def test_a_result_from_before_turns_were_kept_counts_as_one_turn() -> None:
    old = {"core": "torch", "prefill_ratio": {"32": 9.0}}
    told = together([old, result(1.5)])
    assert told["prefill_ratio"] == {"32": 1.5}
    low, high = told["prefill_interval"]["32"]
    assert low == 1.5 and high == 9.0


@pytest.fixture
def measured(hand: Hand) -> tuple[Hand, ThroughputSpec]:
    hand.all_done()
    return hand, hand.speeds[hand.key("two 1")]


def test_records_tell_all_measurements_of_an_architecture(measured: tuple[Hand, ThroughputSpec]) -> None:
    hand, spec = measured
    hand.write(spec, result(1.4))
    hand.write(spec.changed(again=1), result(1.6))
    hand.write(spec.changed(again=3), result(9.9))  # what follows a gap is not counted
    assert measurements(hand.store, spec) == [spec, spec.changed(again=1)]
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    [joint] = [row for row in rows if row["name"] == "trial-00 joint"]
    assert joint["metrics"]["measurements"] == 2
    assert joint["metrics"]["prefill_interval"] == {"32": pytest.approx([1.4, 1.6])}
    assert legend(rows, "32").endswith("\nx: ± a 95 % interval of the turns measured; same: it holds 1.")
    assert speed_of(hand.store, hand.speeds[hand.key("heads 0")])["prefill_ratio"] == {"16": 0.65, "32": 1.3}


def test_the_first_measurement_has_the_key_that_it_always_had(measured: tuple[Hand, ThroughputSpec]) -> None:
    _, spec = measured
    assert "again" not in spec.model_dump_json() and spec.changed(again=0).key == spec.key
    assert '"again":1' in spec.changed(again=1).model_dump_json() and spec.changed(again=1).key != spec.key


def test_a_round_goes_on_where_the_last_was_interrupted(measured: tuple[Hand, ThroughputSpec]) -> None:
    hand, spec = measured
    first = next_round(hand.store, hand.speeds)
    assert first.keys() == hand.speeds.keys() and {each.again for each in first.values()} == {1}
    hand.write(spec.changed(again=1), result(1.5))
    rest = next_round(hand.store, hand.speeds)
    assert spec.changed(again=1) not in rest.values() and {each.again for each in rest.values()} == {1}
    for each in rest.values():
        hand.write(each, result(1.5))
    assert {each.again for each in next_round(hand.store, hand.speeds).values()} == {2}


def test_what_is_not_finished_is_not_measured(hand: Hand) -> None:
    assert next_round(hand.store, hand.speeds) == {}
    hand.finish("heads 0")
    assert list(next_round(hand.store, hand.speeds)) == [hand.key("heads 0")]


def test_later_measurements_are_kept_with_their_first(measured: tuple[Hand, ThroughputSpec], tmp_path: Path) -> None:
    hand, spec = measured
    hand.write(spec.changed(again=1), result(1.5))
    needed = {*hand.plan.specs, *(each.key for each in hand.speeds.values())}
    assert measured_again(hand.store, needed) == {spec.changed(again=1).key}
    assert gc_text(hand.store, needed, delete=True).startswith("0 stages that no given study needs")
    assert measured_again(hand.store, needed - {spec.key}) == set()
    assert missing(hand.plan, hand.store, hand.speeds, {}) == []
