"""Speeds of models whose cost is known: the clock stands still but for what they are known to take.

A model takes so many seconds a token in a forward of many, so many in a forward of one, so many in a backward; the
n-th turn of a measurement takes `TURNS[n]` times as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPTNeoXModel

from operators.config import HyenaConfig
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.measuring import throughput as module
from orchestrator.distill.models.swap import SwappedAttention
from orchestrator.distill.stage import run_stage
from orchestrator.study.recipe import Numerics
from orchestrator.study.schema import Throughput
from orchestrator.study.spec import ThroughputSpec

LENGTHS, DECODED, BATCH, REPEATS = (24, 40), 5, 2, 3
TRAIN_BATCH, TRAIN_LENGTH = 3, 12
SECONDS = {  # a token
    "teacher": {"many": 3.0, "one": 11.0, "backward": 7.0},
    "student": {"many": 2.0, "one": 4.0, "backward": 0.5},
}
WARM_UP = 1000.0
TURNS = {"teacher": (WARM_UP, 1.0, 5.0, 3.0), "student": (WARM_UP, 1.0, 1.0, 3.0)}
# by turn the ratios are 1, 5, 1 times that of the seconds, in the median 1; the medians of the turns are 3 and 1


class Clock:
    """A time that models move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turn = {"teacher": -1, "student": -1}
        self.before = ""
        self.forwards: list[tuple[str, tuple[int, ...]]] = []
        self.logits: set[int] = set()  # positions of a prompt that logits were made of

    def forward(self, model: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(model, torch.nn.Linear) and model.out_features == 300 and not output.requires_grad:
            self.logits.add(output.shape[1])
        if not isinstance(model, GPTNeoXModel):
            return
        who = "student" if any(isinstance(part, SwappedAttention) for part in model.modules()) else "teacher"
        if who != self.before:
            self.turn[who] += 1
        self.before = who
        hidden_BLD = output.last_hidden_state
        batch, length, _ = hidden_BLD.shape
        factor = TURNS[who][self.turn[who] % len(TURNS[who])]
        self.forwards.append((who, (batch, length)))
        tokens, seconds = factor * batch * length, SECONDS[who]
        self.pass_by(tokens * seconds["one" if length == 1 else "many"])
        if hidden_BLD.requires_grad:
            hidden_BLD.register_hook(lambda _: self.pass_by(tokens * seconds["backward"]))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def measured(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[dict[str, Any]]:
    spec = ThroughputSpec(
        teacher="r", operator=HyenaConfig(), layers=(1,), train_batch_size=TRAIN_BATCH, sequence_length=TRAIN_LENGTH,
        throughput=Throughput(lengths=LENGTHS, batch_size=BATCH, decode_tokens=DECODED, repeats=REPEATS),
        numerics=Numerics(), hardware="h",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("speed")
    place = Workplace({"teacher": tiny_teacher}, folder, folder, folder, RunContext(store=str(folder)), print)
    watching = torch.nn.modules.module.register_module_forward_hook(clock.forward)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
            yield run_stage(spec, place)
    finally:
        watching.remove()


def test_prefill_is_the_prompt_alone(measured: dict[str, Any]) -> None:
    for length in map(str, LENGTHS):
        assert measured["teacher_prefill_tokens_per_s"][length] == pytest.approx(1 / (3 * 3.0))
        assert measured["prefill_tokens_per_s"][length] == pytest.approx(1 / 2.0)
        assert measured["prefill_ratio"][length] == pytest.approx(3.0 / 2.0)


def test_decoding_is_the_new_tokens_alone(measured: dict[str, Any]) -> None:
    for length in map(str, LENGTHS):
        assert measured["teacher_decode_tokens_per_s"][length] == pytest.approx(1 / (3 * 11.0))
        assert measured["decode_tokens_per_s"][length] == pytest.approx(1 / 4.0)
        assert measured["decode_ratio"][length] == pytest.approx(11.0 / 4.0)


def test_turns_are_kept_with_the_interval_of_their_median(measured: dict[str, Any]) -> None:
    for length in map(str, LENGTHS):
        assert measured["prefill_turns"][length] == pytest.approx([1.5, 7.5, 1.5])
        assert measured["prefill_interval"][length] == pytest.approx([1.5, 7.5])
        assert measured["decode_interval"][length] == pytest.approx([2.75, 13.75])
    assert measured["train_turns"] == pytest.approx([4.0, 20.0, 4.0])
    assert measured["train_interval"] == pytest.approx([4.0, 20.0])


@pytest.mark.parametrize(
    ("asked", "pairs", "turns"),
    [
        (3, [(0.01, 0.01)] * 99, 9),  # cheap and alike: enough for an interval
        (12, [(0.01, 0.01)] * 99, 12),  # never fewer than asked for
        (3, [(0.01, 0.01), (0.02, 0.01)] * 99, 31),  # cheap and unlike: the most
        (3, [(0.1, 0.1), (0.2, 0.1)] * 99, 6),  # dear: 1.5 seconds are over
        (3, [(9.0, 9.0)] * 99, 3),
        (1, [(0.01, 0.01), (0.02, 0.01)] * 99, 1),  # a single one, however cheap
    ],
)
def test_turns_go_on_while_that_is_cheap_and_tells_more(
    monkeypatch: pytest.MonkeyPatch, asked: int, pairs: list[tuple[float, float]], turns: int
) -> None:
    now, left = [0.0], iter([(0.0, 0.0), *pairs])
    current: list[float] = []

    def timed(_: Any) -> float:
        if not current:
            current.extend(next(left))
        seconds = current.pop(0)
        now[0] += seconds
        return seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    told = module._compare(timed, 1, torch.nn.Identity(), torch.nn.Identity(), asked)
    assert len(told["{}_turns"]) == turns
    assert ("{}_interval" in told) is (turns > 1)


def test_training_is_forward_and_backward(measured: dict[str, Any]) -> None:
    assert measured["teacher_train_tokens_per_s"] == pytest.approx(1 / (3 * (3.0 + 7.0)))
    assert measured["train_tokens_per_s"] == pytest.approx(1 / (2.0 + 0.5))
    assert measured["train_ratio"] == pytest.approx((3.0 + 7.0) / (2.0 + 0.5))


def test_what_decoding_goes_on_from_is_counted(measured: dict[str, Any]) -> None:
    """Keys and values, 32 wide, of the teacher's three layers; of the student's two, and what its operator has."""
    for length in LENGTHS:
        layer = 2 * BATCH * length * 32 * 4 / 2**20
        assert measured["teacher_cache_mb"][str(length)] == pytest.approx(3 * layer, abs=1e-3)
        assert 2.5 * layer < measured["cache_mb"][str(length)] < 8 * layer  # a history of inputs, with room to grow


def test_both_models_see_what_the_study_asks_for_as_often(measured: dict[str, Any], clock: Clock) -> None:
    """A prompt of the whole length, then one that leaves room for the decoded tokens: no position beyond the length."""
    turns = 1 + REPEATS
    for who in ("teacher", "student"):
        seen = [shape for name, shape in clock.forwards if name == who]
        for length in LENGTHS:
            assert seen.count((BATCH, length)) == turns + 1  # once more for what its cache holds
            assert seen.count((BATCH, length - DECODED)) == turns
        assert seen.count((BATCH, 1)) == turns * DECODED * len(LENGTHS)
        memory = 1 if who == "student" else 0  # a step whose peak of memory is told
        assert seen.count((TRAIN_BATCH, TRAIN_LENGTH)) == turns + memory
        assert {shape for shape in seen if shape[0] != 1} == {
            *((BATCH, n) for n in LENGTHS), *((BATCH, n - DECODED) for n in LENGTHS), (BATCH, 1),
            (TRAIN_BATCH, TRAIN_LENGTH),
        }  # fmt: skip


def test_logits_of_a_prompt_are_those_of_its_last_position(measured: dict[str, Any], clock: Clock) -> None:
    assert clock.logits == {1}


@pytest.mark.parametrize(("length", "decoded"), [(97, 5), (5, 5)])
def test_a_length_that_leaves_no_prompt_or_is_too_long_is_refused(
    tiny_teacher: Path, tmp_path: Path, length: int, decoded: int
) -> None:
    settings = Throughput.model_construct(lengths=(length,), batch_size=1, decode_tokens=decoded, repeats=1)
    spec = ThroughputSpec.model_construct(
        kind="throughput", teacher="r", operator=HyenaConfig(), layers=(1,), train_batch_size=1, sequence_length=8,
        throughput=settings, numerics=Numerics(), hardware="h", rest_trains=True, freeze=(),
    )  # fmt: skip
    place = Workplace({"teacher": tiny_teacher}, tmp_path, tmp_path, tmp_path, RunContext(store=str(tmp_path)), print)
    told = f"throughput.lengths: {length} must exceed decode_tokens {decoded} and be at most the teacher's 96 positions"
    with pytest.raises(ValueError, match=told):
        run_stage(spec, place)
