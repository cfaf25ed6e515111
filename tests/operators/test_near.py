"""Near and far values over one sum, at the edges of what numbers can say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.mixing.near import joined
from operators.near import EPSILON, Near
from operators.transfer.attention import AttentionWeights, QueryKeyNorm
from operators.transfer.rotation import Rotation
from tests.operators.cases import B, D, close, draw, make

FAR = torch.cat([draw(1, 1, 3, 2, seed=2), torch.ones(1, 1, 1, 2)], dim=2)
NOTHING = torch.zeros(1, 1, 1, 2)


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_where_nothing_is_far_near_values_stay_whatever_the_level(level: float) -> None:
    y_BHVL, level_BH1L = draw(1, 1, 3, 2), torch.full((1, 1, 1, 2), level)
    assert torch.equal(joined(y_BHVL, NOTHING, level_BH1L, 0.0 * FAR), y_BHVL)


def test_no_exponential_overflows_and_gradients_are_finite() -> None:
    y_BHVL, level_BH1L = draw(1, 1, 3, 2), torch.tensor([-1e4, 1e4]).view(1, 1, 1, 2).requires_grad_()
    found = joined(y_BHVL, NOTHING, level_BH1L, FAR)
    close(found[..., 0], y_BHVL[..., 0])
    close(found[..., 1], FAR[:, :, :3, 1])
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert level_BH1L.grad is not None and level_BH1L.grad.isfinite().all()


def test_shares_are_those_of_the_sums_of_weights() -> None:
    """Near weights exp(lse - level) = 3 of five in all."""
    y_BHVL = draw(1, 1, 3, 2)
    far_BHXL = torch.cat([2 * FAR[:, :, :3], torch.full_like(NOTHING, 2.0)], dim=2)
    found = joined(y_BHVL, NOTHING + 4.0, NOTHING + 4.0 - torch.tensor(3.0).log(), far_BHXL)
    close(found, (3 * y_BHVL + 2 * FAR[:, :, :3]) / 5)


@torch.no_grad()
def test_a_state_counts_what_it_holds() -> None:
    """Keys and values of a window of six and of two sinks, of three sequences and two heads of four channels, and where
    texts begin; inputs too, with room for more, where it can be cropped."""
    operator = make("window alone")
    state, kept = operator.init_state(B, croppable=False), operator.init_state(B)
    for one in (state, kept):
        operator.extend(draw(B, 20, D), one)
    assert state.held_bytes() == 2 * 4 * (B * 2 * 4 * 6 + B * 2 * 4 * 2) + 8 * B
    assert kept.held_bytes() == 2 * state.held_bytes() + 4 * B * D * (64 + 16)  # and a mark to go back to


def rms(x_HK: Tensor) -> Tensor:
    return x_HK / (x_HK.square().mean(-1, keepdim=True) + EPSILON).sqrt()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_in_order_have_the_logits_of_the_attention(scale: float | None, normed: bool) -> None:
    """Of two heads of six channels, of which a rotation turns channels 4 and 0, and 1 and 5."""
    heads, width = 2, 6
    drawn = torch.Generator().manual_seed(0)
    x_D, y_D, norms_HK = (torch.randn(*size, generator=drawn).double() for size in ((5,), (5,), (2, heads, width)))
    rows = {name: torch.randn(heads * width, 5, generator=drawn).double() for name in ("query", "key")}
    biases = {f"{name}_bias": torch.randn(heads * width, generator=drawn).double() for name in ("query", "key")}
    norm = {f"{name}_norm": QueryKeyNorm(each) for name, each in zip(("query", "key"), norms_HK, strict=True)}
    rest: dict[str, Any] = {"value": rows["key"], "output": rows["key"].t(), **(norm if normed else {})}
    attention = AttentionWeights(heads=heads, scale=scale, **rows, **biases, **rest)
    rotation = Rotation(torch.tensor([0.75, -0.25]), torch.tensor([4, 1]), torch.tensor([0, 5]), factor=1.1)

    def by_definition(name: str, x_D: Tensor, place: int) -> Tensor:
        x_HK = (rows[name] @ x_D + biases[f"{name}_bias"]).view(heads, width)
        x_HK = rms(x_HK) * norm[f"{name}_norm"].weight if normed else x_HK
        found_HK = x_HK.clone()
        for first, second, frequency in ((4, 0, 0.75), (1, 5, -0.25)):
            c, s = math.cos(place * frequency), math.sin(place * frequency)
            found_HK[:, first] = 1.1 * (c * x_HK[:, first] - s * x_HK[:, second])
            found_HK[:, second] = 1.1 * (c * x_HK[:, second] + s * x_HK[:, first])
        return found_HK

    near = Near((heads, heads), width, "rms" if normed else "none", level=False).double()
    of_query, of_key = near.follow(attention, rotation)
    pairs = ((of_query, x_D), (of_key, y_D))
    q_BHK1, k_BHK1 = ((of @ x + bias).view(1, heads, width, 1) for (of, bias), x in pairs)
    found = near.products(q_BHK1, k_BHK1, 9)[0] * near.products(q_BHK1, k_BHK1, 4)[2]
    wanted = by_definition("query", x_D, 9) * by_definition("key", y_D, 4)
    torch.testing.assert_close(found[0, ..., 0].sum(1), wanted.sum(1) * (scale or width**-0.5))
