"""Near positions and the first ones by softmax, and what they share one sum with.

    near_t = {s: t - s < window, or s among the first `sinks`},   lse_t = log sum_{s near} exp(q_t . k_s)
    y_t = sum_{s near} exp(q_t . k_s - lse_t) v_s

Blocks of queries against the keys that they can see, O(L window); all in the inputs' precision, where that is bfloat16
the softmax itself in float32.

Shapes: B batch, H heads, K width of query and key, V of value, Q queries, T keys (T >= Q; the queries are the last of
their positions), S sinks, N blocks, R rows of a block, C keys of a block. Positions are last.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from operators.convolution.causal import compute_dtype

ROWS = 64  # of a block at least
NEVER = -1e30  # added to the product with a key that does not count: finite, for padded queries have no other
SMALLEST = 1e-30  # of a sum of far weights that counts


class Seen(NamedTuple):
    """What queries may look at; keys and values may be of fewer heads, which as many queries share each.

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


def for_heads(x_BGKn: Tensor, heads: int) -> Tensor:
    """What heads share, for each of them (B, H, K, n)."""
    return x_BGKn if x_BGKn.shape[1] == heads else x_BGKn.repeat_interleave(heads // x_BGKn.shape[1], 1)


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


def turns(frequencies_P: Tensor, start: int, new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, n) of position times frequency, in that precision."""
    place_n = torch.arange(start, start + new, dtype=frequencies_P.dtype, device=frequencies_P.device)
    angle_Pn = frequencies_P[:, None] * place_n
    return angle_Pn.cos().to(dtype), angle_Pn.sin().to(dtype)


def rotated(x_BHKn: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Channels i and P + i turned as `turns` says; those behind stay."""
    cos_Pn, sin_Pn = turns
    pairs = len(cos_Pn)
    one, other, *rest = x_BHKn.split([pairs, pairs, *([1] * (x_BHKn.shape[2] - 2 * pairs))], 2)
    first = torch.addcmul(one * cos_Pn, other, sin_Pn, value=-1)
    return torch.cat([first, torch.addcmul(other * cos_Pn, one, sin_Pn), *rest], dim=2)


def near(q_BHKQ: Tensor, seen: Seen, window: int) -> tuple[Tensor, Tensor]:
    """Values by softmax (B, H, V, Q) and the logarithms of the sums (B, H, 1, Q); differentiable where the queries are
    of all positions."""
    queries, keys = q_BHKQ.shape[-1], seen.k_BHKT.shape[-1]
    if queries == 1 and seen.padding_B is None:
        return _near_one(q_BHKQ, seen, window)
    before = min(keys - queries, window - 1)
    rows = min(queries, max(window, ROWS))
    blocks = -(-queries // rows)
    back = before if blocks == 1 else window - 1
    place_NR1 = torch.arange(blocks * rows, device=q_BHKQ.device).view(blocks, rows, 1) + seen.stop - queries
    place_N1C = place_NR1[:, :1] - back + torch.arange(back + rows, device=q_BHKQ.device)
    counted = _counted(seen, window, place_NR1, place_N1C)
    added_NRX = torch.zeros(counted.shape, dtype=q_BHKQ.dtype, device=q_BHKQ.device).masked_fill_(~counted, NEVER)
    last = [x[..., keys - queries - before :] for x in (seen.k_BHKT, seen.v_BHVT)]
    every = [for_heads(x, q_BHKQ.shape[1]) for x in (*last, seen.sink_k_BHKS, seen.sink_v_BHVS)]
    parts = (q_BHKQ, *every, added_NRX)
    return cast(tuple[Tensor, Tensor], _Near.apply((rows, back, before), *parts))  # type: ignore[no-untyped-call]


class _Near(torch.autograd.Function):
    """All blocks at once, keys of a block behind the sinks; weights of blocks are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        sizes: tuple[int, int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        added: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, back, before = sizes
        queries, blocks = q.shape[-1], added.shape[-3]
        q_BHNKR = _in_blocks(q, rows, blocks)
        k_BHNKX, v_BHNVX = (_behind_sinks(x, first, sizes, blocks) for x, first in ((k, sink_k), (v, sink_v)))
        products_BHNRX = (q_BHNKR.transpose(-1, -2) @ k_BHNKX).add_(added)
        largest_BHNR = products_BHNRX.amax(-1)
        weights_BHNRX = products_BHNRX.softmax(-1)  # in bfloat16 it computes in float32
        share_BHNR = weights_BHNRX.amax(-1).to(compute_dtype(q.dtype))
        lse_BHNR = largest_BHNR - share_BHNR.log()  # logsumexp would go over all once more
        y_BHNVR = v_BHNVX @ weights_BHNRX.transpose(-1, -2)
        ctx.save_for_backward(q_BHNKR, k_BHNKX, v_BHNVX, weights_BHNRX, y_BHNVR)
        ctx.sizes = rows, back, queries, sink_k.shape[-1]
        assert before == 0 or not any(ctx.needs_input_grad), "queries of some positions have no gradients"
        return _in_line(y_BHNVR, queries), lse_BHNR.flatten(2)[:, :, None, :queries]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHVQ: Tensor, dlse_BH1Q: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, y = ctx.saved_tensors
        rows, back, queries, sinks = ctx.sizes
        blocks = q.shape[2]
        dy_BHNVR = _in_blocks(dy_BHVQ.to(v.dtype), rows, blocks)
        dlse_BHNR1 = _in_blocks(dlse_BH1Q, rows, blocks).transpose(-1, -2)
        taken_BHNR1 = (dy_BHNVR * y).sum(3, dtype=compute_dtype(v.dtype))[..., None] - dlse_BHNR1
        dproducts = (dy_BHNVR.transpose(-1, -2) @ v).sub_(taken_BHNR1.to(v.dtype)).mul_(weights)
        dq = _in_line(k @ dproducts.transpose(-1, -2), queries)
        found = []
        for dx_BHNKX in (q @ dproducts, dy_BHNVR @ weights):
            own = dx_BHNKX[..., sinks + back :].clone()
            if back and blocks > 1:
                own[:, :, :-1, :, rows - back :] += dx_BHNKX[:, :, 1:, :, sinks : sinks + back]
            found.append((_in_line(own, queries), dx_BHNKX[..., :sinks].sum(2)))
        (dk, dsink_k), (dv, dsink_v) = found
        return None, dq, dk, dv, dsink_k, dsink_v, None


def _in_blocks(x_BHKQ: Tensor, rows: int, blocks: int) -> Tensor:
    """(B, H, N, K, R), contiguous, zeros behind the end."""
    padded = pad(x_BHKQ, (0, blocks * rows - x_BHKQ.shape[-1]))
    blocked: Tensor = padded.unflatten(-1, (blocks, rows)).transpose(2, 3)
    return blocked.contiguous()


def _in_line(x_BHNKR: Tensor, queries: int) -> Tensor:
    return x_BHNKR.transpose(2, 3).flatten(3)[..., :queries]


def _behind_sinks(x_BHKT: Tensor, sinks_BHKS: Tensor, sizes: tuple[int, int, int], blocks: int) -> Tensor:
    """Those of the sinks, then those that a block sees, (B, H, N, K, S + C)."""
    rows, back, before = sizes
    count, start = sinks_BHKS.shape[-1], back - before
    whole = pad(x_BHKT, (start, blocks * rows + before - x_BHKT.shape[-1]))
    made = x_BHKT.new_empty(*x_BHKT.shape[:2], blocks, x_BHKT.shape[2], count + back + rows)
    made[..., :count] = sinks_BHKS[:, :, None]
    made[..., count:] = whole.unfold(-1, back + rows, rows).transpose(2, 3)
    return made


def _near_one(q_BHK1: Tensor, seen: Seen, window: int) -> tuple[Tensor, Tensor]:
    """`near` of one query, whose keys all count: few operations for a step."""
    first = max(0, seen.stop - window)  # of the window
    near_k_BHKC, near_v_BHVC = (x[..., x.shape[-1] - seen.stop + first :] for x in (seen.k_BHKT, seen.v_BHVT))
    if (sinks := min(seen.sink_k_BHKS.shape[-1], first)) > 0:
        near_k_BHKC = torch.cat([seen.sink_k_BHKS[..., :sinks], near_k_BHKC], dim=-1)
        near_v_BHVC = torch.cat([seen.sink_v_BHVS[..., :sinks], near_v_BHVC], dim=-1)
    near_k_BHKC, near_v_BHVC = (for_heads(x, q_BHK1.shape[1]) for x in (near_k_BHKC, near_v_BHVC))
    products_BH1C = (q_BHK1.transpose(-1, -2) @ near_k_BHKC).to(compute_dtype(q_BHK1.dtype))
    lse_BH11 = products_BH1C.logsumexp(-1, keepdim=True)
    weights_BH1C = products_BH1C.softmax(-1).to(near_v_BHVC.dtype)
    return near_v_BHVC @ weights_BH1C.transpose(-1, -2), lse_BH11


def _counted(seen: Seen, window: int, place_NR1: Tensor, place_N1C: Tensor) -> Tensor:
    """Which sinks and keys count, ((B, 1,) N, R, S + C); a sink inside the window does so once."""
    lag_NRC = place_NR1 - place_N1C
    sink_S = torch.arange(seen.sink_k_BHKS.shape[-1], device=lag_NRC.device)
    if seen.padding_B is None:
        band = (lag_NRC >= 0) & (lag_NRC < window) & (place_N1C >= 0)
        return torch.cat([place_NR1 - sink_S >= window, band], dim=-1)
    padding_B111 = seen.padding_B[:, None, None, None]
    band = (lag_NRC >= 0) & (lag_NRC < window) & (place_N1C >= padding_B111)
    return torch.cat([place_NR1 - (padding_B111 + sink_S) >= window, band], dim=-1)[:, None]


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
    near_BH1n = torch.where(there, odds_BH1n.sigmoid(), 1.0)
    return torch.lerp(far_BHVn / counted_BH1n, y_BHVn.to(far_BHVn.dtype), near_BH1n)


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
