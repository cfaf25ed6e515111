"""The sine network of implicit filters in one kernel, forwards and backwards, instead of a dozen small ones.

    x_0 = features,   x_{n+1} = sin(frequency (W_n x_n + b_n))

Programs take a few lags each through all layers. Backward computes the layers again, and leaves a part of each
weight's gradient for every program; these are summed in a fixed order. Products are in full float32.

Shapes: L lags, F features, W width, P numbers of all weights and biases in order, S programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.gpu import Kernel, jit, next_power, tl

LAGS = 16  # of a program
WIDEST = 64  # layer: a program has the weights of a whole one at hand


@jit
def _square(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the entries of a matrix are, and which there are."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return at + r[:, None] * columns + c[None, :], (r < rows)[:, None] & (c < columns)[None, :]


@jit
def _layer(x, weights, fan_in, width, IN: tl.constexpr, W: tl.constexpr):
    """What the sine is taken of but for the frequency; and the weights (W, IN)."""
    place, there = _square(weights, width, fan_in, W, IN)
    weight = tl.load(place, mask=there, other=0.0)
    w = tl.arange(0, W)
    bias = tl.load(weights + width * fan_in + w, mask=w < width, other=0.0)
    return tl.dot(x, tl.trans(weight), input_precision="ieee") + bias[None, :], weight


@jit
def _inner(weights, layer, features, width):
    """Where a layer's weights begin, from the second layer on."""
    return weights + width * (features + 1) + (layer - 1) * width * (width + 1)


@jit
def _up_to(x, weights, frequency, features, width, LAYERS: tl.constexpr, F: tl.constexpr, W: tl.constexpr):
    """The output of the first layers, at least one."""
    a, _ = _layer(x, weights, features, width, F, W)
    hidden = tl.sin(frequency * a)
    for layer in tl.static_range(1, LAYERS):
        a, _ = _layer(hidden, _inner(weights, layer, features, width), width, width, W, W)
        hidden = tl.sin(frequency * a)
    return hidden


@Kernel
def _forward(
    x, weights, frequency, out, lags, features, width,
    LAYERS: tl.constexpr, F: tl.constexpr, W: tl.constexpr, LAGS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * LAGS
    w = tl.arange(0, W)
    rate = tl.load(frequency + w, mask=w < width, other=0.0)[None, :]
    place, there = _square(x + first * features, lags - first, features, LAGS, F)
    hidden = _up_to(tl.load(place, mask=there, other=0.0), weights, rate, features, width, LAYERS, F, W)
    place, there = _square(out + first * width, lags - first, width, LAGS, W)
    tl.store(place, hidden, mask=there)


@jit
def _back(dhidden, a, rate, x, parts, fan_in, width, IN: tl.constexpr, W: tl.constexpr):
    """Gradient before the sine, and that of the frequency; those of weights and bias are stored."""
    slope = dhidden * tl.cos(rate * a)
    da, w = slope * rate, tl.arange(0, W)
    place, there = _square(parts, width, fan_in, W, IN)
    tl.store(place, tl.dot(tl.trans(da), x, input_precision="ieee"), mask=there)
    tl.store(parts + width * fan_in + w, tl.sum(da, axis=0), mask=w < width)
    return da, tl.sum(slope * a, axis=0)


@Kernel
def _backward(
    x, weights, frequency, dout, dx, parts, lags, features, width, numbers,
    LAYERS: tl.constexpr, F: tl.constexpr, W: tl.constexpr, LAGS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * LAGS
    w = tl.arange(0, W)
    rate = tl.load(frequency + w, mask=w < width, other=0.0)[None, :]
    parts += tl.program_id(0).to(tl.int64) * (numbers + width)
    place, there = _square(x + first * features, lags - first, features, LAGS, F)
    inputs = tl.load(place, mask=there, other=0.0)
    given, real = _square(dout + first * width, lags - first, width, LAGS, W)
    dhidden = tl.load(given, mask=real, other=0.0)
    drate = tl.zeros((W,), tl.float32)
    for back in tl.static_range(1, LAYERS):
        hidden = _up_to(inputs, weights, rate, features, width, LAYERS - back, F, W)
        at = _inner(weights, LAYERS - back, features, width)
        a, weight = _layer(hidden, at, width, width, W, W)
        to = _inner(parts, LAYERS - back, features, width)
        da, drate_here = _back(dhidden, a, rate, hidden, to, width, width, W, W)
        drate += drate_here
        dhidden = tl.dot(da, weight, input_precision="ieee")
    a, weight = _layer(inputs, weights, features, width, F, W)
    da, drate_here = _back(dhidden, a, rate, inputs, parts, features, width, F, W)
    tl.store(parts + numbers + w, drate + drate_here, mask=w < width)
    to, there = _square(dx + first * features, lags - first, features, LAGS, F)
    tl.store(to, tl.dot(da, weight, input_precision="ieee"), mask=there)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LF: Tensor, frequency_1W: Tensor, *layers: Tensor) -> Tensor:
        weights_P = torch.cat([part.flatten() for part in layers])
        ctx.save_for_backward(x_LF, frequency_1W, weights_P)
        ctx.shapes = [part.shape for part in layers]
        out_LW = x_LF.new_empty(len(x_LF), frequency_1W.shape[1])
        grid, shape, how = _launch(x_LF, frequency_1W, len(layers))
        _forward[grid](x_LF, weights_P, frequency_1W, out_LW, *shape, **how)
        return out_LW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LW: Tensor) -> tuple[Tensor, ...]:
        x_LF, frequency_1W, weights_P = ctx.saved_tensors
        dx_LF, numbers = torch.empty_like(x_LF), len(weights_P)
        grid, shape, how = _launch(x_LF, frequency_1W, len(ctx.shapes))
        parts_SP = x_LF.new_empty(*grid, numbers + frequency_1W.shape[1])
        inputs = (x_LF, weights_P, frequency_1W, grad_LW.contiguous())
        _backward[grid](*inputs, dx_LF, parts_SP, *shape, numbers, **how)
        sizes = [shape.numel() for shape in ctx.shapes]
        *flat, dfrequency_W = parts_SP.sum(0).split([*sizes, frequency_1W.shape[1]])
        layers = (part.view(shape) for part, shape in zip(flat, ctx.shapes, strict=True))
        return dx_LF, dfrequency_W.view(1, -1), *layers


def _launch(x_LF: Tensor, frequency_1W: Tensor, weights: int) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, shapes, and what is compiled in."""
    (lags, features), width = x_LF.shape, frequency_1W.shape[1]
    how = {"LAYERS": weights // 2, "F": next_power(features, 16), "W": next_power(width, 16), "LAGS": LAGS}
    how["num_warps"] = 8  # fewer have too few registers
    return (-(-lags // LAGS),), (lags, features, width), how


def sine_network(x_LF: Tensor, frequency_1W: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """What the last of `layers`, each a weight (W, F or W) and a bias (W,), gives: (L, W), float32 as all inputs."""
    return cast(Tensor, _Network.apply(x_LF.contiguous(), frequency_1W, *layers))
