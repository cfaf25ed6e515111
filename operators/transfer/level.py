"""How large near weights are beside far ones at the start: as in the attention, on real text.

The share of near positions is the sigmoid of the logarithm of near weights over far ones less the level, which is
linear in the query. So the level that gives the attention's shares is a logistic regression on queries, whose constant
makes the mean share of a head the attention's own.

Shapes: H heads, N positions of all texts, K width of a query.
"""

import torch
from torch import Tensor

HALVINGS = 60  # of the interval that the constant lies in
STEPS = 12  # of Newton's method, which has converged long before
RIDGE = 1.0  # against the squared distance from the mean key


@torch.no_grad()
def level_for(
    q_HNK: Tensor, odds_HN: Tensor, share_HN: Tensor, there_HN: Tensor, mean_key_HK: Tensor
) -> tuple[Tensor, Tensor]:
    """The key (H, K) and the shift (H,) of the level.

    Args:
        q_HNK: queries as the level has them.
        odds_HN: logarithms of near weights over far ones without a level.
        share_HN: what near positions have of the weight in the attention.
        there_HN: which positions have something far; heads without any keep the mean key, and a shift of 0.
        mean_key_HK: where the key starts from.
    """
    q_HNK, odds_HN, share_HN, key_HK = (x.double() for x in (q_HNK, odds_HN, share_HN, mean_key_HK))
    x_HNX = torch.nn.functional.pad(q_HNK, (0, 1), value=1.0) * there_HN[..., None]
    odds_HN = odds_HN.masked_fill(~there_HN, 0.0)
    shift_H = shift_for(odds_HN - (q_HNK @ key_HK[..., None])[..., 0] * there_HN, share_HN, there_HN)
    start_HX = torch.cat([key_HK, shift_H[:, None]], dim=1)
    found_HX, ridge_X = start_HX.clone(), torch.full_like(start_HX[0], RIDGE)
    ridge_X[-1] = 0.0
    for _ in range(STEPS):
        near_HN = (odds_HN - (x_HNX @ found_HX[..., None])[..., 0]).sigmoid()
        slope_HX = (x_HNX.transpose(1, 2) @ (share_HN - near_HN)[..., None])[..., 0] + ridge_X * (found_HX - start_HX)
        curve_HXX = x_HNX.transpose(1, 2) @ ((near_HN * (1 - near_HN))[..., None] * x_HNX) + torch.diag(ridge_X + 1e-6)
        found_HX = found_HX - torch.linalg.solve(curve_HXX, slope_HX)
    shift_H = shift_for(odds_HN - (x_HNX[..., :-1] @ found_HX[:, :-1, None])[..., 0], share_HN, there_HN)
    return found_HX[:, :-1], shift_H


def shift_for(odds_HN: Tensor, share_HN: Tensor, there_HN: Tensor) -> Tensor:
    """What to take from the odds so that the mean near share is that of `share`, (H,)."""
    count_H = there_HN.sum(1).clamp_min(1)
    wanted_H = (share_HN * there_HN).sum(1) / count_H
    low_H, high_H = odds_HN.amin(1) - 40.0, odds_HN.amax(1) + 40.0
    for _ in range(HALVINGS):
        middle_H = (low_H + high_H) / 2
        more_H = ((odds_HN - middle_H[:, None]).sigmoid() * there_HN).sum(1) / count_H > wanted_H
        low_H, high_H = torch.where(more_H, middle_H, low_H), torch.where(more_H, high_H, middle_H)
    return torch.where(there_HN.any(1), middle_H, 0.0)
