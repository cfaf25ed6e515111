"""The identity of a stage: every field of it counts, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from operators.config import HyenaConfig, WindowConfig
from orchestrator.distill.context import RunContext
from orchestrator.study.recipe import LogitKL, Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation, Throughput
from orchestrator.study.spec import (
    Architecture,
    DistilSpec,
    EvaluateSpec,
    ImportSpec,
    PhaseSpec,
    ProbesSpec,
    ScratchSpec,
    SourceIdentity,
    TasksSpec,
    TeacherSpec,
    ThroughputSpec,
    TokensSpec,
    short,
    spec_from_json,
)

SHAPE = Architecture(layers=2, hidden=16, heads=2, intermediate=32, max_length=64, vocabulary=300)
SOURCE = SourceIdentity(source="text", fingerprint="f")
COMMON: dict[str, Any] = {"optimizer": Optimizer(), "numerics": Numerics(), "seed": 0}
LOSSES = Losses(mixer_mse=1.0, kl=LogitKL())
SPECS: dict[str, Any] = {
    "tokens": TokensSpec(
        train=SOURCE, validation=None, validation_share=0.05, sequence_length=32, vocabulary=300, teacher=None
    ),
    "import": ImportSpec(fingerprint="f"),
    "teacher": TeacherSpec(
        tokens="t", architecture=SHAPE, token_budget=640, batch_size=2, sequence_length=32, **COMMON
    ),
    "distil": DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(0, 1), new_layers=(1,), operator=HyenaConfig(),
        phases=(PhaseSpec(losses=LOSSES, steps=3),), batch_size=2, sequence_length=32, first_sequence=6,
        freeze=("*embed*",), **COMMON,
    ),
    "scratch": ScratchSpec(
        tokens="t", teacher=None, architecture=SHAPE, operator=HyenaConfig(), layers=(0, 1), token_budget=640,
        batch_size=2, sequence_length=32, **COMMON,
    ),
    "evaluate": EvaluateSpec(
        tokens="t", teacher="r", subject="s", reference="e", sequence_length=32, evaluation=Evaluation(),
        numerics=Numerics(),
    ),
    "throughput": ThroughputSpec(
        teacher="r", operator=HyenaConfig(), layers=(0,), throughput=Throughput(), train_batch_size=2,
        sequence_length=32, numerics=Numerics(), hardware="h", rest_trains=False, freeze=("lm_head.*",),
    ),
    "probes": ProbesSpec(
        tokens="t", teacher="r", subject="s", sequence_length=32, lengths=(32, 64), windows=8, needles=16,
        numerics=Numerics(), seed=0,
    ),
    "tasks": TasksSpec(
        tokens="t", teacher="r", subject="s", folder="d", task="choice", fingerprint="f", harness="0.4.13", limit=10,
        rotate=True, batch_size=16, numerics=Numerics(), seed=1234,
    ),
}  # fmt: skip
# A change of these is a new identity of every stage computed so far: say so in the CHANGELOG, and raise STAGE_VERSION
# where the same specification would give another result.
KEYS = {
    "tokens": "a3c29648cf4c3c83878f3625f8fd165a1776c2ad4e18a371c20913d8945f238c",
    "import": "16fb7e49f22494d5aef97d99e4332836411ccd7a3a8d709a2db6f6fce82d5d21",
    "teacher": "86aafd5deaedca684f8bf23d454f4a6d04c5de591676f0bda3cc4e0310432370",
    "distil": "a76d94b83fcc2d3254804c6567ddc17873335d278c4b1b9287d0921e45b3f6e3",
    "scratch": "cec5d1935c2645618e29234c47a60e9d71cac5460607ca3e4247ed7ff4baaa16",
    "evaluate": "305008efe3edcac4da50b083ac83d9ed398e29bf6aa86bb50d143296e7d68480",
    "throughput": "6c531c89323516578b920652317655d2fab06a6aa90a38b5382445bd9003f5cc",
    "probes": "1daea340dbc89a369aeddf9ddf081c717874daeab4644d89920da59c0d78e9d4",
    "tasks": "04ccb8ddbcb329333c111d27ff49f895bca2429a184b9674992790d0e01fb6cb",
}
WORDS = {  # another value for a field whose words are given
    "source": "jsonl", "method": "adamw", "dtype": "bfloat16", "window": "linear", "init": "random",
    "direction": "reverse", "feature_map": "hedgehog", "matmul": "medium",
    "core": "native", "processor": "cuda", "teacher_dtype": "bfloat16", "sharding": "full", "near_norm": "rms",
}  # fmt: skip
HEADED = ("feature_map", "degree", "key_dim", "normalise", "key_gate")  # of an operator with heads only
NORMALISED = ("window", "sinks", "near_norm", "groups", "tied")  # of one whose weights are divided by their sum
FILLED = {  # a value for a field that is none
    "validation": SOURCE.model_dump(mode="json"), "field": "body", "max_tokens": 9, "teacher": "r", "pretrained": "f",
    "heads": 4, "key_dim": 8, "window": 8, "groups": 2, "validation_share": 0.1, "vocabulary": 300,
    "text_windows": 4, "average": {"ema": 0.5, "last": None},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", SPECS)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every single value of a specification's JSON stands, the tags that name a class left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "kind":
                yield from paths(inner, (*path, name))
    elif isinstance(value, list):
        yield from ((*path, len(value)), *(found for i, item in enumerate(value) for found in paths(item, (*path, i))))
    else:
        yield path


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """The same JSON with another value at `path`; at a list's end, a list one item longer."""
    result = copy.deepcopy(value)
    holder = result
    for step in path[:-1]:
        holder = holder[step]
    if isinstance(holder, list) and path[-1] == len(holder):
        holder.append(copy.deepcopy(holder[-1]))
        return result
    name = next(step for step in reversed(path) if isinstance(step, str))
    old = holder[path[-1]]
    if old is None:
        holder[path[-1]] = FILLED[name]
    elif isinstance(old, bool):
        holder[path[-1]] = not old
    elif isinstance(old, str):
        holder[path[-1]] = WORDS.get(name, f"{old}x")
    elif isinstance(old, float):
        holder[path[-1]] = old / 2 if old else 0.5
    else:
        holder[path[-1]] = old * 2 if name == "degree" else old + 2  # the positional features of a filter are odd
    return result


