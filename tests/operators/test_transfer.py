"""What operators take over from the attention they replace, and what they refuse.

Shapes: B batch, L positions, D model width.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators.config import HyenaConfig, ImplicitFilterConfig, WindowConfig
from operators.near import fitting
from operators.registry import build
from operators.transfer.attention import AttentionWeights
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

SUMMED: dict[str, Any] = {"feature_map": "power", "normalise": True, "filter": ImplicitFilterConfig(positive=True)}


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


def shared(weights: AttentionWeights, groups: int, heads: int = 4) -> AttentionWeights:
    """The same with heads that read the key and value of the first of their group."""

    def repeated(x: Tensor) -> Tensor:
        first = x.unflatten(0, (groups, heads // groups, -1))[:, :1]
        return first.expand(-1, heads // groups, *first.shape[2:]).reshape(x.shape)

    parts = ("key", "value", "key_bias", "value_bias")
    told = statistics()
    weights = replace(weights, statistics=replace(told, profile=told.profile.repeat_interleave(heads // 2, 0)))
    return replace(weights, heads=heads, **{name: repeated(getattr(weights, name)) for name in parts})


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_that_share_keys_and_values_are_seen(groups: int) -> None:
    """In weights and biases, keys and values: all four must be shared."""
    weights = shared(attention(), groups)
    assert weights.groups == groups
    for name in ("key", "value", "key_bias", "value_bias"):
        other = getattr(weights, name).clone()
        other[-1] += 1.0
        assert replace(weights, **{name: other}).groups == 4


@pytest.mark.parametrize("config", [WindowConfig(window=6), HyenaConfig(heads=4, window=6, tied=True, **SUMMED)])
def test_a_window_takes_over_keys_and_values_of_groups_once(config: HyenaConfig | WindowConfig) -> None:
    weights = shared(attention(), 2)
    fitted = fitting(config, weights)
    assert isinstance(fitted, HyenaConfig | WindowConfig) and fitted.groups == 2 and fitted.heads == 4
    assert fitting(replace(config, groups=4), weights).groups == 4  # type: ignore[union-attr]
    assert fitting(replace(config, init="random"), weights).groups == 2  # type: ignore[union-attr]
    assert fitting(replace(config, heads=8), weights).groups is None  # type: ignore[union-attr]
    assert fitting(config, attention()) == replace(fitted, groups=None, heads=2 if config.heads is None else 4)
    operator = build(fitted, D, MAX)
    operator.initialise(weights, generator())
    first = torch.cat([torch.arange(2), torch.arange(4, 6)])  # rows of the first head of each group
    key_RD = weights.key[first.view(2, 2).flip(1).flatten()]  # in the order that pairs of the rotation have
    sizes = [heads * width for heads, width in operator.parts.values()]
    found = dict(zip(operator.parts, operator.in_proj.weight.split(sizes), strict=True))
    assert {name: part.shape[0] for name, part in found.items()} == {"query": 8, "key": 4, "value": 4}
    assert torch.equal(found["value"], weights.value[first])
    close(found["key"], key_RD * (found["key"].norm() / key_RD.norm()))  # which the rotation scales


def test_groups_that_the_attention_has_not_are_an_error() -> None:
    operator = build(WindowConfig(window=6, heads=4, groups=1), D, MAX)
    with pytest.raises(ValueError, match=r"^groups must be heads of key and value that the attention has but is 1,"):
        operator.initialise(shared(attention(), 2), generator())


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
