"""Attention's products in float32 where others may be rounded (`numerics.matmul: medium`).

A CPU with matrix units multiplies large matrices of float32 up to twice as fast in bfloat16. Flash attention multiplies
small ones, a block of queries at a time, and those take two to three times as long that way. So models of transformers
that attend by torch's `scaled_dot_product_attention` keep it in float32, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

SDPA, ROUNDED, EXACT = "sdpa", "medium", "highest"


def attend_in_float32() -> None:
    """From now on, in this process, attention on CPUs is in float32 while torch's precision of products is medium."""
    attention = ATTENTIONS[SDPA]
    if not isinstance(attention, _Attention):
        ATTENTIONS[SDPA] = _Attention(attention)


class _Attention:
    """What transformers calls to attend, around its own function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: Any, q_BHLK: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        if torch.get_float32_matmul_precision() != ROUNDED or not q_BHLK.is_cpu:
            return self.function(module, q_BHLK, *arguments, **more)
        with _InFloat32():
            return self.function(module, q_BHLK, *arguments, **more)


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*arguments, **(more or {}))
        torch.set_float32_matmul_precision(EXACT)
        try:
            y_BHLV = function(*arguments, **(more or {}))
        finally:
            torch.set_float32_matmul_precision(ROUNDED)
        if y_BHLV.grad_fn is not None:  # flash attention itself, which goes backwards later
            y_BHLV.grad_fn.register_prehook(lambda _: torch.set_float32_matmul_precision(EXACT))
            y_BHLV.grad_fn.register_hook(lambda *_: torch.set_float32_matmul_precision(ROUNDED))
        return y_BHLV
