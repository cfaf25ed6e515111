"""Attention stays in float32 where other products are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.training.attention import ATTENTIONS, SDPA
from orchestrator.distill.training.loop import prepare
from orchestrator.study.recipe import Numerics

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def precision() -> Iterator[None]:
    before, attention = torch.get_float32_matmul_precision(), ATTENTIONS[SDPA]
    yield
    ATTENTIONS[SDPA] = attention
    torch.set_float32_matmul_precision(before)


class Watching(TorchDispatchMode):
    """Notes the precision in which attention, and what projects its queries, keys and values, is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        self.seen.setdefault(function.overloadpacket.__name__, set()).add(torch.get_float32_matmul_precision())
        return function(*arguments, **(more or {}))


@pytest.mark.parametrize(("matmul", "attention"), [("medium", "highest"), ("highest", "highest"), ("high", "high")])
def test_attention_is_in_float32_forwards_and_backwards_and_what_is_around_as_the_study_says(
    tiny_teacher: Path, precision: None, matmul: Any, attention: str
) -> None:
    prepare(Numerics(matmul=matmul))
    model = load_teacher(tiny_teacher).train().requires_grad_(True)
    with Watching() as watching:
        model(input_ids=torch.arange(12).view(1, 12)).logits.sum().backward()
    flash = {name: found for name, found in watching.seen.items() if "flash_attention" in name}
    assert sorted(flash) == [FLASH, f"{FLASH}_backward"] and set.union(*flash.values()) == {attention}
    assert watching.seen["addmm"] == watching.seen["mm"] == {matmul} == {torch.get_float32_matmul_precision()}


def test_gradients_are_those_of_float32(precision: None) -> None:
    prepare(Numerics(matmul="medium"))
    parts = [torch.randn(2, 4, 96, 32, requires_grad=True) for _ in range(3)]
    by_BLHV = torch.randn(2, 96, 4, 32)
    module = torch.nn.Module()
    y_BLHV, _ = ATTENTIONS[SDPA](module, *parts, None, is_causal=True)
    found = [y_BLHV, *torch.autograd.grad((y_BLHV * by_BLHV).sum(), parts)]
    q_BHLK, k_BHLK, v_BHLV = exact = [part.detach().double().requires_grad_() for part in parts]
    wanted_BLHV = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLV, is_causal=True).transpose(1, 2)
    wanted = [wanted_BLHV, *torch.autograd.grad((wanted_BLHV * by_BLHV).sum(), exact)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-4)
