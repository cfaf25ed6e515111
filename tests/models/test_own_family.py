"""The worked example of docs/families.md: a class of one's own goes through everything by its entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from operators.config import HyenaConfig
from orchestrator.distill.measuring.statistics import attention_statistics
from orchestrator.distill.models import families as module
from orchestrator.distill.models.families import Family
from orchestrator.distill.models.projections import Parts
from orchestrator.distill.models.sites import sites
from orchestrator.distill.models.swap import swap
from orchestrator.distill.models.verify import check_reading
from orchestrator.distill.training.head import check_output_head
from tests.models.models import HEADS, text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


class Entry:
    """An entry point that is installed."""

    def __init__(self, name: str, loaded: Any) -> None:
        self.name, self.loaded = name, loaded

    def load(self) -> Any:
        return self.loaded


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names that the page's example defines."""
    names: dict[str, Any] = {"__name__": "pairs"}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def installed(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entries = [Entry("pairs", example["FAMILY"])]
    monkeypatch.setattr(module, "entry_points", lambda group: entries if group == "layerswap.families" else [])
    module.families.cache_clear()
    yield
    module.families.cache_clear()


def model_of(example: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(example["PairsConfig"]()).eval()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("operator", [HyenaConfig(), HEADS], ids=["channels", "heads"])
def test_the_example_is_swapped_and_decodes(example: dict[str, Any], operator: HyenaConfig) -> None:
    model, ids = model_of(example), text() % 64
    check_reading(model)
    check_output_head(model)
    assert list(sites(model)) == [0, 1]
    statistics = attention_statistics(model, (0, 1), ids)
    swap(model, (0, 1), operator, torch.Generator().manual_seed(0), statistics=statistics)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*made)


def test_without_its_entry_it_is_refused(example: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^models of type 'pairs' cannot be swapped: it has no softmax attention"):
        sites(model_of(example))


@pytest.mark.usefixtures("installed")
def test_an_entry_that_reads_wrong_is_found_out(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(attention: Any) -> Any:
        parts = example["parts"](attention)
        return Parts(parts.query, parts.value, parts.key)

    wrong = Family(parts=swapped, attention="mixer")
    monkeypatch.setattr(module, "entry_points", lambda group: [Entry("pairs", wrong)])
    module.families.cache_clear()
    with pytest.raises(ValueError, match=r"^layer 0: what was read of PairsAttention gives outputs .* off its own"):
        check_reading(model_of(example))


def test_an_entry_point_that_is_no_family_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "entry_points", lambda group: [Entry("pairs", "a word")])
    module.families.cache_clear()
    with pytest.raises(ValueError, match=r"^the entry point 'pairs' of layerswap.families must be a Family"):
        module.families()
    module.families.cache_clear()
