"""What operators take over from the attention they replace, and what they refuse.

Shapes: B batch, L positions, D model width.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from operators.config import HyenaConfig, ImplicitFilterConfig
from operators.registry import build
from tests.operators.cases import (
    MAX,
    PROFILE,
    PROJECTIONS,
    B,
    D,
    attention,
    close,
    draw,
    generator,
    hyena,
    statistics,
)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_channelwise_transfer_starts_as_filtered_values(order: int, biases: bool) -> None:
    operator = hyena(HyenaConfig(order=order), D, MAX)
    weights = attention(with_biases=biases)
    operator.initialise(weights, generator())
    value_bias = torch.zeros(D) if weights.value_bias is None else weights.value_bias
    output_bias = torch.zeros(D) if weights.output_bias is None else weights.output_bias
    assert torch.equal(operator.in_proj.weight[-D:], weights.value)
    assert torch.equal(operator.in_proj.bias[-D:], value_bias)
    assert torch.equal(operator.in_proj.bias[:-D], torch.ones(order * D))
    assert torch.equal(operator.out_proj.weight, weights.output)
    assert torch.equal(operator.out_proj.bias, output_bias)
    assert operator.in_proj.weight[:-D].abs().max() < 0.05
    assert not operator.direct.any()


def test_multihead_transfer_copies_query_and_key_too() -> None:
    operator, weights = hyena(HyenaConfig(heads=2), D, MAX), attention()
    operator.initialise(weights, generator())
    assert torch.equal(operator.in_proj.weight, torch.cat([weights.query, weights.key, weights.value]))
    biases = torch.cat([getattr(weights, f"{name}_bias") for name in PROJECTIONS[:3]])
    assert torch.equal(operator.in_proj.bias, biases)
    assert torch.equal(operator.out_proj.weight, weights.output)
    x_BLD = draw(B, 9, D)
    q, k, _ = operator.layout.parts(operator.in_proj(x_BLD).transpose(1, 2))
    close(q.flatten(1, 2), operator.in_proj(x_BLD)[..., :D].transpose(1, 2))
    close(k.flatten(1, 2), operator.in_proj(x_BLD)[..., D : 2 * D].transpose(1, 2))


@pytest.mark.parametrize("config", [HyenaConfig(), HyenaConfig(heads=2)])
def test_impossible_transfers_are_errors(config: HyenaConfig) -> None:
    operator = hyena(config, D, MAX)
    with pytest.raises(ValueError, match="init: random"):
        operator.initialise(None, generator())
    with pytest.raises(ValueError, match=r"must have shape \(8, 8\).* has \(4, 4\)"):
        operator.initialise(attention(width=4), generator())


def test_log_spaced_windows_sum_to_one_and_filters_start_near_them() -> None:
    operator = hyena(HyenaConfig(heads=4), D, 100)
    operator.initialise(attention(), generator())
    window_CL = operator.filter.window(100)
    mass = window_CL.sum(-1)
    assert (mass[:3] > 0.95).all()
    assert 0.5 < mass[3] < 0.7
    assert ((operator.filter(100) / window_CL.clamp_min(1e-30) - 1).abs()[:, :10] < 0.3).all()


@pytest.mark.parametrize(("heads", "rows"), [(2, [0, 1]), (4, [0, 0, 1, 1]), (1, None)])
def test_positive_filters_start_at_the_profile_of_the_attention(heads: int, rows: list[int] | None) -> None:
    config = HyenaConfig(heads=heads, filter=ImplicitFilterConfig(positive=True, width=64, features=9))
    operator = hyena(config, D, MAX)
    operator.initialise(attention(), generator())
    wanted_HT = (PROFILE[rows] if rows is not None else PROFILE.mean(0, keepdim=True)).softmax(-1)
    filter_HT = operator.filter(MAX)
    seen_HT = filter_HT[:, : wanted_HT.shape[1]] / filter_HT[:, : wanted_HT.shape[1]].sum(-1, keepdim=True)
    assert (filter_HT > 0).all()
    close(filter_HT.sum(-1), torch.ones(heads), 0.05)
    assert ((seen_HT - wanted_HT).abs().sum(-1) < 0.15).all()
    trained = {name for name, parameter in operator.filter.named_parameters() if parameter.requires_grad}
    assert trained == {"readout.weight", "log_timescale"}


def test_a_positive_filter_needs_a_profile_that_fits_its_heads() -> None:
    config = HyenaConfig(heads=4, filter=ImplicitFilterConfig(positive=True))
    with pytest.raises(ValueError, match="needs the attention's statistics on real text but got None"):
        hyena(config, D, MAX).initialise(replace(attention(), statistics=None), generator())
    three = replace(attention(), heads=3, statistics=replace(statistics(), profile=PROFILE[[0, 0, 1]]))
    with pytest.raises(ValueError, match="heads must divide the attention's 3 or be a multiple of it but is 4"):
        hyena(config, D, MAX).initialise(three, generator())


def test_one_channel_per_head_is_the_channelwise_operator() -> None:
    heads, channels = hyena(HyenaConfig(heads=D, init="random"), D, MAX), hyena(HyenaConfig(), D, MAX)
    heads.initialise(None, generator())
    nn.init.zeros_(heads.direct)
    channels.load_state_dict(heads.state_dict())
    x_BLD = draw(B, MAX, D)
    close(heads(x_BLD), channels(x_BLD))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads must divide the model width 8 but is 3"):
        build(HyenaConfig(heads=3), D, MAX)


def test_a_nonpositive_longest_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        build(HyenaConfig(), D, 0)
