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
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import compute_dtype
from operators.gpu.heads import masked_backward as backward_by_kernels
from operators.gpu.heads import masked_forward as forward_by_kernels
from operators.gpu.heads import takes
from operators.mixing.lags import block_order, power, weigh, weigh_backward
from operators.native import serves

Backend = Literal["torch", "core", "triton"]

ROWS, ROWS_BFLOAT16 = 64, 128  # of a block, measured
SCRATCH = 2**19  # products of a block in bfloat16, so that they stay in the cache
SCRATCH_ELSEWHERE = 2**26  # products of a block on accelerators


def _blocks(q_BHKQ: Tensor, keys: int, lags: int) -> Iterator[tuple[slice, slice]]:
    """Query rows of each block, and the keys at or before its last row that a filter of so many lags reaches."""
    batch, heads, _, queries = q_BHKQ.shape
    offset, rows = keys - queries, ROWS_BFLOAT16 if q_BHKQ.dtype == torch.bfloat16 else ROWS
    if q_BHKQ.device.type != "cpu":
        rows = max(rows, SCRATCH_ELSEWHERE // (batch * heads * keys))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        yield slice(start, stop), slice(max(0, offset + start - lags + 1), offset + stop)


def _within(h_HT: Tensor, keys: slice) -> Tensor:
    """The filters over as many lags as there are keys, zero where they end earlier."""
    seen = keys.stop - keys.start
    h_HS = h_HT[:, :seen]
    return h_HS if h_HS.shape[1] == seen else torch.nn.functional.pad(h_HS, (0, seen - h_HS.shape[1]))


def backend_for(like: Tensor, rows: int, key_width: int, value_width: int, degree: int | None) -> Backend:
    """What weighs the products: torch, the compiled core, or the kernels for accelerators.

    `like` has the dtype, the device and, last, the positions T of the keys; `rows` are heads of all sequences.
    """
    if takes(like, rows, key_width, value_width, degree):
        return "triton"
    return "core" if serves(like) else "torch"


def groups(q_BHKQ: Tensor, keys: int, backend: Backend) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads at a time: all, as many sequences as fill the scratch, or in bfloat16 on CPUs whatever does:
    sequences with all heads, or some heads of one."""
    batch, heads, _, queries = q_BHKQ.shape
    width, every = batch, heads
    if q_BHKQ.device.type != "cpu":
        width = batch if backend == "triton" else max(1, SCRATCH_ELSEWHERE // (heads * keys * ROWS))
    elif q_BHKQ.dtype == torch.bfloat16 and backend != "triton":
        fitting = max(1, SCRATCH // (min(queries, ROWS_BFLOAT16) * keys))
        width, every = max(1, fitting // heads), min(fitting, heads)
    for first in range(0, batch, width):
        for head in range(0, heads, every):
            yield slice(first, min(first + width, batch)), slice(head, min(head + every, heads))


def masked_forward(
    q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None, backend: Backend
) -> Tensor:
    """`mix` without gradients."""
    if backend == "triton":
        return forward_by_kernels(q_BHKQ, k_BHKT, v_BHVT, h_HT, degree)
    y_BHVQ = q_BHKQ.new_empty(*v_BHVT.shape[:3], q_BHKQ.shape[-1])
    core = backend == "core"
    turned = block_order(core)
    for rows, keys in _blocks(q_BHKQ, k_BHKT.shape[-1], h_HT.shape[-1]):
        products_BHRS = turned(q_BHKQ[..., rows]).transpose(-1, -2) @ k_BHKT[..., keys]
        scores_BHRS = weigh(products_BHRS, _within(h_HT, keys), degree, core)
        y_BHVQ[..., rows] = turned(v_BHVT[..., keys] @ scores_BHRS.transpose(-1, -2))
    return y_BHVQ


def masked_backward(
    parts: list[Tensor], h_HT: Tensor, degree: int | None, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and h, from q, k, v and the gradient of the outputs."""
    q_BHKQ, k_BHKT, v_BHVT, grad_BHVQ = parts
    if backend == "triton":
        return backward_by_kernels(parts, h_HT, degree)
    core = backend == "core"
    turned, dq = block_order(core), torch.empty_like(q_BHKQ, memory_format=torch.contiguous_format)
    dk, dv, dh = (torch.zeros_like(part, dtype=compute_dtype(part.dtype)) for part in (k_BHKT, v_BHVT, h_HT))
    for rows, keys in _blocks(q_BHKQ, k_BHKT.shape[-1], h_HT.shape[-1]):
        q_BHKR, grad_BHVR = turned(q_BHKQ[..., rows]), turned(grad_BHVQ[..., rows])
        products_BHRS = q_BHKR.transpose(-1, -2) @ k_BHKT[..., keys]
        dscores_BHRS = grad_BHVR.transpose(-1, -2) @ v_BHVT[..., keys]
        given = (products_BHRS, dscores_BHRS, _within(h_HT, keys), degree, core)
        scores_BHRS, dproducts_BHRS, dh_HS = weigh_backward(*given)
        seen = min(dh.shape[-1], dh_HS.shape[-1])
        dh[:, :seen] += dh_HS[:, :seen]
        dv[..., keys] += grad_BHVR @ scores_BHRS
        dk[..., keys] += q_BHKR @ dproducts_BHRS
        dq[..., rows] = turned(k_BHKT[..., keys] @ dproducts_BHRS.transpose(-1, -2))
    return dq, dk, dv, dh


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None) -> Tensor:
        ctx.save_for_backward(q_BHKQ, k_BHKT, v_BHVT, h_HT)
        rows = q_BHKQ.shape[0] * q_BHKQ.shape[1]
        how = degree, backend_for(k_BHKT, rows, q_BHKQ.shape[2], v_BHVT.shape[2], degree)
        ctx.how = how
        y_BHVQ = q_BHKQ.new_empty(*v_BHVT.shape[:3], q_BHKQ.shape[-1])
        for some in groups(q_BHKQ, v_BHVT.shape[-1], how[1]):
            y_BHVQ[some] = masked_forward(q_BHKQ[some], k_BHKT[some], v_BHVT[some], h_HT[some[1]], *how)
        return y_BHVQ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHVQ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q_BHKQ, k_BHKT, v_BHVT, h_HT = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BHKQ, k_BHKT, v_BHVT))
        dh = torch.zeros_like(h_HT)
        with torch.autocast(grad_BHVQ.device.type, enabled=False):
            for some in groups(q_BHKQ, v_BHVT.shape[-1], ctx.how[1]):
                parts = [x[some] for x in (q_BHKQ, k_BHKT, v_BHVT, grad_BHVQ)]
                dq[some], dk[some], dv[some], dtheirs = masked_backward(parts, h_HT[some[1]], *ctx.how)
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
    batch, heads, width, keys = v_BHVT.shape
    scores_N1T = torch.bmm(q_BHK1.flatten(0, 1).transpose(1, 2), k_BHKT.flatten(0, 1))
    if scores_N1T.dtype != reversed_HT.dtype:
        scores_N1T = scores_N1T.to(reversed_HT.dtype)
    if degree is not None:
        power(scores_N1T.mul_(1 / degree).add_(1.0), degree)
    scores_N1T.view(batch, heads, keys).mul_(reversed_HT)
    y_NV1 = torch.bmm(v_BHVT.flatten(0, 1), scores_N1T.to(v_BHVT.dtype).transpose(1, 2))
    return y_NV1.view(batch, heads, width, 1)


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
