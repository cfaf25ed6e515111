"""Kernels for accelerators, in Triton: what an operator does between its projections in half precision.

    gates      short convolutions, products and masks in one pass, forwards and backwards
    toeplitz   long convolutions as matrix products of Toeplitz blocks, bfloat16 operands and float32 sums
    channels   channel-wise Hyena of these two, with FFTs where sequences are long or in float32
    network    the sine network of implicit filters
    heads      masked mixing of heads block by block, nothing quadratic in memory

Triton comes with torch wherever torch serves such a device; without it, and on GPUs older than compute capability 8.0,
everything runs in torch. Results repeat bit for bit: sums have a fixed order, nothing is added atomically.
`TRITON_INTERPRET=1` runs the kernels on the CPU, slowly; `LAYERSWAP_KERNELS=0` leaves all to torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INTERPRETED", "OPERAND", "Kernel", "accelerated", "jit", "next_power", "tl", "touching", "triton"]

OFF = os.environ.get("LAYERSWAP_KERNELS") == "0"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Operands of matrix products, once rounded to bfloat16: Triton's interpreter multiplies none of that.
OPERAND: Any = None if triton is None else tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself, never to be called, where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


class Kernel:
    """A kernel to be launched, `kernel[grid](x, ...)`, on the device where its first argument is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = jit(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(x: Tensor, /, *others: Any, **how: Any) -> None:
            with torch.cuda.device_of(x):
                self.function[grid](x, *others, **how)

        return launch


def accelerated(x: Tensor) -> bool:
    """Whether there are kernels for where `x` is."""
    if triton is None or OFF:
        return False
    return _multiplies_bfloat16(x.device) if x.is_cuda else INTERPRETED and x.is_cpu


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def touching(x: Tensor) -> Tensor:
    """x with neighbours along the last axis side by side in memory, copied if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def next_power(count: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `count` nor below `least`."""
    return max(least, 1 << (count - 1).bit_length())
