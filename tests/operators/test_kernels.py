"""Kernels for accelerators against definitions in float64: on a GPU, or by Triton's interpreter in its own process.

Shapes: as in the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from operators.convolution import causal as convolution
from operators.convolution.causal import long_conv_reference, short_conv_reference
from operators.gpu import INTERPRETED, triton
from operators.gpu.channels import gated
from operators.gpu.gates import Operand, adjoint, product, short
from operators.gpu.heads import masked_backward, masked_forward, takes
from operators.gpu.network import sine_network
from operators.gpu.toeplitz import convolve, correlate
from operators.mixing.masked import mix_reference
from operators.registry import build
from tests.operators.cases import CASES, MAX, B, D, draw, generator, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDED = 2e-2  # bfloat16, relative to the norm; the interpreter cuts off instead of rounding
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Runtime", "Deprecation", "User")]
kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
POSITIVE = ImplicitFilterConfig(positive=True, width=64, features=9)
WIDE: dict[str, HyenaConfig] = {
    "order 2": HyenaConfig(init="random"),
    "order 3": HyenaConfig(order=3, init="random"),
    "heads": HyenaConfig(heads=2, init="random"),
    "power": HyenaConfig(
        heads=2, init="random", feature_map="power", degree=4, key_dim=3, normalise=True, key_gate=True, filter=POSITIVE
    ),
    "hedgehog": HyenaConfig(heads=2, init="random", feature_map="hedgehog", normalise=True, filter=POSITIVE),
    "modal": HyenaConfig(heads=2, init="random", filter=ModalFilterConfig(modes=4)),
}
# Of a batch with a mask the second text has all of its positions; without one the mask is not even read.
WITHOUT = ["order 2", "power"]
# Projections of up to 8 positions are laid out otherwise.
SHORT = [("order 2", 3, False), ("order 2", 8, True), ("order 3", 5, False), ("heads", 3, False), ("power", 8, True)]


@pytest.mark.timeout(1200)
@pytest.mark.skipif(triton is None or DEVICE == "cuda", reason="needs Triton, and no GPU")
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", request.config.option.markexpr]
    command.append(__file__)
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]


def on(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(*shape, seed=seed).to(DEVICE, dtype)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= tolerance, float(error)  # NaN is not


def decaying(channels: int, length: int) -> Tensor:
    return on(channels, length, seed=5) * torch.exp(-torch.arange(length, device=DEVICE) / 30)


@kernels
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 64), (2, 150), (17, 70), (9, 256)])
def test_blocks_convolve_and_correlate(batch: int, length: int) -> None:
    z_BDL, g_BDL, h_DL = on(batch, 3, length, seed=1), on(batch, 3, length, seed=2), decaying(3, length)
    wide = [x.double().cpu().requires_grad_() for x in (z_BDL, h_DL)]
    y_BDL = long_conv_reference(wide[0], wide[1], torch.zeros(3, dtype=torch.float64))
    y_BDL.backward(g_BDL.double().cpu())
    near(convolve(z_BDL, h_DL), y_BDL, ROUNDED)
    near(convolve(g_BDL, h_DL, causal=False), wide[0].grad, ROUNDED)  # type: ignore[arg-type]
    near(correlate(g_BDL, z_BDL), wide[1].grad, ROUNDED)  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_gates_and_their_gradients(taps: int, masked: bool) -> None:
    p_BDL, factor_BDL, grad_BDL = (on(2, 3, 1100, seed=seed) for seed in (1, 2, 3))
    taps_DK, bias_D = on(3, taps, seed=4), on(3, seed=5)
    mask_BL = (on(2, 1100, seed=6) > -0.5).float() if masked else None
    wide = [x.double().cpu().requires_grad_() for x in (p_BDL, taps_DK, bias_D)]
    u_BDL = short_conv_reference(*wide)
    y_BDL = u_BDL * factor_BDL.double().cpu() * (1.0 if mask_BL is None else mask_BL.cpu()[:, None])
    y_BDL.backward(grad_BDL.double().cpu())
    near(short(Operand(p_BDL, taps_DK, bias_D), torch.float32), u_BDL, 1e-6)
    near(product(Operand(p_BDL, taps_DK, bias_D), Operand(factor_BDL), mask_BL, torch.float32), y_BDL, 1e-6)
    dp_BDL = torch.full_like(p_BDL, torch.nan)
    sums = adjoint(grad_BDL, Operand(factor_BDL), mask_BL, Operand(p_BDL, taps_DK, bias_D), dp_BDL)
    for found, wanted in zip((dp_BDL, *sums), wide, strict=True):
        near(found, wanted.grad, 1e-5)  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize(
    ("queries", "keys", "key_width", "values", "lags", "degree"),
    [
        (100, 100, 8, 16, 100, None),
        (100, 100, 8, 16, 100, 2),
        (100, 100, 8, 16, 100, 8),
        (70, 130, 4, 17, 130, 8),
        pytest.param(100, 100, 32, 32, 30, None, marks=pytest.mark.slow),
        (64, 64, 1, 33, 64, 2),
        (3, 70, 16, 16, 65, 8),
        pytest.param(144, 192, 64, 65, 192, 2, marks=pytest.mark.slow),
        pytest.param(128, 128, 128, 128, 48, None, marks=pytest.mark.slow),
        pytest.param(128, 128, 128, 128, 48, 8, marks=pytest.mark.slow),
    ],
)
def test_heads_and_their_gradients(
    queries: int, keys: int, key_width: int, values: int, lags: int, degree: int | None
) -> None:
    narrow = torch.bfloat16
    q, k = on(2, 2, key_width, queries, seed=1, dtype=narrow), on(2, 2, key_width, keys, seed=2, dtype=narrow)
    v, grad = on(2, 2, values, keys, seed=3, dtype=narrow), on(2, 2, values, queries, seed=4, dtype=narrow)
    h_HT = decaying(2, lags).abs()
    q, k = q / key_width**0.5, k / key_width**0.5
    wide = [x.double().cpu().requires_grad_() for x in (q, k, v, h_HT)]
    y = mix_reference(*wide[:3], torch.nn.functional.pad(wide[3], (0, keys - lags)), degree)
    y.backward(grad.double().cpu())
    assert takes(q, 4, key_width, values, degree)
    near(masked_forward(q, k, v, h_HT, degree), y, ROUNDED)
    for found, wanted in zip(masked_backward([q, k, v, grad], h_HT, degree), wide, strict=True):
        near(found, wanted.grad, ROUNDED)  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize(
    ("convolutions", "masked", "dtype"),
    [
        *((convolutions, masked, torch.float32) for convolutions in (1, 2) for masked in (False, True)),
        (2, True, torch.bfloat16),
        *(pytest.param(*row, torch.bfloat16, marks=pytest.mark.slow) for row in [(1, False), (1, True), (2, False)]),
    ],
)
def test_channels_and_their_gradients(
    dtype: torch.dtype, convolutions: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:  # a channel at a time
        monkeypatch.setattr(convolution, "BLOCK", 1)
        monkeypatch.setattr(convolution, "BLOCK_ELSEWHERE", 1)
    rows, length = convolutions + 2, 100
    p, grad = on(2, rows, 3, length, seed=1, dtype=dtype), on(2, 3, length, seed=2, dtype=dtype)
    taps, bias = on(rows, 3, 3, seed=3), on(rows, 3, seed=4)
    h = decaying(convolutions * 3, length).view(convolutions, 3, length)
    mask = (torch.arange(length, device=DEVICE) >= torch.tensor([[7], [0]], device=DEVICE)) if masked else None
    inputs = [x.clone().requires_grad_() for x in (p, taps, bias, h)]
    y = gated(inputs[0], mask, *inputs[1:])
    y.backward(grad)
    wide = [x.double().cpu().requires_grad_() for x in (p, taps, bias, h)]
    u = short_conv_reference(wide[0].flatten(1, 2), wide[1].flatten(0, 1), wide[2].flatten()).unflatten(1, (rows, 3))
    u = u if mask is None else u * mask.cpu()[:, None, None]
    value, zero = u[:, -1], torch.zeros(3, dtype=torch.float64)
    for n in range(convolutions):
        value = long_conv_reference(u[:, -2 - n] * value, wide[3][n], zero)
    value = u[:, 0] * value
    value.backward(grad.double().cpu())
    tolerance = 1e-5 if dtype == torch.float32 else 2 * ROUNDED
    near(y, value, tolerance)
    for found, wanted in zip(inputs, wide, strict=True):
        near(found.grad, wanted.grad, tolerance)  # type: ignore[arg-type]


@kernels
@pytest.mark.parametrize(("lags", "features", "width", "depth"), [(1, 3, 8, 1), (50, 5, 64, 3), (33, 17, 20, 2)])
def test_sine_network_and_its_gradients(lags: int, features: int, width: int, depth: int) -> None:
    given = [on(lags, features, seed=1), 3 * on(1, width, seed=2)]
    for layer in range(depth):
        fan_in = width if layer else features
        given += [on(width, fan_in, seed=3 + layer) / fan_in**0.5, on(width, seed=9 + layer)]
    inputs, wide = ([x.clone().to(where).requires_grad_() for x in given] for where in (torch.float32, torch.float64))
    hidden = wide[0]
    for weight, bias in zip(wide[2::2], wide[3::2], strict=True):
        hidden = torch.sin(wide[1] * torch.nn.functional.linear(hidden, weight, bias))
    grad = on(lags, width, seed=20)
    found = sine_network(inputs[0], inputs[1], inputs[2:])
    near(found, hidden, 1e-5)
    found.backward(grad)
    hidden.backward(grad.double())
    for one, other in zip(inputs, wide, strict=True):
        near(one.grad, other.grad, 1e-5)  # type: ignore[arg-type]


def both(case: str, length: int, *, masked: bool = False) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Outputs and gradients under autocast to bfloat16 by the kernels, and in float64 on the CPU."""
    width = 2 if WIDE[case].heads is None else 32
    operator: Any = build(WIDE[case], width, 100)
    operator.initialise(None, generator())
    mask_BL = (torch.arange(length) >= torch.tensor([[length // 3], [0]])) if masked else None
    results = []
    for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float64)):
        operator = operator.to(device, dtype)
        operator.zero_grad()
        x_BLD, grad = (draw(2, length, width, seed=seed).to(device, dtype) for seed in (1, 3))
        x_BLD.requires_grad_()
        given = None if mask_BL is None else mask_BL.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.float32):
            y_BLD = operator(x_BLD, given)
        y_BLD.backward(grad.to(y_BLD.dtype))
        grads = {name: p.grad.cpu() for name, p in operator.named_parameters() if p.grad is not None}
        assert x_BLD.grad is not None
        results.append((y_BLD.detach().cpu(), grads | {"x": x_BLD.grad.cpu()}))
    return results


LONG = [*((case, 80, True) for case in WIDE), *((case, 80, False) for case in WITHOUT)]
QUICK = [("order 2", 80, True), ("power", 80, True), ("order 2", 3, False)]


@kernels
@pytest.mark.parametrize(
    ("case", "length", "masked"),
    [pytest.param(*row, marks=[] if row in QUICK else [pytest.mark.slow]) for row in [*LONG, *SHORT]],
)
def test_operators_in_half_precision(case: str, length: int, masked: bool) -> None:
    (y, grads), (wanted_y, wanted) = both(case, length, masked=masked)
    near(y, wanted_y, 2 * ROUNDED)
    assert grads.keys() == wanted.keys()
    near(*(torch.cat([one[name].flatten().double() for name in wanted]) for one in (grads, wanted)), 2 * ROUNDED)
    for name in wanted:
        near(grads[name], wanted[name], 20 * ROUNDED)  # what is a small difference of large sums among it


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_every_operator_agrees_with_the_cpu(case: str) -> None:
    operator, x_BLD = make(case), draw(B, MAX, D)
    if case == "skip":
        return
    results = []
    for device in ("cpu", "cuda"):
        moved = make(case).to(device)
        inputs = x_BLD.clone().to(device).requires_grad_()
        y_BLD = moved(inputs)
        y_BLD.backward(draw(B, MAX, D, seed=3).to(device))
        grads = {name: p.grad for name, p in moved.named_parameters() if p.grad is not None}
        with torch.no_grad():
            state, parts = moved.init_state(B), []
            for part in inputs.detach().split([20, 1, 1, 30, *[1] * (MAX - 52)], dim=1):
                parts.append(moved.extend(part, state)[0])
        results.append({"y": y_BLD, "x": inputs.grad, "steps": torch.cat(parts, dim=1), **grads})
    for name, wanted in results[0].items():
        near(results[1][name], wanted, 1e-4)  # type: ignore[arg-type]
    near(results[1]["steps"], operator(x_BLD), 1e-4)  # type: ignore[arg-type]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("narrow", [True, False])
def test_nothing_waits_for_the_gpu_and_bits_repeat(case: str, narrow: bool) -> None:
    operator: Any = build(WIDE[case], 64, 300)
    operator.initialise(None, generator())
    operator, x_BLD = operator.to(DEVICE), on(2, 200, 64, seed=1)

    def trained() -> list[Tensor]:
        operator.zero_grad()
        inputs = x_BLD.clone().requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=narrow):
            operator(inputs).square().mean().backward()
        assert inputs.grad is not None
        return [inputs.grad, *(p.grad.clone() for p in operator.parameters() if p.grad is not None)]

    def decoded() -> None:
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=narrow):
            state = operator.init_state(2)
            for part in x_BLD.split([100, *[1] * 70, 30], dim=1):
                operator.extend(part, state)

    first = trained()
    decoded()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = trained()
        decoded()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
