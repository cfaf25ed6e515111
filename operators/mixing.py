"""Multi-head mixing: every position gathers the values before it, weighed by lag and by q . k.

    y_t = sum_{s <= t} h_{t-s} f(q_t . k_s) v_s                     per head

f is the identity, or the power (1 + q . k / degree)^degree: the product of features of q and of k too, all their
monomials, which are never written out. This is the convolution of h with the outer products of keys and values,
contracted with the query (Massaroli et al. 2023, section 4), computed as a masked matrix product
(f(q k^T) * Toeplitz(h)) v over blocks of query rows: O(L^2) multiplications but no softmax, and nothing quadratic is
kept for backward. Widths of keys and values are independent, so other feature maps on q and k, or a row of ones in v
for a normaliser, need no change here. Queries may be fewer than keys: they are the last positions, which is decoding
and chunked prefill.

Inputs in bfloat16 stay so as operands of the matrix products, four times as fast as float32's, and so do their
results; powers are raised and filter gradients summed in float32.

Shapes: B batch, H heads, K key width, V value width, Q queries, T keys (T >= Q), R rows of a block,
S keys that a block sees. Positions are last throughout.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution import compute_dtype

ROWS, ROWS_BFLOAT16 = 64, 128  # of a block, measured
SCRATCH = 2**19  # products of a block in bfloat16, so that they stay in the cache


def _blocks(queries: int, keys: int, lags: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Query rows of each block, and the keys at or before its last row that a filter of so many lags reaches."""
    offset, rows = keys - queries, ROWS_BFLOAT16 if dtype == torch.bfloat16 else ROWS
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        yield slice(start, stop), slice(max(0, offset + start - lags + 1), offset + stop)


def _within(h_HT: Tensor, keys: slice) -> Tensor:
    """The filters over as many lags as there are keys, zero where they end earlier."""
    seen = keys.stop - keys.start
    h_HS = h_HT[:, :seen]
    return h_HS if h_HS.shape[1] == seen else torch.nn.functional.pad(h_HS, (0, seen - h_HS.shape[1]))


def lag_weights(h_HS: Tensor, rows: int) -> Tensor:
    """Weights (H, R, S) of the last R rows over S keys, rows in reverse: a unit-stride view of h reversed."""
    padded = torch.nn.functional.pad(h_HS.flip(-1), (0, rows - 1))
    return padded.unfold(-1, h_HS.shape[-1], 1)


def lag_sums(dweights_HRS: Tensor) -> Tensor:
    """Adjoint of `lag_weights`: sums (H, S) over equal lags, by writing row r shifted by r places."""
    heads, rows, keys = dweights_HRS.shape
    width = keys + rows - 1
    skewed = dweights_HRS.new_zeros(heads, rows, width)
    skewed.as_strided((heads, rows, keys), (rows * width, width + 1, 1)).copy_(dweights_HRS)
    return skewed.sum(1, dtype=compute_dtype(skewed.dtype))[:, :keys].flip(-1)


def _flip(x: Tensor) -> Tensor:
    """Time reversed; as integers, for torch is slow at it in bfloat16."""
    return x.view(torch.int16).flip(-1).view(x.dtype) if x.dtype == torch.bfloat16 else x.flip(-1)


def _over_batch(x_BHRS: Tensor) -> Tensor:
    return x_BHRS[0] if x_BHRS.shape[0] == 1 else x_BHRS.sum(0)  # which a sum of one is slow at


def _weigh(products: Tensor, degree: int | None) -> Tensor:
    """f of products, in their place; powers at least in float32."""
    if degree is None:
        return products
    return _raise(_wide(products).mul_(1 / degree).add_(1.0), degree)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _raise(base: Tensor, degree: int) -> Tensor:
    """base^degree, a power of two, in its place."""
    for _ in range(degree.bit_length() - 1):
        base *= base
    return base


