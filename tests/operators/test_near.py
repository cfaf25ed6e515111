"""Near and far values over one sum, at the edges of what numbers can say."""

from __future__ import annotations

import pytest
import torch

from operators.mixing.near import joined
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
