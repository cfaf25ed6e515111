"""Near positions and the first ones by softmax, and what they share one sum with.

    near_t = {s: t - s < window, or s among the first `sinks`},   lse_t = log sum_{s near} exp(q_t . k_s)
    y_t = sum_{s near} exp(q_t . k_s - lse_t) v_s

Blocks of queries against the keys that they can see, O(L window); products and exponentials in float32 or float64.

Shapes: B batch, H heads, K width of query and key, V of value, Q queries, T keys (T >= Q; the queries are the last of
their positions), S sinks, N blocks, R rows of a block, C keys of a block. Positions are last.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from operators.convolution.causal import compute_dtype

ROWS = 64  # of a block at least
SMALLEST = 1e-30  # of a sum of far weights that counts


class Seen(NamedTuple):
    """What queries may look at.

    Attributes:
        k_BHKT, v_BHVT: keys and values of the last positions; those at negative places mean nothing.
        sink_k_BHKS, sink_v_BHVS: of the first positions of the texts.
        padding_B: positions of each row before its text; None: there are none.
        stop: positions in all.
    """

    k_BHKT: Tensor
    v_BHVT: Tensor
    sink_k_BHKS: Tensor
    sink_v_BHVS: Tensor
    padding_B: Tensor | None
    stop: int


def leading(mask_BL: Tensor) -> Tensor:
    """How many positions lie before the first real one, (B,)."""
    return (mask_BL.long().cumsum(1) == 0).sum(1)


def at_first(x_BHKT: Tensor, sinks: int, padding_B: Tensor | None) -> Tensor:
    """What the first positions of each text have, (B, H, K, S); S is less where there are less."""
    count = min(sinks, x_BHKT.shape[-1])
    if padding_B is None:
        return x_BHKT[..., :count]
    place_BS = (padding_B[:, None] + torch.arange(count, device=x_BHKT.device)).clamp_max(x_BHKT.shape[-1] - 1)
    return x_BHKT.gather(-1, place_BS[:, None, None].expand(-1, *x_BHKT.shape[1:3], -1))


def whole(k_BHKL: Tensor, v_BHVL: Tensor, sinks: int, mask_BL: Tensor | None) -> Seen:
    """All of whole sequences."""
    padding_B = None if mask_BL is None else leading(mask_BL)
    sink_k, sink_v = (at_first(x, sinks, padding_B) for x in (k_BHKL, v_BHVL))
    return Seen(k_BHKL, v_BHVL, sink_k, sink_v, padding_B, k_BHKL.shape[-1])


def rotated(x_BHKn: Tensor, frequencies_P: Tensor, start: int) -> Tensor:
    """Channels i and P + i turned by position times frequency i; those behind stay."""
    pairs, new = len(frequencies_P), x_BHKn.shape[-1]
    place_n = torch.arange(start, start + new, dtype=x_BHKn.dtype, device=x_BHKn.device)
    angle_Pn = frequencies_P.to(x_BHKn.dtype)[:, None] * place_n
    cos_Pn, sin_Pn = angle_Pn.cos(), angle_Pn.sin()
    one, other, rest = x_BHKn.split_with_sizes([pairs, pairs, x_BHKn.shape[2] - 2 * pairs], 2)
    return torch.cat([one * cos_Pn - other * sin_Pn, other * cos_Pn + one * sin_Pn, rest], dim=2)


def near(q_BHKQ: Tensor, seen: Seen, window: int) -> tuple[Tensor, Tensor]:
    """Values by softmax (B, H, V, Q), in their own precision, and the logarithms of the sums, (B, H, 1, Q)."""
    queries, keys = q_BHKQ.shape[-1], seen.k_BHKT.shape[-1]
    if queries == 1 and seen.padding_B is None:
        return _near_one(q_BHKQ, seen, window)
    before = min(keys - queries, window - 1)
    rows = min(queries, max(window, ROWS))
    blocks = -(-queries // rows)
    back = before if blocks == 1 else window - 1
    around = (back - before, blocks * rows - queries)
    k_BHNKC, v_BHNVC = (
        pad(x[..., keys - queries - before :], around).unfold(-1, back + rows, rows).transpose(2, 3)
        for x in (seen.k_BHKT, seen.v_BHVT)
    )
    q_BHNRK = pad(q_BHKQ, (0, around[1])).unflatten(-1, (blocks, rows)).permute(0, 1, 3, 4, 2)
    place_NR1 = torch.arange(blocks * rows, device=q_BHKQ.device).view(blocks, rows, 1) + seen.stop - queries
    place_N1C = place_NR1[:, :1] - back + torch.arange(back + rows, device=q_BHKQ.device)
    products = [q_BHNRK @ k_BHNKC, q_BHNRK @ seen.sink_k_BHKS[:, :, None]]
    counted = _counted(seen, window, place_NR1, place_N1C)
    products_BHNRX = torch.cat(products, dim=-1)
    products_BHNRX = products_BHNRX.masked_fill(~counted, torch.finfo(products_BHNRX.dtype).min)
    largest_BHNR1, place_BHNR1 = products_BHNRX.max(-1, keepdim=True)
    weights_BHNRX = products_BHNRX.softmax(-1)
    lse_BHNR1 = largest_BHNR1 - weights_BHNRX.gather(-1, place_BHNR1).log()  # logsumexp would go over all once more
    parts = weights_BHNRX.to(v_BHNVC.dtype).split_with_sizes([back + rows, seen.sink_k_BHKS.shape[-1]], -1)
    band_BHNRC, sinks_BHNRS = parts
    y_BHNVR = v_BHNVC @ band_BHNRC.transpose(-1, -2) + seen.sink_v_BHVS[:, :, None] @ sinks_BHNRS.transpose(-1, -2)
    y_BHVQ = y_BHNVR.transpose(2, 3).flatten(3)[..., :queries]
    return y_BHVQ, lse_BHNR1.flatten(2)[:, :, None, :queries]


def _near_one(q_BHK1: Tensor, seen: Seen, window: int) -> tuple[Tensor, Tensor]:
    """`near` of one query, whose keys all count: few operations for a step."""
    first = max(0, seen.stop - window)  # of the window
    near_k_BHKC, near_v_BHVC = (x[..., x.shape[-1] - seen.stop + first :] for x in (seen.k_BHKT, seen.v_BHVT))
    if (sinks := min(seen.sink_k_BHKS.shape[-1], first)) > 0:
        near_k_BHKC = torch.cat([seen.sink_k_BHKS[..., :sinks], near_k_BHKC], dim=-1)
        near_v_BHVC = torch.cat([seen.sink_v_BHVS[..., :sinks], near_v_BHVC], dim=-1)
    products_BH1C = q_BHK1.transpose(-1, -2) @ near_k_BHKC
    lse_BH11 = products_BH1C.logsumexp(-1, keepdim=True)
    weights_BH1C = products_BH1C.softmax(-1).to(near_v_BHVC.dtype)
    return near_v_BHVC @ weights_BH1C.transpose(-1, -2), lse_BH11


def _counted(seen: Seen, window: int, place_NR1: Tensor, place_N1C: Tensor) -> Tensor:
    """Which keys count, (B or 1, 1, N, R, C + S); a sink inside the window does so once."""
    lag_NRC = place_NR1 - place_N1C
    sink_S = torch.arange(seen.sink_k_BHKS.shape[-1], device=lag_NRC.device)
    if seen.padding_B is None:
        band = (lag_NRC >= 0) & (lag_NRC < window) & (place_N1C >= 0)
        return torch.cat([band, place_NR1 - sink_S >= window], dim=-1)
    padding_B111 = seen.padding_B[:, None, None, None]
    band = (lag_NRC >= 0) & (lag_NRC < window) & (place_N1C >= padding_B111)
    return torch.cat([band, place_NR1 - (padding_B111 + sink_S) >= window], dim=-1)[:, None]


def without_first(v_BHVn: Tensor, sinks: int, padding_B: Tensor | None, start: int) -> Tensor:
    """Values, zero at sinks, from `start` on."""
    if sinks == 0 or (padding_B is None and start >= sinks):
        return v_BHVn
    place_n = torch.arange(start, start + v_BHVn.shape[-1], device=v_BHVn.device)
    if padding_B is None:
        return v_BHVn * (place_n >= sinks)
    return v_BHVn * (place_n >= padding_B[:, None] + sinks)[:, None, None]


def joined(y_BHVn: Tensor, lse_BH1n: Tensor, level_BH1n: Tensor, far_BHXn: Tensor) -> Tensor:
    """Near and far values over one sum; of the far ones the last row is the sum of their weights.

    A near weight is exp(q . k - level), so the near share is a sigmoid, and no exponential can overflow. Where nothing
    is far it is 1.
    """
    values = far_BHXn.shape[2] - 1
    far_BHVn, sum_BH1n = far_BHXn.to(lse_BH1n.dtype).split_with_sizes([values, 1], 2)
    counted_BH1n = sum_BH1n.clamp_min(SMALLEST)
    odds_BH1n = lse_BH1n - level_BH1n - counted_BH1n.log()
    there = sum_BH1n >= SMALLEST
    nearly = torch.where(there, odds_BH1n.sigmoid(), 1.0), torch.where(there, (-odds_BH1n).sigmoid(), 0.0)
    return nearly[0] * y_BHVn + nearly[1] * (far_BHVn / counted_BH1n)


def joined_reference(
    products_BHLL: Tensor, near_LL: Tensor, v_BHVL: Tensor, level_BH1L: Tensor, far_BHXL: Tensor
) -> Tensor:
    """The same of whole sequences, from all products of queries and keys and which of them are near: one sum of all
    weights, each relative to the largest near one of its row."""
    logs_BHLL = (products_BHLL - level_BH1L.transpose(-1, -2)).masked_fill(~near_LL, float("-inf"))
    largest_BHL1 = logs_BHLL.amax(-1, keepdim=True).detach()
    weights_BHLL = (logs_BHLL - largest_BHL1).exp()
    far_BHLX = far_BHXL.transpose(-1, -2) * (-largest_BHL1).exp()
    mixed_BHLV = weights_BHLL @ v_BHVL.transpose(-1, -2) + far_BHLX[..., :-1]
    return (mixed_BHLV / (weights_BHLL.sum(-1, keepdim=True) + far_BHLX[..., -1:])).transpose(-1, -2)


def float_of(x: Tensor) -> Tensor:
    """In the precision of products."""
    return x.to(compute_dtype(x.dtype))
