"""Whole operators against their definitions, position by position in float64, from their parameters alone.

`reference` shares with `forward` what both read from a configuration; here nothing is shared but the filters' values.

Shapes: B batch, L positions, D model width, H heads, K width of query and key, V of value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from operators.config import HyenaConfig, ImplicitFilterConfig, WindowConfig
from operators.registry import build
from tests.operators.cases import CASES, B, D, draw, generator, make, rows

LENGTH = 23
HEADS = [name for name, config in CASES.items() if isinstance(config, HyenaConfig) and config.heads]
NEAR = [name for name, config in CASES.items() if getattr(config, "window", None)]
CHANNELS = [name for name, config in CASES.items() if isinstance(config, HyenaConfig) and not config.heads]


def stirred(case: str) -> Any:
    """The operator of a case in float64, with what a new one has at zero or one moved away from it."""
    operator = make(case).double()
    with torch.no_grad():
        for seed, name in enumerate(("direct", "short_weight", "short_bias", "hedgehog")):
            parameter = getattr(operator, name, None)
            if parameter is not None:
                parameter.add_(0.5 * draw(*parameter.shape, seed=20 + seed))
        for seed, parameter in enumerate(operator.near.parameters() if case in NEAR else ()):
            parameter.add_(0.3 * draw(*parameter.shape, seed=30 + seed))
    return operator


def convolved(operator: Any, x_LD: Tensor) -> Tensor:
    """Projections and the short convolution after them, (E, L): the last tap weighs the present."""
    p_LE = x_LD @ operator.in_proj.weight.t() + operator.in_proj.bias
    taps = operator.short_weight.shape[1]
    rows = []
    for t in range(len(p_LE)):
        past = [operator.short_weight[:, taps - 1 - lag] * p_LE[t - lag] for lag in range(min(taps, t + 1))]
        rows.append(operator.short_bias + torch.stack(past).sum(0))
    return torch.stack(rows, dim=1)


def likeness(operator: Any, head: int, q_K: Tensor, k_K: Tensor) -> Tensor:
    """f(q, k) of the feature map."""
    config = operator.config
    match config.feature_map:
        case "identity":
            return q_K @ k_K / len(q_K) ** 0.5
        case "power":
            return (1 + q_K @ k_K / config.degree) ** config.degree
        case _:
            mapped = [operator.hedgehog[head] @ part for part in (q_K, k_K)]
            features = [torch.cat([part, -part]).softmax(0) for part in mapped]
            return features[0] @ features[1]


def normed(operator: Any, name: str, x_IL: Tensor) -> Tensor:
    """Near queries or keys at every position after their norm, (I, L)."""
    kind, heads = operator.config.near_norm, len(x_IL) * operator.config.heads // operator.inner
    if kind == "none":
        return x_IL
    weight_I, bias_I = (getattr(operator.near, f"{name}_{part}") for part in ("weight", "bias"))
    columns = []
    for x_I in x_IL.t():
        parts = [x_I] if kind.endswith("_all") else x_I.chunk(heads)
        parts = [part - part.mean() for part in parts] if kind.startswith("layer") else parts
        columns.append(
            torch.cat([part / (part @ part / len(part) + 1e-6) ** 0.5 for part in parts]) * weight_I + bias_I
        )
    return torch.stack(columns, dim=1)


def turned(operator: Any, x_K: Tensor, place: int) -> Tensor:
    """Pairs of channels, halves apart, as complex numbers times exp(i place frequency)."""
    pairs = len(x_K) // 2
    turn_P = torch.polar(torch.ones(pairs).double(), place * operator.near.frequencies)
    found_P = torch.complex(x_K[:pairs], x_K[pairs : 2 * pairs]) * turn_P
    return torch.cat([found_P.real, found_P.imag, x_K[2 * pairs :]])


def groups(operator: Any) -> int:
    return operator.config.groups or operator.config.heads  # type: ignore[no-any-return]


def shared(operator: Any, x_RL: Tensor) -> Tensor:
    """Rows of groups of heads, for every head."""
    per, parts = operator.config.heads // groups(operator), x_RL.chunk(groups(operator))
    return torch.cat([parts[head // per] for head in range(operator.config.heads)])


def near_weights(operator: Any, q_EL: Tensor, k_EL: Tensor, head: int, t: int) -> dict[int, Tensor]:
    """exp(q_t . k_s / sqrt(K) - c_t) of near positions s, by s, of normed queries and keys; c is 0 without a level."""
    config, width = operator.config, operator.inner // operator.config.heads
    own = slice(head * width, (head + 1) * width)
    q_KL, k_KL = q_EL[own], k_EL[own]
    level = torch.zeros(()).double()
    if hasattr(operator.near, "shift"):
        level = q_KL[:, t] @ operator.near.mean_key[own] / width**0.5 + operator.near.shift[head]
    seen = [s for s in range(t + 1) if t - s < config.window or s < config.sinks]
    q_K = turned(operator, q_KL[:, t], t)
    return {s: (q_K @ turned(operator, k_KL[:, s], s) / width**0.5 - level).exp() for s in seen}


def window_by_definition(operator: Any, x_LD: Tensor) -> Tensor:
    """Softmax over near positions."""
    width, outputs = operator.inner // operator.config.heads, []
    fewer = width * groups(operator)
    v_RL, q_EL, k_RL = convolved(operator, x_LD).split([fewer, operator.inner, fewer])
    v_IL, q_EL, k_EL = shared(operator, v_RL), normed(operator, "query", q_EL), normed(operator, "key", k_RL)
    k_EL = shared(operator, k_EL)
    for head in range(operator.config.heads):
        own, rows = slice(head * width, (head + 1) * width), []
        for t in range(len(x_LD)):
            weights = near_weights(operator, q_EL, k_EL, head, t)
            mixed_V = torch.stack([weight * v_IL[own, s] for s, weight in weights.items()]).sum(0)
            rows.append(mixed_V / torch.stack([*weights.values()]).sum() + operator.direct[own] * v_IL[own, t])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=1) @ operator.out_proj.weight.t() + operator.out_proj.bias


def heads_by_definition(operator: Any, x_LD: Tensor) -> Tensor:
    """y_t = sum_s h_{t-s} f(q_t, k_s) g_s v_s / n_t + direct v_t, g = exp(gate) with gates above 10 taken for 10; with
    a window near positions have another weight, and g = 1. Where queries and keys are tied, far ones are the near
    queries / sqrt(K) and keys less the centre."""
    config, length, width = operator.config, len(x_LD), operator.inner
    heads, key_width = config.heads, config.key_dim or width // config.heads
    fewer = width // heads * groups(operator)
    near_width, near_fewer = (width, fewer) if config.window and not config.tied else (0, 0)
    far_width = fewer if config.tied else heads * key_width
    q_EL, k_EL, v_RL, gate_HL, near_q_EL, near_k_EL = convolved(operator, x_LD).split(
        [heads * key_width, far_width, fewer, heads if config.key_gate else 0, near_width, near_fewer]
    )
    v_IL = shared(operator, v_RL)
    if config.tied:
        near_q_EL, near_k_EL = q_EL, k_EL
    if config.window:
        near_q_EL, near_k_EL = normed(operator, "query", near_q_EL), normed(operator, "key", near_k_EL)
    if config.tied:
        q_EL, k_EL = near_q_EL / key_width**0.5, shared(operator, near_k_EL - operator.near.centre[:, None])
    if config.window:
        near_k_EL = shared(operator, near_k_EL)
    h_HL, outputs = operator.filter(length), []
    for head in range(heads):
        mine, own = (slice(head * each, (head + 1) * each) for each in (key_width, width // heads))
        q_KL, k_KL, v_VL = q_EL[mine], k_EL[mine], v_IL[own]
        rows = []
        for t in range(length):
            weights = []
            for s in range(t + 1):
                gate = gate_HL[head, s].clamp(max=10.0).exp() if config.key_gate else 1.0
                weights.append(h_HL[head, t - s] * likeness(operator, head, q_KL[:, t], k_KL[:, s]) * gate)
            if config.window:
                for s, weight in near_weights(operator, near_q_EL, near_k_EL, head, t).items():
                    weights[s] = weight
            weight_T = torch.stack(weights)
            mixed_V = v_VL[:, : t + 1] @ weight_T
            if config.normalise:
                mixed_V = mixed_V / (weight_T.sum() + (0.0 if config.window else 1e-6))
            rows.append(mixed_V + operator.direct[own] * v_VL[:, t])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=1) @ operator.out_proj.weight.t() + operator.out_proj.bias


def channels_by_definition(operator: Any, x_LD: Tensor) -> Tensor:
    """v <- h_n * (x_n v) + direct_n x_n v from the last gate to x_1, then x_0 v."""
    length, width, order = len(x_LD), operator.inner, operator.config.order
    first_DL, *gates, v_DL = convolved(operator, x_LD).split(width)
    h_CL, direct_C = operator.filter(length), operator.direct
    for n, gate_DL in enumerate(reversed(gates)):
        mine = slice(n * width, (n + 1) * width)
        z_DL = gate_DL * v_DL
        rows = [(h_CL[mine, : t + 1].flip(1) * z_DL[:, : t + 1]).sum(1) for t in range(length)]
        v_DL = torch.stack(rows, dim=1) + direct_C[mine, None] * z_DL
    assert len(gates) == order - 1
    return (first_DL * v_DL).t() @ operator.out_proj.weight.t() + operator.out_proj.bias


def step_by_step(operator: Any, x_BLD: Tensor) -> Tensor:
    """A prompt of three positions, then one at a time."""
    state = operator.init_state(len(x_BLD))
    cuts = [slice(0, 3), *(slice(t, t + 1) for t in range(3, LENGTH))]
    parts = [operator.extend(x_BLD[:, cut], state)[0] for cut in cuts]
    return torch.cat(parts, dim=1)


def definition(operator: Any) -> Callable[[Any, Tensor], Tensor]:
    """The one of its kind."""
    if isinstance(operator.config, WindowConfig):
        return window_by_definition
    return heads_by_definition if operator.config.heads else channels_by_definition


@pytest.mark.parametrize("case", rows([*HEADS, *CHANNELS, *(case for case in NEAR if case not in HEADS)]))
@torch.no_grad()
def test_whole_sequences_and_steps_are_the_definition(case: str) -> None:
    operator, x_BLD = stirred(case), draw(B, LENGTH, D).double()
    defined = definition(operator)
    wanted = torch.stack([defined(operator, x_LD) for x_LD in x_BLD])
    largest = wanted.abs().max()
    with torch.enable_grad():
        trained = operator(x_BLD)
    for found in (operator(x_BLD), trained, step_by_step(operator, x_BLD)):
        assert (found - wanted).abs().max() <= 1e-9 * largest
    operator.direct.mul_(1.1)  # it is of a size that would be missed
    assert (defined(operator, x_BLD[0]) - wanted[0]).abs().max() > 1e-4 * largest


@pytest.mark.parametrize("case", ["gated", "power, full", "modal, heads, gated"])
@torch.no_grad()
def test_a_gate_weighs_no_position_more_than_exp_of_10(case: str) -> None:
    """What single tokens are worth may grow without bound in training, and exp must not overflow."""
    operator, x_BLD = stirred(case), draw(B, LENGTH, D).double()
    heads = operator.config.heads
    gates = torch.stack([convolved(operator, x_LD)[-heads:] for x_LD in x_BLD])
    operator.short_bias[-heads:] += 10.0 - gates.transpose(0, 1).flatten(1).median(1).values  # half are beyond it
    wanted = torch.stack([heads_by_definition(operator, x_LD) for x_LD in x_BLD])
    for found in (operator(x_BLD), step_by_step(operator, x_BLD)):
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    operator.short_bias[-heads:] += 1e4
    assert torch.isfinite(operator.float()(x_BLD.float())).all()


@pytest.mark.parametrize("case", ["hedgehog", "hedgehog, signed"])
def test_the_map_of_hedgehog_starts_as_the_identity(case: str) -> None:
    operator = make(case)
    width = operator.hedgehog.shape[-1]
    assert torch.equal(operator.hedgehog, torch.eye(width).expand(operator.config.heads, width, width))


@pytest.mark.parametrize("case", rows(HEADS))
def test_gradients_in_bfloat16_near_those_of_the_definition(case: str) -> None:
    """Of all that lies around the filter, what is computed again for backward among it."""
    x_BLD, cotangent = draw(2, LENGTH, D), draw(2, LENGTH, D, seed=3)
    exact, narrow = stirred(case), stirred(case).float()
    wanted = torch.stack([heads_by_definition(exact, x_LD) for x_LD in x_BLD.double()])
    (wanted * cotangent).sum().backward()  # type: ignore[no-untyped-call]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = narrow(x_BLD)
    (found.float() * cotangent).sum().backward()
    for name, parameter in exact.named_parameters():
        if not name.startswith("filter.") and parameter.requires_grad:
            off = (narrow.get_parameter(name).grad - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-9)
            most = 0.2 if case == "power, full" else 0.03  # its gates, up to exp(10), stretch what is rounded
            # Features of squares are rounded too, and a centre that heads share has a small difference as its gradient.
            most = 0.06 if case.endswith(("squares", "tied, groups")) else most
            # So has what shifts a level, a number a head: by the processor it was off by up to .031.
            most = max(most, 0.05) if name == "near.shift" else most
            assert off < most, f"{name} is off by {off:.2g}"


POSITIVE = ImplicitFilterConfig(positive=True)
NARROW = {  # bytes a position and channel that a training pass leaves in memory, its outputs among them
    "gated": (HyenaConfig(heads=4, init="random", key_gate=True), 27),
    "power": (HyenaConfig(heads=4, init="random", feature_map="power", normalise=True, filter=POSITIVE), 21),
    "hedgehog": (HyenaConfig(heads=4, init="random", feature_map="hedgehog", normalise=True, filter=POSITIVE), 33),
}


def left_by(computed: Callable[[], Tensor]) -> int:
    """Bytes that a computation has taken and not given back, as the allocator counts them.

    Hooks on what autograd saves do not see what is saved under other hooks.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = computed()
    assert kept.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize("name", NARROW)
def test_training_in_bfloat16_keeps_the_projections_once(name: str) -> None:
    """What the short convolution makes of them is computed again; were it kept, it were 30, 24 and 36 bytes."""
    config, most = NARROW[name]
    operator: Any = build(config, 64, 256)
    operator.initialise(None, generator())
    x_BLD = draw(2, 256, 64).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return operator(x_BLD)  # type: ignore[no-any-return]

    forward()  # what is made once and stays
    assert left_by(forward) <= most * x_BLD.numel()


def test_training_a_long_filter_does_not_keep_its_network() -> None:
    """Nine times a width of 32 a position, were it kept."""
    operator: Any = build(HyenaConfig(init="random"), 16, 1024)
    operator.initialise(None, generator())
    assert left_by(lambda: operator.filter(1024)) <= 3 * 32 * 1024 * 4
