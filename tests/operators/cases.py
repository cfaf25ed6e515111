"""Named configurations that every operator test runs over, and what they are built from.

Shapes: B batch, L positions, D model width.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    OperatorConfig,
    SkipConfig,
    WindowConfig,
)
from operators.registry import build
from operators.transfer.attention import AttentionStatistics, AttentionWeights
from operators.transfer.rotation import Rotation

B, D, MAX = 3, 8, 80
LINEAR = ImplicitFilterConfig(window="linear", offset=0.0, sine_frequency=1.0, depth=1, train_features=True)
POSITIVE = ImplicitFilterConfig(positive=True, width=64, features=9)
POWER: dict[str, Any] = {"heads": 2, "feature_map": "power", "normalise": True}
CASES: dict[str, OperatorConfig] = {
    "order 2": HyenaConfig(init="random"),
    "order 3": HyenaConfig(order=3, init="random"),
    "order 4": HyenaConfig(order=4, short_taps=1, init="random"),
    "linear window": HyenaConfig(init="random", short_taps=4, filter=LINEAR),
    "one head": HyenaConfig(heads=1, init="random"),
    "heads": HyenaConfig(heads=4, init="random"),
    "heads, linear window": HyenaConfig(heads=2, init="random", filter=LINEAR),
    "frozen frequency": HyenaConfig(
        init="random", filter=ImplicitFilterConfig(train_frequency=False, sine_frequency=10.0)
    ),
    "positive filter": HyenaConfig(init="random", filter=ImplicitFilterConfig(positive=True)),
    "heads, positive filter": HyenaConfig(heads=2, filter=ImplicitFilterConfig(positive=True, width=64, features=9)),
    "transferred": HyenaConfig(),
    "transferred, heads": HyenaConfig(heads=2),
    "power": HyenaConfig(heads=2, init="random", feature_map="power", degree=2),
    "power, full": HyenaConfig(
        heads=2, feature_map="power", degree=4, key_dim=3, normalise=True, key_gate=True, filter=POSITIVE
    ),
    "power of eight, full": HyenaConfig(
        heads=4, init="random", feature_map="power", degree=8, key_dim=1, normalise=True, key_gate=True, filter=POSITIVE
    ),
    "low rank": HyenaConfig(heads=2, key_dim=2),
    "gated": HyenaConfig(heads=2, key_gate=True),
    "hedgehog": HyenaConfig(heads=2, feature_map="hedgehog", normalise=True, filter=POSITIVE),
    "hedgehog, signed": HyenaConfig(heads=1, init="random", feature_map="hedgehog", key_dim=5),
    "modal, order 2": HyenaConfig(init="random", filter=ModalFilterConfig()),
    "modal, order 3": HyenaConfig(order=3, init="random", filter=ModalFilterConfig(modes=3)),
    "modal, real": HyenaConfig(filter=ModalFilterConfig(modes=1, positive=True)),
    "modal, heads": HyenaConfig(heads=4, init="random", filter=ModalFilterConfig(modes=4)),
    "modal, heads, gated": HyenaConfig(
        heads=2, init="random", key_dim=3, key_gate=True, filter=ModalFilterConfig(modes=3, positive=True)
    ),
    "modal, heads, power": HyenaConfig(filter=ModalFilterConfig(positive=True), **POWER),
    "modal, heads, squares": HyenaConfig(
        degree=2, key_dim=3, key_gate=True, filter=ModalFilterConfig(modes=3, positive=True), **POWER
    ),
    "fir, order 2": HyenaConfig(init="random", filter=FirFilterConfig(taps=5)),
    "fir, order 3": HyenaConfig(order=3, init="random", filter=FirFilterConfig(taps=24)),
    "fir, one tap": HyenaConfig(init="random", filter=FirFilterConfig(taps=1)),
    "fir, many taps": HyenaConfig(order=3, filter=FirFilterConfig(taps=70, positive=True)),
    "fir, heads": HyenaConfig(heads=4, init="random", filter=FirFilterConfig(taps=9)),
    "fir, heads, power": HyenaConfig(filter=FirFilterConfig(positive=True), **POWER),
    "window, power": HyenaConfig(window=5, sinks=2, key_dim=3, key_gate=True, filter=POSITIVE, **POWER),
    "window, hedgehog, modal": HyenaConfig(
        heads=2,
        init="random",
        feature_map="hedgehog",
        normalise=True,
        window=4,
        sinks=3,
        near_norm="rms",
        filter=ModalFilterConfig(modes=3, positive=True),
    ),
    "window, hedgehog, fir": HyenaConfig(
        heads=2,
        init="random",
        feature_map="hedgehog",
        normalise=True,
        window=7,
        near_norm="layer_all",
        filter=FirFilterConfig(taps=20, positive=True),
    ),
    "window, squares": HyenaConfig(
        window=5, sinks=2, degree=2, key_dim=2, key_gate=True, filter=ModalFilterConfig(modes=3, positive=True), **POWER
    ),
    "window, longer than most": HyenaConfig(window=70, sinks=80, filter=POSITIVE, **POWER),
    "window, tied": HyenaConfig(window=6, sinks=2, tied=True, filter=POSITIVE, **POWER),
    "window, tied, normed": HyenaConfig(
        init="random", window=5, sinks=1, tied=True, near_norm="rms", filter=ModalFilterConfig(positive=True), **POWER
    ),
    "window, groups": HyenaConfig(
        init="random", window=5, sinks=2, groups=1, key_dim=3, key_gate=True, filter=POSITIVE, **POWER
    ),
    "window, tied, groups": HyenaConfig(
        heads=4,
        init="random",
        feature_map="power",
        normalise=True,
        window=5,
        sinks=2,
        groups=2,
        tied=True,
        filter=POSITIVE,
    ),
    "window alone, groups": WindowConfig(window=6, sinks=2, heads=4, groups=2, init="random"),
    "window alone": WindowConfig(window=6, sinks=2, heads=2),
    "window alone, narrow": WindowConfig(window=1, sinks=0, heads=4, near_norm="rms_all", short_taps=2, init="random"),
    "skip": SkipConfig(),
}
# Rows of the table whose code other rows run too, in other combinations; they are for `make test-all`.
LIKE_OTHERS = {
    "one head", "heads, linear window", "frozen frequency", "heads, positive filter", "power", "gated",
    "hedgehog, signed", "modal, order 3", "modal, heads, power", "fir, order 3", "fir, heads, power", "window, tied",
    "window, groups", "window alone",
}  # fmt: skip
# Widths between the projections that are not D: narrower, wider, and of heads that are not as wide as their keys.
INNER = {
    "linear window": 4, "order 4": 12, "heads, linear window": 12, "power, full": 12, "power of eight, full": 4,
    "hedgehog": 12, "window, hedgehog, fir": 6, "window alone, narrow": 12,
    "modal, order 3": 12, "modal, heads, gated": 12, "fir, many taps": 4, "gated": 4,
}  # fmt: skip
# Two heads by lag, as attention has them: one looks at the token before, one far back.
PROFILE = torch.tensor([[0.1, 1.0], [1.0, 0.3], *([0.2 / lag, 0.5 / lag**0.5] for lag in range(2, 60))]).log().t()
PROJECTIONS = ("query", "key", "value", "output")


def rows(cases: Iterable[str] = CASES) -> list[Any]:
    """Cases as the parameters of a test."""
    return [pytest.param(case, marks=[pytest.mark.slow] if case in LIKE_OTHERS else []) for case in cases]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def attention(width: int = D, with_biases: bool = True, inner: int | None = None) -> AttentionWeights:
    rows = inner or width
    query, key, value = (draw(rows, width, seed=seed) / width**0.5 for seed in range(3))
    weights = AttentionWeights(query, key, value, draw(width, rows, seed=3) / width**0.5, heads=2)
    if not with_biases:
        return weights
    sizes = dict.fromkeys(PROJECTIONS, rows) | {"output": width}
    biases: dict[str, Any] = {f"{name}_bias": draw(sizes[name], seed=i) for i, name in enumerate(PROJECTIONS)}
    return replace(weights, **biases, statistics=statistics(width))


def statistics(width: int = D) -> AttentionStatistics:
    root_DD = draw(width, width, seed=7)
    mean_D, covariance_DD = draw(width, seed=8), root_DD @ root_DD.t() / width
    turned = Rotation(torch.tensor([0.7]), torch.tensor([1]), torch.tensor([0]), 1.5)
    return AttentionStatistics(PROFILE, mean_D, covariance_DD, draw(2, 40, width, seed=9), turned)


def make(case: str, max_length: int = MAX) -> Any:
    config = CASES[case]
    if isinstance(config, HyenaConfig) and isinstance(config.filter, FirFilterConfig):
        taps = min(config.filter.taps, max_length)
        window = None if config.window is None else min(config.window, taps - 1)  # a longer one leaves nothing far
        config = replace(config, window=window, filter=replace(config.filter, taps=taps))
    operator: Any = build(config, D, max_length, INNER.get(case))
    operator.initialise(attention(inner=operator.inner), generator())
    return operator


def empty_like(operator: Any) -> Any:
    """Another operator of the same shape, not initialised."""
    return build(operator.config, operator.d_model, operator.max_length, operator.inner)


def hyena(config: HyenaConfig, d_model: int, max_length: int) -> Any:
    return build(config, d_model, max_length)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    """Agreement to `tolerance` of the largest magnitude: the error of an FFT scales with it."""
    torch.testing.assert_close(left, right, rtol=0.0, atol=tolerance * max(1.0, right.abs().max().item()))
