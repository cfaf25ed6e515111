"""docs/study-files.md tells the schema as it is, and everything that it shows can be written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestrator.study.loader import StudyError, read_document, validate
from orchestrator.study.plan import Plan, make_plan, throughput_specs
from tests.study.keys import PAGE, Section, keys_of, read_texts, sections, with_tables
from tests.study.test_plan import RESOLVED, STUDY

ROOT = PAGE.parents[1]
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^layerswap plan (.*)$", TEXT, flags=re.MULTILINE)
BARE = "study: s\noperator: {kind: hyena}\nrecipe: {phases: [{tokens: 4096, losses: {kl: 1.0}}]}\n"
NEEDED: dict[str, dict[str, str]] = {  # what a mapping has to have beside the key that is shown
    "recipe": {"phases": "[{tokens: 4096, losses: {kl: 1.0}}]"},
    "recipe.phases.0": {"losses": "{kl: 1.0}"},
    "schedule.gate": {"ratio": "1.05"},
    "data.train of text": {"files": "[a.txt]"},
    "data.train of hub": {"name": "a/b", "max_tokens": "9"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(BARE, encoding="utf-8")


def planned(*overrides: str) -> Plan:
    Path("study.yaml").write_text(STUDY, encoding="utf-8")
    document = read_document(Path("study.yaml"), overrides)
    return make_plan(document, validate(document), RESOLVED)


def override(section: Section, example: str) -> str:
    """What lays an example over a study that has little else."""
    if not section.path:
        return "=".join(part.strip() for part in example.split(":", 1))
    name, _, kinds = section.tag.partition(": ")
    kind = kinds.split(",")[0]
    needed = {name: kind} if name else {}
    needed |= NEEDED.get(f"{section.path} of {kind}" if kind else section.path, {})
    beside = [f"{key}: {value}" for key, value in needed.items() if not re.search(rf"(^|, ){key}: ", example)]
    whole = f"{{{', '.join([*beside, example])}}}"
    if section.path == "search.space.KEY":
        return f"search={{method: random, trials: 2, space: {{recipe.optimizer.lr: {whole}}}}}"
    if section.path.startswith("search.optuna"):
        own = f"{{objective: {whole}}}" if section.path.endswith("objective.0") else whole
        return f"search={{method: optuna, trials: 2, space: {{seed: [0, 1]}}, optuna: {own}}}"
    return f"{section.path}={whole}"


def test_the_tables_are_the_schema_s() -> None:
    assert with_tables(TEXT) == TEXT, "run python -m tests.study.keys --write, and say what new keys are"


def test_every_key_is_told_with_an_example() -> None:
    texts = read_texts(TEXT)
    every = [(section.heading, key) for section in sections() for key in keys_of(section.model)]
    assert len(every) > 100
    assert [key for key in every if not all(texts.get(key, ("", "")))] == []
    assert set(texts) == set(every)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.heading)
def test_every_example_can_be_written(section: Section) -> None:
    texts = read_texts(TEXT)
    for key in keys_of(section.model):
        example = texts[section.heading, key][1].strip("`")
        assert re.search(rf"(^|, ){key}: ", example), f"{section.heading}: the example does not show {key}"
        validate(read_document(Path("study.yaml"), (override(section, example),)))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_studies_of_the_page_can_be_planned(block: str) -> None:
    Path("study.yaml").write_text(block, encoding="utf-8")
    document = read_document(Path("study.yaml"))
    plan = make_plan(document, validate(document), RESOLVED)
    if plan.study.search.space:
        assert len(plan.trials) == {"grid": 4, "union": 4, "random": 8, "learned": 0}[plan.study.study]


@pytest.mark.parametrize("words", COMMANDS)
def test_the_overrides_of_the_page_can_be_planned(words: str) -> None:
    study, *given = shlex.split(words)
    assert given[::2] == ["--set"] * (len(given) // 2)
    document = read_document(ROOT / study, tuple(given[1::2]))
    assert make_plan(document, validate(document), RESOLVED).trials


def test_the_error_of_the_page_is_the_one_that_is_told() -> None:
    (shown,) = re.findall(r"^    (study\.yaml:.*)$", TEXT, flags=re.MULTILINE)
    Path("study.yaml").write_text(
        "study: first\n\nrecipe:\n  phases: [{tokens: 9, losses: {kl: 1.0}}]\n  optimizer:\n    method: adamw\n"
        "    warm_up: 0.1\n"
    )
    with pytest.raises(StudyError) as caught:
        validate(read_document(Path("study.yaml")))
    assert str(caught.value) == shown


@pytest.mark.parametrize(
    ("change", "trained", "speeds"),
    [
        ("question=why?", True, True),
        ("evaluation.tokens=64", True, True),
        ("throughput.repeats=7", True, False),
        ("recipe.joint.0.losses.ce=0.5", False, True),
        ("seed=1", False, False),
    ],
)
def test_a_change_computes_again_what_the_page_says(change: str, trained: bool, speeds: bool) -> None:
    before, after = planned(), planned(change)
    students = [{step.train.key for step in plan.trials[0].steps} for plan in (before, after)]
    measured = [{spec.key for spec in throughput_specs(plan, "h").values()} for plan in (before, after)]
    assert (students[0] == students[1], measured[0] == measured[1]) == (trained, speeds)