def _weigh_and_slope(products: Tensor, degree: int | None) -> tuple[Tensor, Tensor | None]:
    """f of products and its derivative, None where that is 1."""
    if degree is None:
        return products, None
    base = _wide(products).mul_(1 / degree).add_(1.0)
    slope, square = base.clone(), base
    for _ in range(degree.bit_length() - 2):
        square = square.square()
        slope *= square
    return slope * base, slope


def _groups(q_BHKQ: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads at a time: all, or in bfloat16 some heads of one."""
    batch, heads, _, queries = q_BHKQ.shape
    if q_BHKQ.dtype != torch.bfloat16:
        yield slice(0, batch), slice(0, heads)
        return
    for sequence in range(batch):
        for some in heads_at_a_time(heads, queries, keys):
            yield slice(sequence, sequence + 1), some


def heads_at_a_time(heads: int, queries: int, keys: int) -> Iterator[slice]:
    """As many as fill the scratch, in bfloat16."""
    width = max(1, SCRATCH // (min(queries, ROWS_BFLOAT16) * keys))
    for start in range(0, heads, width):
        yield slice(start, min(start + width, heads))


def masked_forward(q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None) -> Tensor:
    """`mix` without gradients."""
    h_HT = h_HT.to(q_BHKQ.dtype) if degree is None else h_HT
    y_BHVQ = q_BHKQ.new_empty(*v_BHVT.shape[:3], q_BHKQ.shape[-1])
    for rows, keys in _blocks(q_BHKQ.shape[-1], k_BHKT.shape[-1], h_HT.shape[-1], q_BHKQ.dtype):
        q_BHKR = _flip(q_BHKQ[..., rows])
        scores_BHRS = _weigh(q_BHKR.transpose(-1, -2) @ k_BHKT[..., keys], degree)
        scores_BHRS *= lag_weights(_within(h_HT, keys), q_BHKR.shape[-1])
        y_BHVQ[..., rows] = _flip(v_BHVT[..., keys] @ scores_BHRS.to(v_BHVT.dtype).transpose(-1, -2))
    return y_BHVQ


def masked_backward(parts: list[Tensor], h_HT: Tensor, degree: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and h, from q, k, v and the gradient of the outputs."""
    q_BHKQ, k_BHKT, v_BHVT, grad_BHVQ = parts
    dtype, dq = q_BHKQ.dtype, torch.empty_like(q_BHKQ, memory_format=torch.contiguous_format)
    dk, dv, dh = (torch.zeros_like(part, dtype=compute_dtype(part.dtype)) for part in (k_BHKT, v_BHVT, h_HT))
    h_HT = h_HT.to(dtype) if degree is None else h_HT
    for rows, keys in _blocks(q_BHKQ.shape[-1], k_BHKT.shape[-1], h_HT.shape[-1], dtype):
        q_BHKR, grad_BHVR = _flip(q_BHKQ[..., rows]), _flip(grad_BHVQ[..., rows])
        weights_HRS = lag_weights(_within(h_HT, keys), q_BHKR.shape[-1])
        products_BHRS = q_BHKR.transpose(-1, -2) @ k_BHKT[..., keys]
        scores_BHRS, slope_BHRS = _weigh_and_slope(products_BHRS, degree)
        dmixed_BHRS = (grad_BHVR.transpose(-1, -2) @ v_BHVT[..., keys]).to(scores_BHRS.dtype)
        dh_HS = lag_sums(_over_batch(dmixed_BHRS * scores_BHRS))[:, : dh.shape[-1]]
        dh[:, : dh_HS.shape[-1]] += dh_HS
        dv[..., keys] += grad_BHVR @ scores_BHRS.mul_(weights_HRS).to(dtype)
        dscores_BHRS = dmixed_BHRS.mul_(weights_HRS)
        if slope_BHRS is not None:
            dscores_BHRS *= slope_BHRS
        dscores_BHRS = dscores_BHRS.to(dtype)
        dk[..., keys] += q_BHKR @ dscores_BHRS
        dq[..., rows] = _flip(k_BHKT[..., keys] @ dscores_BHRS.transpose(-1, -2))
    return dq, dk, dv, dh


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None) -> Tensor:
        ctx.save_for_backward(q_BHKQ, k_BHKT, v_BHVT, h_HT)
        ctx.degree = degree
        y_BHVQ = q_BHKQ.new_empty(*v_BHVT.shape[:3], q_BHKQ.shape[-1])
        for some in _groups(q_BHKQ, k_BHKT.shape[-1]):
            y_BHVQ[some] = masked_forward(q_BHKQ[some], k_BHKT[some], v_BHVT[some], h_HT[some[1]], degree)
        return y_BHVQ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHVQ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q_BHKQ, k_BHKT, v_BHVT, h_HT = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BHKQ, k_BHKT, v_BHVT))
        dh = torch.zeros_like(h_HT)
        with torch.autocast(grad_BHVQ.device.type, enabled=False):
            for some in _groups(q_BHKQ, k_BHKT.shape[-1]):
                parts = [x[some] for x in (q_BHKQ, k_BHKT, v_BHVT, grad_BHVQ)]
                dq[some], dk[some], dv[some], dtheirs = masked_backward(parts, h_HT[some[1]], ctx.degree)
                dh[some[1]] += dtheirs
        return dq, dk, dv, dh, None


