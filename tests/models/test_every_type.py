"""Every causal-LM type of the installed transformers: swapped and right in everything, or refused, as the docs tell."""

from __future__ import annotations

import pytest

from orchestrator.distill.models.sites import longest_text
from orchestrator.distill.models.verify import check_reading
from orchestrator.study.shapes import sizes
from tests.models.exporting import export, loaded_alone
from tests.models.models import teacher_of
from tests.models.outcomes import Outcome, outcome, refusal, summary, table
from tests.models.tiny import TYPES, config_of
from tests.pages import FAMILIES, README, written

LEAST = 70  # types that pass
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Filled by the tests of the types."""
    return {}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By type, what is wrong with its exported student where it is loaded."""
    folder = tmp_path_factory.mktemp("exported")
    names = [name for name in TYPES if not refusal(name)]
    for name in names:
        export(name, folder)
    return loaded_alone(names, folder)


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_right_or_refused(name: str, outcomes: dict[str, Outcome]) -> None:
    outcomes[name] = outcome(name)
    if not outcomes[name].refused:
        check_reading(teacher_of(name))


def test_the_longest_text_is_what_the_plan_says() -> None:
    configurations = {name: config_of(name) for name in TYPES if not refusal(name)}
    told = {name: sizes(config.to_dict())["max_length"] for name, config in configurations.items()}
    assert {name: longest_text(config) for name, config in configurations.items()} == told


def test_exported_students_load_elsewhere(elsewhere: dict[str, str]) -> None:
    assert not {name: fault for name, fault in elsewhere.items() if fault}


def test_the_docs_tell_what_became_of_each(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == len(TYPES)
    assert sum(not found.refused for found in outcomes.values()) >= LEAST
    assert written(FAMILIES, "tests.models") == table(outcomes.values())
    assert written(README, "tests.models") == summary(outcomes.values())
