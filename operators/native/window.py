"""Whole sequences of operators with a window by the core, without gradients: near and far positions in one pass.

Shapes: B batch, H heads, K width of a query and key, P pairs of its channels, V of a value, L positions, W positions of
the window, S modes, F features.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from operators.filters.modes import Modes
from operators.native import serves

QUERIES = 64  # of a block, as window.h has it


class Far(NamedTuple):
    """What far positions are weighed by: queries and keys (B, H, K, L), filters (H, up to L - W) that begin behind the
    window, the level's key (H, K) and shift (H,) of near weights, and what each position counts (B, H, 1, L), 1 for
    None; the degree of the power, 0 for none; where it is 2 and keys have at most 16 channels, modes of those filters,
    real ones, with which long texts are read of a state."""

    q_BHKL: Tensor
    k_BHKL: Tensor
    h_HT: Tensor
    level: tuple[Tensor, Tensor]
    counted_BH1L: Tensor | None
    degree: int
    modes: Modes | None = None


def takes_whole(u_BEL: Tensor, mask_BL: Tensor | None) -> bool:
    """Whether the core mixes what such rows say: in float32 or bfloat16, without gradients, texts that are not padded.
    Queries and keys must be of even widths. Products of rows in bfloat16 are in float32 where the processor has none
    in bfloat16 (AMX)."""
    plain = mask_BL is None and not torch.is_grad_enabled() and u_BEL.dtype in (torch.float32, torch.bfloat16)
    return plain and serves(u_BEL)


def mix_window(
    near: tuple[Tensor, Tensor, Tensor],
    turns_2PL: Tensor,
    far: Far | None,
    window: int,
    sinks: int,
    state_BHSFV: Tensor | None = None,
) -> Tensor:
    """Values (B, H, V, L) by softmax over near positions, and by far ones where there are any, over one sum.

    `near` are queries, keys and values, of which queries are to be divided by K^1/2 and both to be turned by these
    cosines and sines. The state, where it is given, is filled with that of what lies behind the window of the position
    to come (`head_states`); it wants modes.
    """
    parts = [_touching(part) for part in near]
    if far is None:
        return cast(Tensor, torch.ops.layerswap.window_mix(*parts, turns_2PL, [], None, window, sinks, 0, [], None))
    behind = QUERIES + parts[0].shape[-1] - far.h_HT.shape[-1]
    h_HT = torch.nn.functional.pad(far.h_HT.float(), (QUERIES, behind)).contiguous()
    level = [part.detach().float().contiguous() for part in far.level]
    counted = None if far.counted_BH1L is None else far.counted_BH1L.float().contiguous()
    modes = [] if far.modes is None else [part.detach().float().contiguous() for part in far.modes]
    theirs = [_touching(far.q_BHKL), _touching(far.k_BHKL), h_HT, *level]
    given = (*parts, turns_2PL, theirs, counted, window, sinks, far.degree)
    return cast(Tensor, torch.ops.layerswap.window_mix(*given, modes, state_BHSFV))


def _touching(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()