def mix(q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None = None) -> Tensor:
    """Mix values over the past by lag filter and query-key product; see the module's head for the sum.

    Args:
        q_BHKQ: queries of the last Q positions.
        k_BHKT, v_BHVT: keys and values of all T positions.
        h_HT: lag filter of every head, T lags, in float32 where the inputs are bfloat16; with fewer lags it is zero
            beyond them, and keys further back cost nothing.
        degree: of the power, a power of two; None for the identity.

    Returns:
        (B, H, V, Q), in the inputs' dtype: bfloat16, float32 or float64; run it outside autocast.
    """
    return cast(Tensor, _Mix.apply(q_BHKQ, k_BHKT, v_BHVT, h_HT, degree))  # type: ignore[no-untyped-call]


def mix_step(q_BHK1: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, reversed_HT: Tensor, degree: int | None) -> Tensor:
    """`mix` of the last position alone, with the filters reversed in time; (B, H, V, 1)."""
    q_N1K = q_BHK1.flatten(0, 1).transpose(1, 2)
    if degree is None:
        scores_N1T = torch.bmm(q_N1K, k_BHKT.flatten(0, 1)).to(reversed_HT.dtype)
    else:
        base_N1T = torch.baddbmm(q_N1K.new_ones(1), q_N1K, k_BHKT.flatten(0, 1), alpha=1 / degree)
        scores_N1T = _raise(base_N1T.to(reversed_HT.dtype), degree)
    scores_N1T = scores_N1T.view(*q_BHK1.shape[:2], -1).mul_(reversed_HT).view_as(scores_N1T).to(v_BHVT.dtype)
    return torch.bmm(v_BHVT.flatten(0, 1), scores_N1T.transpose(1, 2)).view(*v_BHVT.shape[:3], 1)


def mix_reference(q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None = None) -> Tensor:
    """`mix` one query at a time from its definition, differentiable by autograd."""
    offset = k_BHKT.shape[-1] - q_BHKQ.shape[-1]
    outputs = []
    for i in range(q_BHKQ.shape[-1]):
        seen = offset + i + 1
        product_BHS = (q_BHKQ[..., i, None] * k_BHKT[..., :seen]).sum(2)
        if degree is not None:
            product_BHS = (1 + product_BHS / degree) ** degree
        weight_BHS = product_BHS * h_HT[:, :seen].flip(-1)
        outputs.append((weight_BHS[:, :, None] * v_BHVT[..., :seen]).sum(-1))
    return torch.stack(outputs, dim=-1)
