"""The worked example of docs/extending.md: an operator of one's own keeps the contract, and models decode by it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from operators.registry import OPERATORS
from orchestrator.distill.models.swap import swap
from tests.models.models import teacher_of
from tests.operators import cases, test_contract

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
CONTRACT = [name for name, test in vars(test_contract).items() if hasattr(test, "pytestmark")]


@pytest.fixture(autouse=True)
def mean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration of the page's example, which is a kind and two cases for the time of a test."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, str(PAGE), "exec"), names)
    monkeypatch.setitem(OPERATORS, "mean", names["Mean"])
    monkeypatch.setitem(cases.CASES, "mean", names["MeanConfig"]())
    monkeypatch.setitem(cases.CASES, "mean, random", names["MeanConfig"](init="random"))
    monkeypatch.setitem(cases.INNER, "mean, random", 12)
    return names["MeanConfig"]()


@pytest.mark.parametrize("case", ["mean", "mean, random"])
@pytest.mark.parametrize("name", CONTRACT)
def test_it_keeps_the_contract(name: str, case: str) -> None:
    test = getattr(test_contract, name)
    axes = [mark.args for mark in test.pytestmark if mark.args[0] != "case"]
    for values in itertools.product(*(values for _, values in axes)):
        test(case, **{axis: value for (axis, _), value in zip(axes, values, strict=True)})


@torch.no_grad()
def test_a_model_decodes_by_it(mean: Any) -> None:
    model = teacher_of("llama")
    swap(model, [0], mean, torch.Generator().manual_seed(0))
    prompt = torch.tensor([[5, 9, 2, 7, 4]])
    told = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **told), model.generate(prompt, use_cache=False, **told))