def headed(value: Any) -> Any:
    """The same JSON with heads that a feature map is possible for, where it has an operator."""
    if "operator" not in value:
        return value
    operator = value["operator"]
    heads = {"heads": 2, "feature_map": "power", "filter": {**operator["filter"], "positive": True}}
    return {**value, "operator": {**operator, **heads}}


def normalised(value: Any, window: int | None) -> Any:
    """The same with weights that are divided by their sum, and a window where one is given."""
    made = headed(value)
    return {**made, "operator": {**made["operator"], "normalise": True, "window": window}}


def allowing(value: Any, name: str) -> Any:
    """The same JSON with what another value of that field needs."""
    if name == "sharding":
        return {**value, "numerics": {**value["numerics"], "world_size": 2}}
    if name == "teacher_dtype":
        return {**value, "numerics": {**value["numerics"], "dtype": "bfloat16"}}
    if name in NORMALISED:
        return normalised(value, None if name == "window" else 8)
    return headed(value) if name in HEADED else value


def fields(model: Any) -> set[str]:
    """Names of the fields of a model or configuration, of those in it too."""
    if isinstance(model, BaseModel):
        return {*type(model).model_fields, *(name for value in dict(model).values() for name in fields(value))}
    if dataclasses.is_dataclass(model):
        own = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        return {*own, *(name for value in own.values() for name in fields(value))}
    return {name for item in model for name in fields(item)} if isinstance(model, tuple) else set()


@every_kind
def test_the_key_of_a_kind_is_this_one(kind: str) -> None:
    assert SPECS[kind].key == KEYS[kind]


def whole(spec: Any) -> Any:
    """The JSON of a specification with what it leaves out where it is as it was before that field came."""
    value: dict[str, Any] = spec.model_dump(mode="json")
    before = {
        "numerics": {"sharding": "none"},
        "operator": {"window": None, "sinks": 0, "near_norm": "none", "groups": None, "tied": False},
        "optimizer": {"layer_decay": 1.0, "average": None},
    }
    value |= {name: {**left_out, **value[name]} for name, left_out in before.items() if name in value}
    for phase in value.get("phases", ()):
        phase["losses"] = {"hit_weight": 1.0, **phase["losses"]}
    later = {"text_windows": None, "again": 0, "processor": "cpu"}
    return value | {name: left_out for name, left_out in later.items() if hasattr(spec, name)}


@every_kind
def test_every_field_counts(kind: str) -> None:
    spec = SPECS[kind]
    value = whole(spec)
    fixed_length = {("optimizer", "betas", 2)}
    keys = {spec.key, spec_from_json(json.dumps(headed(value))).key}
    every = [path for path in paths(value) if path not in fixed_length]
    for path in every:
        other = spec_from_json(json.dumps(changed(allowing(value, path[-1]), path)))
        assert other.key not in keys, f"{kind}: {path} does not change the key"
        keys.add(other.key)
    walked = {step for path in every for step in path if isinstance(step, str)}
    assert fields(spec) - {"kind"} == walked, "a field was not walked"


