"""Every mistake in a study file is told with its place, its key and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.loader import StudyError, load_study, read_document, with_values
from orchestrator.study.schema import Study

BASE = """\
study: tiny
teacher:
  kind: pretrain
  layers: 6
data:
  train: {source: python-stdlib}
operator: {kind: hyena, heads: 4}
schedule:
  layers_per_stage: 2
recipe:
  phases:
    - {tokens: 4096, losses: {kl: 1.0}}
    - tokens: 4096
      losses: {ce: 1}
  optimizer: {lr: 3e-3}
"""
TOP = ", ".join(Study.model_fields)
NO_WEIGHT = "all loss weights are 0: give at least one of mixer_mse, hidden_mse, kl, ce a weight"
ONE_BUDGET = "a phase needs a token budget: exactly one of tokens and tokens_per_layer"
PHASE = "    - tokens: 4096\n      losses: {ce: 1}"
LEARNING = "recipe.optimizer.lr"
UNSWEPT = "names no key of the study"


def at(place: str, key: str, told: str) -> str:
    return f"study.yaml:{place}: {key}: {told}"


# what is replaced in BASE ("" puts it at the end), by what, and what is told
UNKNOWN_KEYS = [
    ("", "sede: 1", at("16:1", "sede", "unknown key; did you mean seed?")),
    ("", "zzzz: 1", at("16:1", "zzzz", f"unknown key; allowed here: {TOP}")),
    ("layers: 6", "layres: 6", at("4:3", "teacher.layres", "unknown key; did you mean layers?")),
    ("lr: 3e-3", "matrix_rl: 3e-3", at("15:15", "recipe.optimizer.matrix_rl", "unknown key; did you mean matrix_lr?")),
    ("heads: 4", "haeds: 4", at("7:25", "operator.haeds", "unknown key; did you mean heads?")),
    ("heads: 4", "filter: {wdith: 3}", at("7:34", "operator.filter.wdith", "unknown key; did you mean width?")),
    ("{tokens: 4096", "{tokns: 4096", at("12:8", "recipe.phases.0.tokns", "unknown key; did you mean tokens?")),
    ("{ce: 1}", "{cee: 1}", at("14:16", "recipe.phases.1.losses.cee", "unknown key; did you mean ce?")),
    (
        "{ce: 1}", "{kl: {wieght: 1}}",
        at("14:21", "recipe.phases.1.losses.kl.wieght", "unknown key; did you mean weight?"),
    ),
    ("source: python-stdlib", "source: text, files: [a], flied: b",
     at("6:37", "data.train.flied", "unknown key; did you mean field?")),
]  # fmt: skip
WRONG_VALUES = [
    ("layers: 6", "layers: six", at("4:3", "teacher.layers", 'must be an integer, got "six"')),
    ("layers: 6", "layers: 6.5", at("4:3", "teacher.layers", "must be an integer, got 6.5")),
    ("layers: 6", "layers: 0", at("4:3", "teacher.layers", "must be greater than 0, got 0")),
    ("3e-3", '"1e-4"', at("15:15", LEARNING, 'must be a number, got "1e-4": write it without quotes')),
    ("3e-3", ".nan", at("15:19", LEARNING, ".nan is not a finite number; write one")),
    ("3e-3", "-.inf", at("15:19", LEARNING, "-.inf is not a finite number; write one")),
    ("lr: 3e-3", "betas: [0.9]", at("15:15", "recipe.optimizer.betas.1", "this value is missing; add it")),
    ("lr: 3e-3", "betas: [0.9, x]", at("15:28", "recipe.optimizer.betas.1", 'must be a number, got "x"')),
    (
        "{ce: 1}", "{kl: yes}",
        at("14:16", "recipe.phases.1.losses.kl", 'must be a mapping of keys, or a number, got "yes"'),
    ),
    ("{ce: 1}", "{kl: -1}", at("14:16", "recipe.phases.1.losses.kl", "must be greater than or equal to 0, got -1")),
    (
        "{ce: 1}", "{kl: {direction: back}}",
        at("14:21", "recipe.phases.1.losses.kl.direction", "must be 'forward' or 'reverse', got \"back\""),
    ),
    (
        "layers_per_stage: 2", "layer_order: bottomup",
        at("9:3", "schedule.layer_order",
           "must be 'bottom_up', 'top_down' or 'interleaved', or a list, got \"bottomup\""),
    ),
    ("layers_per_stage: 2", "layer_order: [0]", at("9:17", "schedule.layer_order.0", "must be a list, got 0")),
    ("study: tiny", "study: My Study", at("1:1", "study", 'must match ^[a-z0-9][a-z0-9._-]*$, got "My Study"')),
    ("study: tiny", "study: 12", at("1:1", "study", "must be a text, got 12")),
    ("", "controls: {skip: no}", at("16:12", "controls.skip", 'must be true or false, got "no"')),
    ("", f"seed: {2**63}", at("16:1", "seed", f"must be less than {2**63}, got {2**63}")),
    (
        "operator: {kind: hyena, heads: 4}", "operator:",
        at("7:1", "operator", "must be a list, or a mapping of keys, got null"),
    ),
    ("kind: hyena", "kind: rwkv", at("7:12", "operator.kind", "unknown kind rwkv; allowed here: hyena, window, skip")),
    ("kind: hyena, ", "", at("7:1", "operator.kind", "this key is missing; add one of hyena, window, skip")),
    ("kind: pretrain", "kind: pretrian", at("3:3", "teacher.kind", "unknown kind pretrian; did you mean pretrain?")),
    ("source: python-stdlib", "source: txt", at("6:11", "data.train.source", "unknown source txt; did you mean text?")),
    ("source: python-stdlib", "source: text", at("6:3", "data.train.files", "this key is missing; add it")),
    ("layers: 6", "layers: !run 6", at("4:11", "teacher.layers", "YAML tag !run is not allowed; write a plain value")),
]  # fmt: skip
BROKEN_RULES = [
    ("", "study: again", at("16:1", "study", "this key stands twice; keep one of them")),
    ("layers: 6", "layers: 6\n  layers: 7", at("5:3", "teacher.layers", "this key stands twice; keep one of them")),
    ("{ce: 1}", "{ce: 0}", at("14:7", "recipe.phases.1.losses", NO_WEIGHT)),
    ("{ce: 1}", "{kl: {weight: 0}}", at("14:7", "recipe.phases.1.losses", NO_WEIGHT)),
    (PHASE, "    - losses: {ce: 1}", at("13:7", "recipe.phases.1", ONE_BUDGET)),
    (PHASE, PHASE + "\n      tokens_per_layer: 9", at("13:7", "recipe.phases.1", ONE_BUDGET)),
    (
        "heads: 4", "heads: 4, order: 3",
        at("7:35", "operator.order", "order must be 2 where heads is set but is 3: or leave heads out."),
    ),
    (
        "heads: 4", "filter: {features: 4}",
        at("7:34", "operator.filter.features",
           "features must be odd and at least 3 but is 4: time and sine pairs, such as 5."),
    ),
    (
        "layers_per_stage: 2", "layer_order: [[0], [1, 0]]",
        at("9:3", "schedule.layer_order", "layer_order swaps layers [0] more than once: name each layer once"),
    ),
    (
        "layers_per_stage: 2", "layer_order: [[0], [1]]\n  keep: [1]",
        at("8:1", "schedule", "layers [1] stand in both layer_order and keep: take them out of one"),
    ),
    (
        "", "search: {method: random, space: {seed: [1]}}",
        at("16:1", "search", "random search needs trials: how many points to draw"),
    ),
    (
        "", "search: {trials: 3, space: {seed: [1]}}",
        at("16:10", "search.trials", "trials=3 belongs to random search: a grid runs every point"),
    ),
    (
        "lr: 3e-3", "warmup: 0.9",
        at("15:15", "recipe.optimizer.warmup",
           "warmup 0.9 and decay 0.4 exceed the stage: their sum must be at most 1"),
    ),
    (
        "kind: pretrain\n  layers: 6", "kind: pretrained\n  hub: a/b\n  folder: c",
        at("2:1", "teacher", "exactly one of hub and folder is needed, got hub=a/b folder=c"),
    ),
    (
        "kind: pretrain\n  layers: 6\ndata:\n", "kind: pretrained\n  hub: a/b\ndata:\n  vocabulary: 512\n",
        at("6:3", "data.vocabulary",
           "data.vocabulary has no use with a pretrained teacher, which brings its own tokenizer"),
    ),
]  # fmt: skip
SEARCHES = [
    ("space: {recipe.optimizer.lrr: [1.0]}", "16:18", "recipe.optimizer.lrr", f"{UNSWEPT}; did you mean {LEARNING}?"),
    ("space: {recpie.batch_size: [1]}", "16:18", "recpie.batch_size", f"{UNSWEPT}; did you mean recipe?"),
    ("space: {seed.x: [1]}", "16:18", "seed.x", f"{UNSWEPT}; seed has no keys"),
    (
        "space: {recipe.phases.tokens: [1]}", "16:18", "recipe.phases.tokens",
        f"{UNSWEPT}; recipe.phases is a list: write recipe.phases.0 for its first",
    ),
    (
        "space: {teacher.layers: [1]}", "16:18", "teacher.layers",
        f"{UNSWEPT}; can be swept: operator, schedule, recipe, numerics, seed",
    ),
    ("space: [{seed: [1]}, {sede: [1]}]", "16:32", "1.sede", f"{UNSWEPT}; did you mean seed?"),
    ("space: {seed: []}", "16:18", "seed", "seed has no value: list at least one"),
    ("space: {seed: 3}", "16:18", "seed", "must be a list, or a mapping of keys, got 3"),
    (
        f"space: {{{LEARNING}: {{low: 0.1, high: 1.0}}}}", "16:18", LEARNING,
        f"{LEARNING} is a range: a grid needs a list of values",
    ),
    (
        f"method: random, trials: 2, space: {{{LEARNING}: {{high: 1.0}}}}", "16:45", f"{LEARNING}.low",
        "this key is missing; add it",
    ),
    (
        f"method: random, trials: 2, space: {{{LEARNING}: {{low: 0.1, high: 1.0, logg: true}}}}", "16:88",
        f"{LEARNING}.logg", "unknown key; did you mean log?",
    ),
    (
        f"method: random, trials: 2, space: {{{LEARNING}: {{low: 2.0, high: 1.0}}}}", "16:67", f"{LEARNING}.low",
        "low 2.0 must be below high 1.0, both finite",
    ),
]  # fmt: skip
WHOLE_FILES = [
    ("- a", "study.yaml:1:1: a study is a mapping of keys (study: ..., recipe: ...), got a list"),
    ("hello", "study.yaml:1:1: a study is a mapping of keys (study: ..., recipe: ...), got a plain value"),
    ("", at("1:1", "study", "this key is missing; add it") + "\n" + at("1:1", "recipe", "this key is missing; add it")),
    ("study: s", at("1:1", "recipe", "this key is missing; add it")),
    (
        "study: s\nrecipe: {}",
        at("2:1", "recipe", "the recipe has no token budget: give phases, joint or both at least one phase"),
    ),
    (
        "study: [a\nrecipe: {}",
        "study.yaml:2:7: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
    ),
    (
        "study: s\n---\nstudy: t",
        "study.yaml:2:1: not valid YAML: expected a single document in the stream, but found another document",
    ),
    ("study: &a [*a]", "study.yaml:1:1: a value refers to itself or is nested too deeply; write it out"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Study:
    Path("study.yaml").write_text(text, encoding="utf-8")
    return load_study(Path("study.yaml"), overrides)


def edited(old: str, new: str) -> str:
    if not old:
        return BASE + new + "\n"
    assert BASE.count(old) == 1, f"{old!r} must stand once in BASE"
    return BASE.replace(old, new)


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(StudyError) as caught:
        load(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(("old", "new", "told"), UNKNOWN_KEYS, ids=[row[1] for row in UNKNOWN_KEYS])
def test_an_unknown_key_is_told_with_its_place_and_the_nearest_valid_key(old: str, new: str, told: str) -> None:
    assert complaint(edited(old, new)) == told


@pytest.mark.parametrize(("old", "new", "told"), WRONG_VALUES, ids=[row[1] or row[0] for row in WRONG_VALUES])
def test_a_wrong_value_is_told_with_what_it_must_be(old: str, new: str, told: str) -> None:
    assert complaint(edited(old, new)) == told


@pytest.mark.parametrize(("old", "new", "told"), BROKEN_RULES, ids=[row[1] for row in BROKEN_RULES])
def test_a_broken_rule_is_told_where_it_is_broken(old: str, new: str, told: str) -> None:
    assert complaint(edited(old, new)) == told


@pytest.mark.parametrize(("search", "place", "axis", "told"), SEARCHES, ids=[row[0] for row in SEARCHES])
def test_a_bad_search_space_is_told_at_its_axis(search: str, place: str, axis: str, told: str) -> None:
    assert complaint(edited("", f"search: {{{search}}}")) == at(place, f"search.space.{axis}", told)


@pytest.mark.parametrize(("text", "told"), WHOLE_FILES, ids=[row[0] or "empty" for row in WHOLE_FILES])
def test_a_file_that_is_no_study_is_told_so(text: str, told: str) -> None:
    assert complaint(text) == told


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "study.yaml: no such study file: name a YAML file, for example studies/layerwise.yaml"),
        (lambda path: path.write_bytes(b"study: \xff"), "study.yaml: cannot be read as UTF-8 text ("),
        (lambda path: path.mkdir(), "study.yaml: is a directory: name a YAML file"),
    ],
    ids=["missing", "binary", "folder"],
)
def test_a_file_that_cannot_be_read_is_told_so(make: object, told: str) -> None:
    make(Path("study.yaml"))  # type: ignore[operator]
    with pytest.raises(StudyError) as caught:
        load_study(Path("study.yaml"))
    assert str(caught.value).startswith(told)


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    text = BASE.replace("layers: 6", "layers: six").replace("lr: 3e-3", "lrr: 3").replace("ce: 1", "ce: 0")
    assert complaint(text).split("\n") == [
        at("4:3", "teacher.layers", 'must be an integer, got "six"'),
        at("14:7", "recipe.phases.1.losses", NO_WEIGHT),
        at("15:15", "recipe.optimizer.lrr", "unknown key; did you mean lr?"),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E2", 100.0), (".5", 0.5), ("3", 3.0), ("1_000", 1000.0), ("+0.25", 0.25)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert load(edited("3e-3", text)).recipe.optimizer.lr == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "12:30:45", "2024-01-01", "0o17", "0x1f", "1e", "="])
def test_words_that_yaml_1_1_converts_stay_texts(word: str) -> None:
    assert load(edited("", f"question: {word}")).question == word


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, None) for word in ("~", "null", "Null", "NULL", "")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, word) for word in ("nULL", "tRUE", "~~", "nil", "falsey", "1__x", "+", ".", ".Nan")),
        *((word, 12) for word in ("12", "+12", "1_2", "012")),
        *((word, -7) for word in ("-7", "-07")),
        *((word, 0.5) for word in ("0.5", ".5", "+.5", "5e-1", "5.e-1", "50E-2")),
    ],
)
def test_plain_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    Path("study.yaml").write_text(f"key: {text}\n", encoding="utf-8")
    found = read_document(Path("study.yaml")).values["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", [".inf", "+.Inf", ".INF", "-.inf", ".nan", ".NaN", ".NAN"])
def test_what_is_no_finite_number_is_told(text: str) -> None:
    with pytest.raises(StudyError) as caught:
        load(f"key: {text}\n")
    assert str(caught.value) == at("1:6", "key", f"{text} is not a finite number; write one")


def test_an_alias_stands_for_its_value() -> None:
    assert load(edited("layers: 6", "layers: &n 8\n  heads: *n")).teacher.heads == 8  # type: ignore[union-attr]


def test_a_bad_search_point_is_told_where_the_axis_lists_it() -> None:
    search = "search: {space: {operator.order: [2, 3], recipe.phases.0.tokens: [4096]}}"
    Path("study.yaml").write_text(edited("", search), encoding="utf-8")
    document = read_document(Path("study.yaml"))
    with pytest.raises(StudyError) as caught:
        with_values(document, {"operator.order": 3, "recipe.phases.0.tokens": 4096})
    assert str(caught.value) == (
        at("16:38", "operator.order", "order must be 2 where heads is set but is 3: or leave heads out.")
        + " (at the search point operator.order=3, recipe.phases.0.tokens=4096)"
    )
