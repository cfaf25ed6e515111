"""What a study is where it says nothing, and the last value on each side of every limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.recipe import Numerics
from orchestrator.study.schema import Study

BASE = "study: s\nrecipe: {phases: [{tokens: 9, losses: {ce: 1.0}}]}\n"
OPTIMIZER: dict[str, Any] = {
    "method": "muon", "matrix_lr": 0.01, "lr": 0.003, "rest_scale": 0.3, "weight_decay": 0.0, "betas": [0.9, 0.98],
    "gradient_clip": 1.0, "warmup": 0.05, "decay": 0.4,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "question": "", "seed": 0,
    "teacher": {
        "kind": "pretrain", "layers": 6, "hidden": 128, "heads": 4, "intermediate": None, "max_length": 1024,
        "tokens": 2_000_000, "batch_size": 8, "threads": 1,
        "optimizer": {**OPTIMIZER, "matrix_lr": 0.02, "rest_scale": 1.0, "weight_decay": 0.1},
    },
    "data": {
        "train": {"source": "python-stdlib"}, "validation": None, "validation_share": 0.05, "sequence_length": 256,
        "vocabulary": None,
    },
    "schedule": {"layer_order": "bottom_up", "layers_per_stage": 1, "keep": []},
    "recipe": {"joint": [], "batch_size": 4, "freeze": [], "checkpoint_activations": False, "optimizer": OPTIMIZER},
    "numerics": {
        "dtype": "float32", "matmul": "highest", "core": "torch", "threads": 1, "world_size": 1,
        "teacher_dtype": "float32",
    },
    "evaluation": {"tokens": 32_768, "batch_size": 16, "prompts": 16, "prompt_tokens": 64, "new_tokens": 32},
    "throughput": {"lengths": [256, 1024], "batch_size": 1, "decode_tokens": 32, "repeats": 5},
    "controls": {"skip": True, "scratch": "own"},
    "search": {"method": "grid", "space": {}, "trials": None, "early_stopping": None},
}  # fmt: skip


def study_of(*overrides: str) -> Study:
    Path("study.yaml").write_text(BASE, encoding="utf-8")
    return validate(read_document(Path("study.yaml"), overrides))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def holds(found: Any, wanted: Any) -> bool:
    """Whether all that is wanted is found; more may be."""
    if isinstance(wanted, dict) and wanted:
        return all(key in found and holds(found[key], value) for key, value in wanted.items())
    return bool(found == wanted)


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults_decide_what_is_computed(key: str) -> None:
    found = study_of().model_dump(mode="json")[key]
    assert holds(found, DEFAULTS[key]), found


def test_what_a_source_and_a_divergence_and_early_stopping_are_by_default() -> None:
    study = study_of(
        "data.train={source: jsonl, files: [a]}",
        "data.validation={source: hub, name: a/b, max_tokens: 9}",
        "recipe.phases.0.losses.kl={}",
        "search.early_stopping={}",
    ).model_dump(mode="json")
    assert study["data"]["train"] == {"source": "jsonl", "files": ["a"], "field": "text"}
    assert holds(
        study["data"]["validation"], {"configuration": None, "revision": "main", "split": "train", "field": "text"}
    )
    assert study["recipe"]["phases"][0]["losses"]["kl"] == {"weight": 1.0, "direction": "forward", "temperature": 1.0}
    assert study["search"]["early_stopping"] == {"reduction_factor": 2, "grace_layers": 1}


def test_the_vocabulary_of_a_teacher_made_here_is_2048_where_none_is_given() -> None:
    assert study_of().data.effective_vocabulary == 2048
    assert study_of("data.vocabulary=300").data.effective_vocabulary == 300


def test_a_number_for_the_divergence_is_its_weight() -> None:
    losses = study_of("recipe.phases.0.losses={kl: 0.25}").recipe.phases[0].losses
    assert (losses.logit_kl.weight, losses.logit_kl.direction, losses.logit_kl.temperature) == (0.25, "forward", 1.0)
    mapped = study_of("recipe.phases.0.losses={kl: {weight: 0.5, temperature: 2.0}}").recipe.phases[0].losses
    assert mapped.logit_kl is mapped.kl


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("seed", ["0", str(2**63 - 1)], ["-1", str(2**63)]),
        ("teacher.layers", ["1"], ["0"]),
        ("teacher.hidden", ["32", "64"], ["31", "16", "60", "0"]),  # four heads of a size divisible by 8
        ("teacher.heads", ["1", "16"], ["32", "5", "0"]),
        ("teacher.max_length", ["1"], ["0"]),
        ("data.sequence_length", ["8"], ["7"]),
        ("data.vocabulary", ["257", "65_536"], ["256", "65_537"]),
        ("data.validation_share", ["0.001", "0.999"], ["0.0", "1.0"]),
        ("data.train.files", [], ["[]"]),
        ("schedule.layers_per_stage", ["1"], ["0"]),
        ("schedule.keep", ["[0]"], ["[-1]"]),
        ("schedule.layer_order", ["[[0], [1]]", "top_down", "interleaved"], ["[]", "[[0], []]", "[[0], [1, 0]]", "up"]),
        ("schedule", ["{layer_order: [[0]], keep: [1]}"], ["{layer_order: [[0]], keep: [0]}"]),
        ("recipe.batch_size", ["1"], ["0"]),
        ("recipe.phases.0", ["{tokens_per_layer: 9, losses: {ce: 1.0}}"], ["{losses: {ce: 1.0}}"]),
        ("recipe.phases.0.tokens_per_layer", [], ["9"]),  # beside tokens
        ("recipe.phases.0.losses.ce", ["1e-9"], ["0.0", "-1.0"]),
        ("recipe.phases.0.losses", ["{hidden_mse: 1.0}", "{mixer_mse: 1.0}"], ["{}", "{ce: 0.0, kl: 0.0}"]),
        ("recipe.phases", [], ["[]"]),
        ("recipe", ["{joint: [{tokens: 9, losses: {ce: 1.0}}]}"], ["{}"]),
        ("recipe.optimizer.lr", ["1e-9"], ["0.0"]),
        ("recipe.optimizer.rest_scale", ["0.0"], ["-0.1"]),
        ("recipe.optimizer.weight_decay", ["0.0"], ["-0.1"]),
        ("recipe.optimizer.betas", ["[0.0, 1.0]"], ["[0.0, 1.1]", "[0.9, 0.9, 0.9]"]),
        ("recipe.optimizer.gradient_clip", ["0.1"], ["0.0"]),
        ("recipe.optimizer", ["{warmup: 0.5, decay: 0.5}"], ["{warmup: 0.5, decay: 0.6}"]),
        ("recipe.optimizer.warmup", ["0.0", "0.6"], ["0.7", "-0.1"]),
        ("recipe.optimizer.layer_decay", ["0.5", "2.0"], ["0.0"]),
        ("recipe.optimizer.average", ["{ema: 0.0}", "{last: 1.0}", "null"], ["{}", "{ema: 0.9, last: 0.5}", "0.9"]),
        ("recipe.optimizer.average.ema", ["1.0"], ["1.1", "-0.1"]),
        ("recipe.optimizer.average.last", ["0.01"], ["0.0", "1.1"]),
        ("recipe.phases.0.losses.hit_weight", ["0.5", "9.0"], ["0.0"]),
        ("recipe.text_tokens", ["1"], ["0"]),
        ("numerics.threads", ["1"], ["0"]),
        ("numerics.world_size", ["1"], ["0"]),
        ("numerics", ["{sharding: full, world_size: 2}"], ["{sharding: full}", "{sharding: half, world_size: 2}"]),
        ("evaluation.prompts", ["0"], ["-1"]),
        ("evaluation.tokens", ["1"], ["0"]),
        ("evaluation.probes", ["null", "{}", "{lengths: [8]}"], ["{lengths: []}", "{lengths: [7]}", "[8]", "8"]),
        ("evaluation.probes.windows", ["1"], ["0"]),
        ("evaluation.probes.needles", ["0"], ["-1"]),
        ("throughput.lengths", ["[1]"], ["[]", "[0]"]),
        ("throughput.repeats", ["1"], ["0"]),
        ("search.early_stopping", ["{reduction_factor: 2}", "{grace_layers: 1}"], ["{reduction_factor: 1}"]),
        ("search.early_stopping.grace_layers", ["1"], ["0"]),
        ("search", ["{method: random, trials: 1}"], ["{method: random}", "{method: random, trials: 0}", "{trials: 1}"]),
        ("search.space", ["{seed: [1]}"], ["{seed: []}", "{recipe.optimizer.lr: {low: 1.0, high: 2.0}}"]),
        ("study", ["a", "0.b_c-d"], ["A", "-a", "a b", "''"]),
    ],
)
def test_the_last_value_on_each_side_of_a_limit(key: str, good: list[str], bad: list[str]) -> None:
    kinds = ("teacher.kind=pretrain", "data.train={source: text, files: [a]}")
    for value in good:
        study_of(*kinds, f"{key}={value}")
    for value in bad:
        with pytest.raises(StudyError, match=f": {key.split('.')[0]}") as caught:
            study_of(*kinds, f"{key}={value}")
        assert "is missing" not in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "good"),
    [
        ("{low: 1.0, high: 2.0}", True),
        ("{low: -1.0, high: 2.0}", True),
        ("{low: 1e-9, high: 2.0, log: true}", True),
        ("{low: 2.0, high: 2.0}", False),
        ("{low: 0.0, high: 2.0, log: true}", False),
    ],
)
def test_a_range_has_two_bounds_in_their_order(axis: str, good: bool) -> None:
    search = f"search={{method: random, trials: 1, space: {{recipe.optimizer.lr: {axis}}}}}"
    if good:
        study_of(search)
        return
    with pytest.raises(StudyError, match=r"low .* must be"):
        study_of(search)


@pytest.mark.parametrize(
    ("teacher", "good"),
    [
        ("{kind: pretrained, hub: a/b}", True),
        ("{kind: pretrained, folder: a}", True),
        ("{kind: pretrained}", False),
        ("{kind: pretrained, hub: a/b, folder: a}", False),
    ],
)
def test_a_pretrained_teacher_has_one_place(teacher: str, good: bool) -> None:
    if good:
        assert study_of(f"teacher={teacher}").teacher.kind == "pretrained"
        with pytest.raises(StudyError, match="brings its own tokenizer"):
            study_of(f"teacher={teacher}", "data.vocabulary=300")
        return
    with pytest.raises(StudyError, match="exactly one of hub and folder"):
        study_of(f"teacher={teacher}")


def test_a_narrow_teacher_needs_narrow_products() -> None:
    with pytest.raises(ValidationError, match="needs products in bfloat16 but dtype is float32: set dtype too"):
        Numerics(teacher_dtype="bfloat16")
    assert Numerics(teacher_dtype="bfloat16", dtype="bfloat16").teacher_dtype == "bfloat16"
