"""Queries, keys and gates taken from an attention: exact at full rank, the best possible below, and a good start.

Shapes: N inputs, L positions, D model width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig
from operators.registry import build
from operators.transfer.attention import AttentionStatistics, AttentionWeights
from operators.transfer.low_rank import Affine, centred_products

D, HEADS, LENGTH = 12, 3, 64


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> Tensor:
    """(N, D) with a mean and directions of unlike size."""
    return draw(500, D, seed=1) @ (draw(D, D, seed=2) / D**0.5) + draw(D, seed=3)


def attention(size: float = 1.0) -> AttentionWeights:
    x_ND = inputs().double()
    seen = AttentionStatistics(torch.zeros(HEADS, LENGTH), x_ND.mean(0), x_ND.t().cov(correction=0))
    query, key, value, output = (draw(D, D, seed=10 + i) / D**0.5 for i in range(4))
    biases = {f"{name}_bias": draw(D, seed=20 + i) for i, name in enumerate(("query", "key", "value", "output"))}
    biases["query_bias"] = size * biases["query_bias"]
    return AttentionWeights(size * query, key, value, output, HEADS, **biases, statistics=seen)


def apply(affine: Affine, x_ND: Tensor) -> Tensor:
    return x_ND.double() @ affine[0].t() + affine[1]


def logits(weights: AttentionWeights, head: int, x_ND: Tensor) -> Tensor:
    """Of every input with every other, (N, N)."""
    (query, query_bias), (key, key_bias), scale = weights.products_of(head, HEADS)
    return scale * apply((query, query_bias), x_ND) @ apply((key, key_bias), x_ND).t()


def relative(logits_NN: Tensor) -> Tensor:
    """What is left of logits when what is the same for all keys is taken away: softmax does not see it."""
    return logits_NN - logits_NN.mean(1, keepdim=True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("head", range(HEADS))
def test_at_full_rank_the_weights_of_a_softmax_are_the_attentions(head: int, gated: bool) -> None:
    weights, x_ND = attention(), inputs()
    query, key, gate = centred_products(weights, head, HEADS, D // HEADS, gated=gated)
    ours_NN = apply(query, x_ND) @ apply(key, x_ND).t() + (apply(gate, x_ND).t() if gated else 0.0)
    torch.testing.assert_close(relative(ours_NN), relative(logits(weights, head, x_ND)), rtol=0, atol=2e-4)


def test_the_gate_is_what_every_query_looks_at_and_nothing_at_the_mean_input() -> None:
    weights, x_ND = attention(), inputs()
    _, _, gate = centred_products(weights, 1, HEADS, 2, gated=True)
    mean_1D = x_ND.double().mean(0, keepdim=True)
    assert apply(gate, mean_1D).abs().max() < 1e-9
    wanted_N = logits(weights, 1, torch.cat([mean_1D.float(), x_ND]))[0]
    torch.testing.assert_close(apply(gate, x_ND)[:, 0], wanted_N[1:] - wanted_N[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_products_of_that_rank_are_nearer_on_the_inputs_seen(rank: int) -> None:
    weights, x_ND = attention(), inputs().double()
    query, key, _ = centred_products(weights, 0, HEADS, rank, gated=True)
    (wq, _), (wk, _), scale = weights.products_of(0, HEADS)
    centred_ND = x_ND - x_ND.mean(0)
    wanted_NN = scale * (centred_ND @ wq.t()) @ (centred_ND @ wk.t()).t()
    error = (wanted_NN - apply(query, x_ND) @ apply(key, x_ND).t()).norm()
    best = torch.linalg.svdvals(wanted_NN)[rank:].norm()
    assert error.item() == pytest.approx(best.item(), rel=1e-3)


def test_more_channels_than_the_attention_has_stay_empty() -> None:
    query, key, _ = centred_products(attention(), 0, HEADS, D + 4, gated=True)
    assert query[0].shape == key[0].shape == (D + 4, D)
    assert not query[0][D + 1 :].any()


@pytest.mark.parametrize("key_gate", [True, False])
def test_a_normalised_power_starts_as_the_attention_whose_logits_are_small(key_gate: bool) -> None:
    """Without rotations and with weights that do not depend on the lag."""
    config = HyenaConfig(
        heads=HEADS, feature_map="power", degree=8, key_dim=D // HEADS, normalise=True, key_gate=key_gate,
        filter=ImplicitFilterConfig(positive=True, width=64, features=9),
    )  # fmt: skip
    weights, x_1LD = attention(size=0.3), inputs()[None, :LENGTH]
    operator = build(config, D, LENGTH)
    operator.initialise(weights, torch.Generator().manual_seed(0))  # type: ignore[operator]
    q, k, v = (
        torch.nn.functional.linear(x_1LD, getattr(weights, name), getattr(weights, f"{name}_bias"))
        .unflatten(-1, (HEADS, -1))
        .transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mixed_1LD = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    wanted_1LD = torch.nn.functional.linear(mixed_1LD, weights.output, weights.output_bias)
    spread = wanted_1LD.std()
    assert (operator(x_1LD) - wanted_1LD).abs().mean() < 0.05 * spread
