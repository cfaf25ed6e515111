"""Whole sequences of operators with a window by the core, without gradients: near and far positions in one pass.

Shapes: B batch, H heads, K width of a query and key, V of a value, L positions, W positions of the window, S modes,
F features.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from operators.filters.modes import Modes
from operators.native import serves

QUERIES = 64  # of a block, as window.h has it


class Far(NamedTuple):
    """What far positions are weighed by: queries and keys (B, H, K, L), filters (H, up to L - W) that begin behind the
    window, levels of near weights (B, H, 1, L), and what each position counts (B, H, 1, L), 1 for None; the degree of
    the power, 0 for none; where it is 2 and keys have at most 16 channels, modes of those filters, real ones, with
    which long texts are read of a state."""

    q_BHKL: Tensor
    k_BHKL: Tensor
    h_HT: Tensor
    level_BH1L: Tensor
    counted_BH1L: Tensor | None
    degree: int
    modes: Modes | None = None


def takes_whole(q_BHKL: Tensor, far_q_BHKL: Tensor | None, mask_BL: Tensor | None) -> bool:
    """Whether the core mixes what these near and far queries gather: in bfloat16, without gradients, texts that are not
    padded, queries of an even width, and where the processor multiplies in bfloat16."""
    plain = mask_BL is None and not torch.is_grad_enabled() and q_BHKL.dtype == torch.bfloat16
    even = all(part is None or part.shape[2] % 2 == 0 for part in (q_BHKL, far_q_BHKL))
    return plain and even and serves(q_BHKL) and bool(torch.ops.layerswap.window_served())


def mix_window(
    q_BHKL: Tensor,
    k_BHKL: Tensor,
    v_BHVL: Tensor,
    far: Far | None,
    window: int,
    sinks: int,
    state_BHSFV: Tensor | None = None,
) -> Tensor:
    """Values (B, H, V, L) by softmax over near positions, and by far ones where there are any, over one sum.

    `q` and `k` are near queries and keys as they are multiplied. The state, where it is given, is filled with that of
    what lies behind the window of the position to come (`head_states`); it wants modes.
    """
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q_BHKL, k_BHKL, v_BHVL)]
    if far is None:
        return cast(Tensor, torch.ops.layerswap.window_mix(*parts, [], None, window, sinks, 0, [], None))
    behind = QUERIES + q_BHKL.shape[-1] - far.h_HT.shape[-1]
    h_HT = torch.nn.functional.pad(far.h_HT.float(), (QUERIES, behind)).contiguous()
    theirs = [part if part.stride(-1) == 1 else part.contiguous() for part in (far.q_BHKL, far.k_BHKL)]
    counted = None if far.counted_BH1L is None else far.counted_BH1L.float().contiguous()
    modes = [] if far.modes is None else [part.detach().float().contiguous() for part in far.modes]
    given = (*parts, [*theirs, h_HT, far.level_BH1L.float().contiguous()], counted, window, sinks, far.degree)
    return cast(Tensor, torch.ops.layerswap.window_mix(*given, modes, state_BHSFV))
