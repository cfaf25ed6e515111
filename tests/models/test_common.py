"""The families that people use pass every check of a swapped model."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.distill.models.sites import longest_text
from orchestrator.distill.models.verify import check_reading
from orchestrator.study.shapes import sizes
from tests.models.checks import AS_TEACHER, CHECKS
from tests.models.exporting import export, loaded_alone
from tests.models.models import teacher_of
from tests.models.outcomes import refusal
from tests.models.tiny import config_of

COMMON = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "qwen3_next")
# Families whose layers differ from another's in no way that swapping sees are for `make test-all`.
ALIKE = {"mistral", "qwen2"}
common = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in COMMON]
)
LIMITS = {"packing": ("opt", "bloom", "qwen3_next"), "prefix": ("qwen3_next",)}  # as their teachers have


@pytest.mark.parametrize("check", CHECKS)
@common
def test_a_common_family_passes(name: str, check: str) -> None:
    told = CHECKS[check](name)
    assert (AS_TEACHER in told) == (name in LIMITS.get(check, ())), told


@common
def test_its_longest_text_is_what_the_plan_says(name: str) -> None:
    config = config_of(name)
    assert longest_text(config) == sizes(config.to_dict())["max_length"]


@common
def test_its_attention_is_read_right(name: str) -> None:
    check_reading(teacher_of(name))


def test_their_exported_students_load_elsewhere(tmp_path: Path) -> None:
    names = ("llama", "gpt2", "qwen3_next")
    for name in names:
        export(name, tmp_path)
    assert loaded_alone(names, tmp_path) == dict.fromkeys(names, "")


REFUSED = {
    "deepseek_v3": "its keys and values come from a latent state that all heads share",
    "bart": "it looks at another text too (cross attention)",
    "bert": "it is a layer of an encoder",
    "mamba": "it has no softmax attention with projections to query, key and value and out of the heads",
    "doge": "its DogeAttention has A, dt_proj, which is not known how to read",
    "openai-gpt": "its Attention takes x, which is not known how to read",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_swapped_is_refused_with_its_reason(name: str) -> None:
    assert refusal(name) == REFUSED[name]