def test_every_field_of_a_window_alone_counts() -> None:
    spec, keys = SPECS["distil"], set()
    others: dict[str, Any] = {
        "window": 8, "sinks": 0, "heads": 2, "near_norm": "rms", "groups": 2, "short_taps": 3, "init": "random"
    }  # fmt: skip
    assert {*others, "kind"} == {field.name for field in dataclasses.fields(WindowConfig)}
    for other in ({}, *({name: value} for name, value in others.items())):
        value = {**spec.model_dump(mode="json"), "operator": dataclasses.asdict(WindowConfig(**other))}
        found = spec_from_json(json.dumps(value))
        assert found.operator == WindowConfig(**other)
        keys.add(found.key)
    assert len(keys) == 1 + len(others)


@every_kind
def test_a_key_survives_json(kind: str) -> None:
    spec = SPECS[kind]
    again = spec_from_json(spec.model_dump_json())
    assert again == spec
    assert again.key == spec.key
    assert type(again) is type(spec)


def test_kinds_have_keys_of_their_own() -> None:
    assert len({spec.key for spec in SPECS.values()}) == len(SPECS)
    assert {spec.kind for spec in SPECS.values()} == set(SPECS)


def test_a_whole_number_and_its_float_are_one_value() -> None:
    whole = {"mixer_mse": 1, "kl": {"weight": 1, "temperature": 2}}
    real = {"mixer_mse": 1.0, "kl": {"weight": 1.0, "temperature": 2.0}}
    value = SPECS["distil"].model_dump(mode="json")
    keys = set()
    for losses in (whole, real):
        value["phases"] = [{"losses": losses, "steps": 3}]
        keys.add(spec_from_json(json.dumps(value)).key)
    assert len(keys) == 1
    assert Losses(kl=1).model_dump_json() == Losses(kl=1.0).model_dump_json()


@pytest.mark.parametrize("bad", ["NaN", "Infinity"])
def test_a_number_without_a_canonical_text_has_no_key(bad: str) -> None:
    text = SPECS["tokens"].model_dump_json().replace("0.05", bad)
    with pytest.raises(ValidationError, match="finite"):
        spec_from_json(text)


@every_kind
def test_the_device_is_part_of_what_computes_on_it_and_left_out_of_keys_where_it_is_the_cpu(kind: str) -> None:
    reads_files, has_it_in_its_hardware = kind in ("tokens", "import"), kind == "throughput"
    assert hasattr(SPECS[kind], "processor") != (reads_files or has_it_in_its_hardware)
    assert "processor" not in SPECS[kind].model_dump_json()


@every_kind
def test_an_unknown_or_missing_field_is_no_specification(kind: str) -> None:
    value = SPECS[kind].model_dump(mode="json")
    with pytest.raises(ValidationError, match="extra_forbidden"):
        spec_from_json(json.dumps({**value, "device": "cuda"}))
    del value[next(name for name in value if name not in ("kind", "version"))]
    with pytest.raises(ValidationError, match="missing"):
        spec_from_json(json.dumps(value))


def test_where_a_stage_runs_shares_no_name_with_what_it_is() -> None:
    surroundings = {field.name for field in dataclasses.fields(RunContext)}
    assert surroundings.isdisjoint(name for spec in SPECS.values() for name in fields(spec))


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        ("tokens", {}),
        ("import", {}),
        ("teacher", {"tokens": "t"}),
        ("distil", {"tokens": "t", "teacher": "r", "parent": "p"}),
        ("scratch", {"tokens": "t"}),
        ("evaluate", {"tokens": "t", "teacher": "r", "subject": "s", "reference": "e"}),
        ("probes", {"tokens": "t", "teacher": "r", "subject": "s"}),
        ("throughput", {"teacher": "r"}),
    ],
)
def test_parents_are_named_by_role(kind: str, parents: dict[str, str]) -> None:
    assert SPECS[kind].parents == parents


def test_a_short_key_is_its_beginning() -> None:
    assert short("0123456789abcdef" + "0" * 48) == "0123456789abcdef"


def test_cores_are_threads_of_all_processes_and_one_where_nothing_is_said() -> None:
    spec = SPECS["teacher"].model_copy(update={"numerics": Numerics(threads=3, world_size=2)})
    assert (spec.threads, spec.world_size, spec.cores) == (3, 2, 6)
    assert (SPECS["tokens"].threads, SPECS["tokens"].world_size, SPECS["tokens"].cores) == (1, 1, 1)
