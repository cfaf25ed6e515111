"""How large near weights are beside far ones at the start: as in the attention, head by head, on real text.

Shapes: B texts, H heads, L positions.
"""

import torch
from torch import Tensor

STEPS = 60  # halvings of the interval that the shift lies in


@torch.no_grad()
def shift_for(odds_BHL: Tensor, share_BHL: Tensor, there_BHL: Tensor) -> Tensor:
    """What to take from the logarithms of near weights over far ones so that the mean near share is `share`'s, (H,).

    `there` says which positions have something far; 0 where none has.
    """
    odds_HN, share_HN, there_HN = (x.transpose(0, 1).flatten(1).double() for x in (odds_BHL, share_BHL, there_BHL))
    count_H = there_HN.sum(1).clamp_min(1.0)
    wanted_H = (share_HN * there_HN).sum(1) / count_H
    beyond_HN = odds_HN.masked_fill(there_HN == 0, 0.0)
    low_H, high_H = beyond_HN.amin(1) - 40.0, beyond_HN.amax(1) + 40.0
    for _ in range(STEPS):
        middle_H = (low_H + high_H) / 2
        found_H = ((odds_HN - middle_H[:, None]).sigmoid() * there_HN).sum(1) / count_H
        low_H, high_H = (
            torch.where(found_H > wanted_H, middle_H, low_H),
            torch.where(found_H > wanted_H, high_H, middle_H),
        )
    return torch.where(there_HN.any(1), (low_H + high_H) / 2, 0.0)
