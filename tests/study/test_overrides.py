"""`--set key=value`: what it lays over the file, and how a bad one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.study.loader import StudyError, load_study

STUDY = """\
study: tiny
teacher: {kind: pretrain}
operator: {kind: hyena, heads: 4}
recipe:
  phases:
    - {tokens: 4096, losses: {kl: 1.0}}
    - {tokens: 4096, losses: {ce: 1}}
  optimizer: {lr: 3e-3}
"""
AS_A_WHOLE = "which has no keys; give it a mapping as a whole"
GOOD_OVERRIDES = [
    ("seed=3", lambda study: study.seed, 3),
    ("recipe.optimizer.lr=1e-4", lambda study: study.recipe.optimizer.lr, 1e-4),
    ("recipe.phases.0.losses.kl=2", lambda study: study.recipe.phases[0].losses.kl, 2.0),
    ("recipe.phases=[{tokens: 9, losses: {ce: 1}}]", lambda study: len(study.recipe.phases), 1),
    ("operator.filter.width=8", lambda study: study.operator.filter.width, 8),
    ("operator={kind: skip}", lambda study: study.operator.kind, "skip"),
    ("question=no = never", lambda study: study.question, "no = never"),
    ("teacher.intermediate=null", lambda study: study.teacher.intermediate, None),
    ("controls.skip=false", lambda study: study.controls.skip, False),
]
BAD_OVERRIDES = [
    ("seed", "an override is written key=value, for example --set seed=1"),
    ("=1", "an override is written key=value, for example --set seed=1"),
    (
        "seed=[",
        "the value is not valid YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
    ),
    ("sede=1", "sede: unknown key; did you mean seed?"),
    ("seed=1e3", "seed: must be an integer, got 1000.0"),
    ("recipe.optimizer.lr='1e-4'", 'recipe.optimizer.lr: must be a number, got "1e-4": write it without quotes'),
    ("recipe.optimizer.lr=.nan", "recipe.optimizer.lr: .nan is not a finite number; write one"),
    ("operator={kind: hyena, kind: skip}", "operator.kind: this key stands twice; keep one of them"),
    ("operator.filter.wdith=3", "operator.filter.wdith: unknown key; did you mean width?"),
    ("recipe.phases=[{tokens: 1}]", "recipe.phases.0.losses: this key is missing; add it"),
    ("recipe.phases.5.tokens=1", "recipe.phases.5.tokens: 5 is no position of the list recipe.phases: 0 to 1"),
    ("recipe.phases.2={tokens: 1}", "recipe.phases.2: 2 is no position of the list recipe.phases: 0 to 1"),
    ("recipe.phases.x=1", "recipe.phases.x: x is no position of the list recipe.phases: 0 to 1"),
    ("study.name=x", f'study.name: study is "tiny", {AS_A_WHOLE}'),
    ("recipe.optimizer.lr.x=2", f"recipe.optimizer.lr.x: recipe.optimizer.lr is 0.003, {AS_A_WHOLE}"),
    ("controls.skip.x=1", 'controls.skip: must be true or false, got {"x": 1}'),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.mark.parametrize(("override", "read", "value"), GOOD_OVERRIDES, ids=[row[0] for row in GOOD_OVERRIDES])
def test_an_override_is_laid_over_the_file(file: Path, override: str, read: object, value: object) -> None:
    assert read(load_study(file, (override,))) == value  # type: ignore[operator]


@pytest.mark.parametrize(("override", "told"), BAD_OVERRIDES, ids=[row[0] for row in BAD_OVERRIDES])
def test_a_bad_override_is_told_as_it_was_written(file: Path, override: str, told: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(file, (override,))
    assert str(caught.value) == f"--set {override}: {told}"


def test_the_last_of_two_overrides_counts(file: Path) -> None:
    assert load_study(file, ("seed=1", "seed=2")).seed == 2


def test_all_bad_overrides_are_told_at_once(file: Path) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(file, ("seed", "recipe.phases.7.tokens=1"))
    assert [line.split(":")[0] for line in str(caught.value).split("\n")] == [
        "--set seed",
        "--set recipe.phases.7.tokens=1",
    ]


@pytest.mark.parametrize(
    ("overrides", "space"),
    [
        (["search.space.recipe.optimizer.lr=[1e-3, 3e-3]"], {"recipe.optimizer.lr": (1e-3, 3e-3)}),
        (["search.space.seed=[0, 1]"], {"seed": (0, 1)}),
        (["search.space.seed=[0]", "search.space.operator.heads=[2, 4]"], {"seed": (0,), "operator.heads": (2, 4)}),
        (["search.space={operator.heads: [2]}", "search.space.operator.heads=[4]"], {"operator.heads": (4,)}),
        (["search.space={operator.heads: [2, 4]}", "search.space.operator.heads.1=8"], {"operator.heads": (2, 8)}),
        (
            ["search.space={operator: [{kind: skip}]}", "search.space.operator.0.kind=hyena"],
            {"operator": ({"kind": "hyena"},)},
        ),
        (
            ["search.space=[{seed: [0]}, {seed: [1]}]", "search.space.1.recipe.phases.0.tokens=[9]"],
            ({"seed": (0,)}, {"seed": (1,), "recipe.phases.0.tokens": (9,)}),
        ),
    ],
)
def test_one_axis_of_a_search_is_laid_over_the_file(file: Path, overrides: list[str], space: object) -> None:
    assert load_study(file, tuple(overrides)).search.space == space


def test_one_bound_of_a_range_is_laid_over_the_file(file: Path) -> None:
    search = "search={method: random, trials: 2, space: {recipe.optimizer.lr: {low: 1e-4, high: 1e-2}}}"
    (axis,) = load_study(file, (search, "search.space.recipe.optimizer.lr.low=1e-3")).search.spaces[0].values()
    assert (axis.low, axis.high) == (1e-3, 1e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "search.space.recipe.optimiser.lr=[1]",
            "search.space.recipe.optimiser.lr: names no key of the study; did you mean recipe.optimizer?",
        ),
        (
            "search.space.recipe.optimizer.lr.0=1",
            "search.space.recipe.optimizer.lr.0: must be a list, or a mapping of keys, got 1",
        ),
    ],
)
def test_an_axis_that_is_none_is_told_as_it_was_written(file: Path, override: str, told: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(file, (override,))
    assert str(caught.value) == f"--set {override}: {told}"
