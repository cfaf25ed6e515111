"""The level of near weights at the start: shares of the weight that a level explains are met, and their mean always."""

from __future__ import annotations

import torch

from operators.transfer.level import level_for
from tests.operators.cases import close, draw

H, N, K = 3, 400, 4


def test_shares_that_a_level_makes_are_met() -> None:
    q_HNK, odds_HN = draw(H, N, K).double(), 3.0 * draw(H, N, seed=2).double()
    key_HK, shift_H, there_HN = draw(H, K, seed=3).double(), draw(H, seed=4).double(), draw(H, N, seed=6) < 0.8
    share_HN = (odds_HN - (q_HNK @ key_HK[..., None])[..., 0] - shift_H[:, None]).sigmoid()
    share_HN[~there_HN] = 1.0  # nothing is far there
    found_HK, found_H = level_for(q_HNK, odds_HN, share_HN, there_HN, key_HK + 0.1)
    close(found_HK, key_HK, 0.02)  # what holds it near where it starts is weak beside 300 positions
    close(found_H, shift_H, 0.02)


def test_the_mean_share_is_met_whatever_the_shares_are() -> None:
    q_HNK, odds_HN, share_HN = (
        5.0 * draw(H, N, K).double(),
        9.0 * draw(H, N, seed=2).double(),
        draw(H, N, seed=7).double().sigmoid(),
    )
    there_HN = torch.ones(H, N, dtype=torch.bool)
    key_HK, shift_H = level_for(q_HNK, odds_HN, share_HN, there_HN, torch.zeros(H, K))
    near_HN = (odds_HN - (q_HNK @ key_HK[..., None])[..., 0] - shift_H[:, None]).sigmoid()
    close(near_HN.mean(1), share_HN.mean(1), 1e-9)


def test_where_nothing_is_far_the_key_stays() -> None:
    there_HN = torch.zeros(H, N, dtype=torch.bool)
    key_HK, shift_H = level_for(draw(H, N, K), draw(H, N), torch.ones(H, N), there_HN, draw(H, K, seed=5))
    close(key_HK, draw(H, K, seed=5).double(), 1e-12)
    assert not shift_H.any()
