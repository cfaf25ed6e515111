"""Queries, keys and gates taken from an attention: exact at full rank, the best possible below, and a good start.

Shapes: N inputs, L positions, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig
from operators.registry import build
from operators.transfer.attention import Affine, AttentionStatistics, AttentionWeights, QueryKeyNorm
from operators.transfer.low_rank import centred_products

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
    return x_ND.double() @ affine[0].double().t() + affine[1].double()


def logits(weights: AttentionWeights, head: int, x_ND: Tensor) -> Tensor:
    """Of every input with every other, (N, N)."""
    q_NK, k_NK = (
        (x_ND @ getattr(weights, name).t() + getattr(weights, f"{name}_bias")).double().chunk(HEADS, dim=1)[head]
        for name in ("query", "key")
    )
    return (D / HEADS) ** -0.5 * q_NK @ k_NK.t()


def relative(logits_NN: Tensor) -> Tensor:
    """What is left of logits when what is the same for all keys is taken away: softmax does not see it."""
    return logits_NN - logits_NN.mean(1, keepdim=True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("head", range(HEADS))
def test_at_full_rank_the_weights_of_a_softmax_are_the_attentions(head: int, gated: bool) -> None:
    weights, x_ND = attention(), inputs()
    query, key, gate = centred_products(weights, HEADS, D // HEADS, gated=gated)[head]
    ours_NN = apply(query, x_ND) @ apply(key, x_ND).t() + (apply(gate, x_ND).t() if gated else 0.0)
    torch.testing.assert_close(relative(ours_NN), relative(logits(weights, head, x_ND)), rtol=0, atol=2e-4)


def test_the_gate_is_what_every_query_looks_at_and_nothing_at_the_mean_input() -> None:
    weights, x_ND = attention(), inputs()
    _, _, gate = centred_products(weights, HEADS, 2, gated=True)[1]
    mean_1D = x_ND.double().mean(0, keepdim=True)
    assert apply(gate, mean_1D).abs().max() < 1e-9
    wanted_N = logits(weights, 1, torch.cat([mean_1D.float(), x_ND]))[0]
    torch.testing.assert_close(apply(gate, x_ND)[:, 0], wanted_N[1:] - wanted_N[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_products_of_that_rank_are_nearer_on_the_inputs_seen(rank: int) -> None:
    weights, x_ND = attention(), inputs().double()
    query, key, _ = centred_products(weights, HEADS, rank, gated=True)[0]
    wq, wk, scale = weights.query[: D // HEADS].double(), weights.key[: D // HEADS].double(), (D / HEADS) ** -0.5
    centred_ND = x_ND - x_ND.mean(0)
    wanted_NN = scale * (centred_ND @ wq.t()) @ (centred_ND @ wk.t()).t()
    error = (wanted_NN - apply(query, x_ND) @ apply(key, x_ND).t()).norm()
    best = torch.linalg.svdvals(wanted_NN)[rank:].norm()
    assert error.item() == pytest.approx(best.item(), rel=1e-3)


def test_more_channels_than_the_attention_has_stay_empty() -> None:
    query, key, _ = centred_products(attention(), HEADS, D + 4, gated=True)[0]
    assert query[0].shape == key[0].shape == (D + 4, D)
    assert query[0][: D // HEADS].any(1).all()
    assert not query[0][D // HEADS :].any()


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


def softmax_of(query_NR: Tensor, key_NR: Tensor, scale: float) -> Tensor:
    """Weights of the first head, (N, N)."""
    q_NK, k_NK = (part.chunk(HEADS, dim=1)[0] for part in (query_NR, key_NR))
    return (scale * q_NK @ k_NK.t()).softmax(-1)


def drawn(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(rows, D, seed=seed).double() / D**0.5, draw(rows, seed=seed + 1).double()


def test_a_scale_of_the_attentions_own_is_in_the_products() -> None:
    weights = replace(attention(), scale=1 / 3)
    query, key = weights.products()
    x_ND = inputs()
    ours_NN = softmax_of(apply(query, x_ND), apply(key, x_ND), (D / HEADS) ** -0.5)
    plain = attention()
    wanted = [apply((getattr(plain, name), plain.bias_of(name)), x_ND) for name in ("query", "key")]
    torch.testing.assert_close(ours_NN, softmax_of(*wanted, 1 / 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(4,), (HEADS, 4), (D,)])
def test_normed_queries_are_what_the_norm_makes_of_inputs_of_usual_size(
    shape: tuple[int, ...], centred: bool, seen: bool
) -> None:
    """Rows have the root mean square of the norm's weights, over the inputs that were seen or over white ones."""
    weight, bias = draw(*shape, seed=40).double(), draw(*shape, seed=41).double() if centred else None
    rows_DD, shift_D = drawn(D, 42)
    weights = replace(attention(), query=rows_DD, query_bias=shift_D, query_norm=QueryKeyNorm(weight, bias, centred))
    x_ND = inputs().double() if seen else torch.cat([D**0.5 * torch.eye(D), -(D**0.5) * torch.eye(D)]).double()
    if not seen:
        weights = replace(weights, statistics=None)
    q_NR = apply((rows_DD, shift_D), x_ND)
    groups_NGK = q_NR.unflatten(1, (1, -1) if shape == (D,) else (HEADS, -1))
    if centred:
        groups_NGK = groups_NGK - groups_NGK.mean(-1, keepdim=True)
    size_G1 = groups_NGK.square().mean((0, 2)).sqrt()[:, None]
    wanted_NR = (groups_NGK / size_G1 * weight + (0 if bias is None else bias)).flatten(1)
    query, key = weights.products()
    torch.testing.assert_close(apply(query, x_ND), wanted_NR)
    assert torch.equal(key[0], weights.key)


def test_the_rank_of_merged_heads_is_that_of_their_rows() -> None:
    """Heads of another number: one of all rows gives the sum of the attention's products."""
    weights, x_ND = attention(), inputs().double()
    query, key, _ = centred_products(weights, 1, D, gated=True)[0]
    centred_ND = x_ND - x_ND.mean(0)
    wanted_NN = (
        (D / HEADS) ** -0.5 * (centred_ND @ weights.query.double().t()) @ (centred_ND @ weights.key.double().t()).t()
    )
    torch.testing.assert_close(apply(query, x_ND) @ apply(key, x_ND).t(), wanted_NN, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="heads must divide the 12 rows of the attention's queries but is 5"):
        centred_products(weights, 5, 2, gated=True)


def test_heads_narrower_in_queries_than_in_values_are_fitted_or_refused() -> None:
    weights = attention()
    narrow = replace(
        weights, query=weights.query[:6], key=weights.key[:6], query_bias=weights.bias_of("query")[:6],
        key_bias=weights.bias_of("key")[:6],
    )  # fmt: skip
    copied: Any = build(HyenaConfig(heads=HEADS), D, LENGTH)
    with pytest.raises(ValueError, match="3 heads have 2 channels of query and 4 of value: set key_dim"):
        copied.initialise(narrow, torch.Generator().manual_seed(0))
    fitted: Any = build(HyenaConfig(heads=HEADS, key_dim=2), D, LENGTH)
    fitted.initialise(narrow, torch.Generator().manual_seed(0))
    assert fitted.in_proj.weight.shape == (2 * 6 + D, D)


def test_queries_and_keys_must_fit_each_other() -> None:
    weights = replace(attention(), key=attention().key[:8])
    with pytest.raises(ValueError, match=r"key weight of the attention must have shape \(12, 12\).* has \(8, 12\)"):
        weights.check(D, D)
