"""Which measurements stand for which stages: what is like them, what is near, and what says nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import read_json, sealed, unsealed
from orchestrator.record.screen.estimate import estimate
from orchestrator.record.screen.plan_view import plan_text
from orchestrator.run.hardware import machine
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan, throughput_specs
from orchestrator.study.sources import resolve
from tests.record.handmade import Hand, put
from tests.record.test_told_plan import span, with_measures

BARE = "controls={skip: false, scratch: none}"


def of(hand: Hand, *overrides: str) -> dict[str, Any]:
    """The estimate of the study with other values, in the same store."""
    other = Hand(hand.file.parent, *overrides)
    return estimate(other.plan, hand.store, other.speeds, 2)


def on_a_gpu(hand: Hand, *overrides: str) -> Plan:
    document = read_document(hand.file, overrides)
    study = validate(document)
    return make_plan(document, study, resolve(study, hand.file.parent), "cuda")


@pytest.mark.parametrize(
    "change",
    [
        "seed=1", "recipe.optimizer.lr=0.1", "recipe.joint.0.tokens=640", "recipe.joint.0.losses={ce: 0.5}",
        "recipe.text_tokens=64", "schedule.layer_order=top_down", "operator.init=random", "teacher.tokens=3_200",
        "recipe.optimizer.rest_scale=0.5",
    ],
)  # fmt: skip
def test_what_costs_the_same_is_estimated_by_it(hand: Hand, change: str) -> None:
    found = of(with_measures(hand), BARE, change)
    assert (found["near"], found["unknown"]) == ([], [])
    assert found["unit_seconds"][0] == found["unit_seconds"][1] > 0


@pytest.mark.parametrize(
    "change",
    [
        "recipe.batch_size=4", "numerics.dtype=bfloat16", "numerics.threads=2", "operator.order=3",
        "recipe.checkpoint_activations=true", "recipe.optimizer.method=adamw", "recipe.optimizer.rest_scale=0",
        "recipe.freeze=['*embed*']", "recipe.phases.0.losses={mixer_mse: 1.0}", "teacher.hidden=32",
    ],
)  # fmt: skip
def test_what_costs_something_else_is_told_as_a_range(hand: Hand, change: str) -> None:
    found = of(with_measures(hand), BARE, change)
    assert "distil" in found["near"]
    assert found["unit_seconds"][0] < found["unit_seconds"][1]


def test_other_lengths_are_told_as_a_range_and_other_text_is_unknown(hand: Hand) -> None:
    found = of(with_measures(hand), BARE, "data.sequence_length=16")
    assert (found["near"], found["unknown"]) == (["distil", "evaluate", "teacher", "throughput", "tokens"], [])
    (hand.file.parent / "other.txt").write_text("another text")
    found = of(hand, BARE, "data.train.files=[other.txt]")
    assert (found["near"], found["unknown"]) == ([], ["tokens"])


def test_another_model_is_told_by_its_parameters(hand: Hand) -> None:
    """Measured: a teacher of 5,000 parameters at 80 tokens/s with 3 s beside, of 4 MB."""
    hand.text()
    hand.train("teacher", seconds=23.0, rate=80.0)
    hand.weigh(hand.key("teacher"), 4 * 2**20)
    hand.evaluate("teacher", seconds=9.0)
    other = Hand(hand.file.parent, BARE, "teacher.hidden=32")
    larger = other.plan.sizes.parameters / 5_000
    assert larger > 8
    distil, trials = [(160, 4), (320, 3)], 4 + 3
    trained = (1_600 + sum(tokens * count for tokens, count in distil)) / 80 + 3 * (1 + trials)
    evaluated = 9.0 * other.plan.sizes.parameters / 6_000 * (1 + trials)
    found = estimate(other.plan, hand.store, {}, 1)
    assert found["near"] == ["distil", "evaluate", "teacher"]
    assert found["unit_seconds"] == span((trained * larger + evaluated) / 3, (trained * larger + evaluated) * 3)


def test_measurements_are_near_in_proportion_to_what_they_measure(hand: Hand) -> None:
    """Of this model an evaluation took 2 s: of four times the tokens 8 s, in half to twice of that."""
    hand.all_done()
    found = of(hand, BARE, "evaluation.tokens=256")
    assert found["near"] == ["evaluate"]
    assert found["unit_seconds"] == span(8 * 8 / 2, 8 * 8 * 2)


@pytest.mark.parametrize("told", ["elsewhere", None])
def test_another_machine_says_nothing_of_this_one(hand: Hand, told: str | None) -> None:
    with_measures(hand)
    for key in hand.store.all_keys():
        done = unsealed(read_json(hand.store.folder(key) / "DONE.json"))
        rest = {name: value for name, value in done.items() if name not in ("machine", "digest")}
        put(hand.store.folder(key) / "DONE.json", sealed(rest if told is None else {**rest, "machine": told}))
    found = estimate(hand.plan, hand.store, hand.speeds, 2)
    assert found["wall_seconds"] is None
    assert (found["near"], found["unknown"]) == ([], ["distil", "evaluate", "scratch", "skip", "throughput"])
    there = estimate(hand.plan, hand.store, hand.speeds, 2, lambda _: "elsewhere")
    assert (there["wall_seconds"] is None) is (told is None)


def test_the_cpu_says_nothing_of_a_gpu(hand: Hand) -> None:
    with_measures(hand)
    plan = on_a_gpu(hand)
    found = estimate(plan, hand.store, throughput_specs(plan, "test, on it"), 1)
    assert found["wall_seconds"] is None
    assert found["unknown"] == ["distil", "evaluate", "scratch", "skip", "teacher", "throughput"]
    assert "time and disk are unknown" in plan_text(plan, hand.store, {})


def test_stages_on_a_gpu_take_one_for_each_of_their_processes(hand: Hand) -> None:
    """Left are two order-2 stages of 160 and 320 tokens at 40 tokens/s on two GPUs, and one of another loss."""
    changes = (BARE, "numerics.world_size=2", "numerics.threads=4", "evaluation.prompts=0")
    plan = on_a_gpu(hand, *changes)
    hand.text()
    for spec in plan.specs.values():
        if spec.key == plan.trials[0].steps[0].train.key or getattr(spec, "kind", "") in ("teacher", "evaluate"):
            result = {"seconds": 4.0, "tokens": 160, "tokens_per_s": 40.0, "resumed_at": 0, "parameters": 5_000}
            hand.write(spec, {} if spec.kind == "evaluate" else result, seconds=4.0)  # type: ignore[attr-defined]
            done = unsealed(read_json(hand.store.folder(spec.key) / "DONE.json"))
            put(
                hand.store.folder(spec.key) / "DONE.json",
                sealed({name: value for name, value in done.items() if name != "digest"} | {"machine": "a card"}),
            )
    found = estimate(plan, hand.store, {}, 4, lambda device: "a card" if device == "cuda" else machine(device))
    two, heads = 4 + 8 + 8, 4 + 4 + 8
    assert found["unit_seconds"] == span(2 * (two + heads / 2), 2 * (two + heads * 2))
    assert (found["device"], found["units"], found["near"], found["unknown"]) == ("cuda", 4, ["distil"], [])


def test_what_cannot_be_read_says_nothing(hand: Hand) -> None:
    with_measures(hand)
    spec = hand.store.folder(hand.key("heads 0")) / "spec.json"
    spec.write_text(spec.read_text().replace('"kind":"distil"', '"kind":"earlier"'))
    found = of(hand, BARE, "search.space=[{operator: [{kind: hyena, heads: 2}], seed: [0]}, {seed: [0, 1]}]")
    assert found["near"] == ["distil"]


def test_a_machine_is_told_by_what_computes_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from orchestrator.run import hardware

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    told = machine.__wrapped__
    assert told("cuda") == f"a card, torch {torch.__version__}"
    assert told("cpu") == f"{hardware.hardware().split(',')[0]}, torch {torch.__version__}"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert told("cuda") == f"no accelerator, torch {torch.__version__}"
