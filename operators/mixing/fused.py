"""Short convolution, mixing and direct term of heads in one pass, a few heads at a time.

    u = short convolution of p,   y_t = sum_s h_{t-s} f(q_t, k_s) v_s + direct v_t   with q, k, v the rows of u

What happens to some heads happens while they are in the cache; nothing but the projections is kept, and no queries,
keys or values of all heads ever exist. For half precision, and heads without gates, maps or sums of weights.

Shapes: as in `hyena`, and G heads at a time, K here the width of a head's query and key, V of its value, T taps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import convolve_taps, convolve_taps_backward
from operators.gpu import accelerated
from operators.gpu.heads import takes
from operators.mixing.chunked import Bases, chunked_backward, chunked_forward
from operators.mixing.chunked import heads_at_a_time as chunked_heads
from operators.mixing.masked import heads_at_a_time as masked_heads
from operators.mixing.masked import masked_backward, masked_forward


class _Group(NamedTuple):
    """Some heads of a sequence: where their queries, keys and values are among the rows, and their weights."""

    sequence: slice
    heads: slice
    rows: list[slice]
    values: slice
    weights: tuple[Tensor, ...]

    def convolved(self, p_BEL: Tensor, taps_ET: Tensor, bias_E: Tensor) -> list[Tensor]:
        """Queries, keys and values, (B or 1, G, width, L)."""
        count = self.heads.stop - self.heads.start
        parts = [convolve_taps(p_BEL[self.sequence, rows], taps_ET[rows], bias_E[rows]) for rows in self.rows]
        return [part.unflatten(1, (count, -1)) for part in parts]


def _groups(p_BEL: Tensor, d_model: int, weights: tuple[Tensor, ...], degree: int | None) -> Iterator[_Group]:
    heads, (batch, inner, length) = weights[0].shape[0], p_BEL.shape
    key, value = (inner - d_model) // 2 // heads, d_model // heads
    masked = len(weights) == 1
    by_kernels = masked and accelerated(p_BEL) and takes(p_BEL.dtype, batch * heads, key, value, degree)
    for sequence in [slice(0, batch)] if by_kernels else [slice(i, i + 1) for i in range(batch)]:
        if p_BEL.device.type != "cpu" or by_kernels:
            some = iter([slice(0, heads)])
        else:
            some = masked_heads(heads, length, length) if masked else chunked_heads(key, length, Bases(*weights))
        for part in some:
            keys = slice(part.start * key, part.stop * key)
            values = slice(part.start * value, part.stop * value)
            rows = [slice(keys.start + first, keys.stop + first) for first in (0, heads * key)]
            rows.append(slice(values.start + inner - d_model, values.stop + inner - d_model))
            yield _Group(sequence, part, rows, values, tuple(weight[part] for weight in weights))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p_BEL: Tensor,
        taps_ET: Tensor,
        bias_E: Tensor,
        direct_D: Tensor,
        degree: int | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(p_BEL, taps_ET, bias_E, direct_D, *weights)
        ctx.degree = degree
        y_BDL = p_BEL.new_empty(p_BEL.shape[0], len(direct_D), p_BEL.shape[2])
        for group in _groups(p_BEL, len(direct_D), weights, degree):
            q, k, v = group.convolved(p_BEL, taps_ET, bias_E)
            if len(weights) == 1:
                y = masked_forward(q, k, v, group.weights[0], degree)
            else:
                y = chunked_forward(q[0], k[0], v[0], Bases(*group.weights))[None]
            direct = direct_D[group.values, None].to(y.dtype)
            torch.addcmul(y.flatten(1, 2), v.flatten(1, 2), direct, out=y_BDL[group.sequence, group.values])
        return y_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Tensor | None, ...]:
        p_BEL, taps_ET, bias_E, direct_D, *weights = ctx.saved_tensors
        dp = torch.empty_like(p_BEL, memory_format=torch.contiguous_format)
        dtaps, dbias, ddirect, *dweights = (torch.zeros_like(x) for x in (taps_ET, bias_E, direct_D, *weights))
        with torch.autocast(grad_BDL.device.type, enabled=False):
            for group in _groups(p_BEL, len(direct_D), tuple(weights), ctx.degree):
                parts = group.convolved(p_BEL, taps_ET, bias_E)
                grad_1DL = grad_BDL[group.sequence, group.values].contiguous()
                ddirect[group.values] += (grad_1DL * parts[2].flatten(1, 2)).sum((0, 2))
                grads, dtheirs = _mix_backward([*parts, grad_1DL.view_as(parts[2])], group.weights, ctx.degree)
                du = [part.flatten(1, 2) for part in grads]
                du[2] = torch.addcmul(du[2], grad_1DL, direct_D[group.values, None].to(du[2].dtype))
                for rows, du_1RL in zip(group.rows, du, strict=True):
                    p_1RL, dp_1RL = (x[group.sequence, rows] for x in (p_BEL, dp))
                    dtaps_RT, dbias_R = convolve_taps_backward(du_1RL, p_1RL, taps_ET[rows], dp_1RL)
                    dtaps[rows] += dtaps_RT
                    dbias[rows] += dbias_R
                for dweight, dtheir in zip(dweights, dtheirs, strict=True):
                    dweight[group.heads] += dtheir
        return dp, dtaps, dbias, ddirect, None, *dweights


def _mix_backward(
    parts: list[Tensor], weights: tuple[Tensor, ...], degree: int | None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Gradients of queries, keys and values, and of the weights."""
    if len(weights) == 1:
        *grads, dh = masked_backward(parts, weights[0], degree)
        return grads, (dh,)
    grads, dbases = chunked_backward([part[0] for part in parts], Bases(*weights))
    return [grad[None] for grad in grads], dbases


def mix_fused(
    p_BEL: Tensor,
    taps_ET: Tensor,
    bias_E: Tensor,
    direct_D: Tensor,
    weights: tuple[Tensor] | Bases,
    degree: int | None = None,
) -> Tensor:
    """From projections to mixed values.

    Args:
        p_BEL: rows of all queries, of all keys and of all values, bfloat16.
        taps_ET, bias_E, direct_D: of the short convolution, and the direct term, float32.
        weights: of the mixing, see `forms.weights_for`, float32.
        degree: of powers, None for the product of queries and keys.

    Returns:
        (B, D, L) in bfloat16; run it outside autocast.
    """
    inputs = (taps_ET.float(), bias_E.float(), direct_D.float(), degree, *weights)
    return cast(Tensor, _Fused.apply(p_BEL, *inputs))  # type: ignore[no-untyped-call]
