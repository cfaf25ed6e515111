"""All that heads do between their projections in one pass, a few heads at a time, in half precision.

    u = short convolution of p,   y_t = sum_s h_{t-s} f(q_t, k_s) v_s / n_t + direct v_t   with q, k, v features of u

What happens to some heads happens while they are in the cache. Kept are the projections, and mixed values where they
are divided by the sum of their weights; queries, keys and values are computed again for backward, and those of all
heads never exist together.

Shapes: as in `features`, E rows of the projections p, D width of the model, T taps.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import convolve_taps, convolve_taps_backward
from operators.mixing.chunked import Bases, chunked_backward, chunked_forward, heads_at_a_time
from operators.mixing.features import Layout, divided, features
from operators.mixing.masked import Backend, backend_for, groups, masked_backward, masked_forward


class Inputs(NamedTuple):
    """What is computed from: projections, mask of real positions, short convolution, direct term, the features' map."""

    p_BEL: Tensor
    mask_BL: Tensor | None
    taps_ET: Tensor
    bias_E: Tensor
    direct_D: Tensor
    map_HKK: Tensor | None


class _Group(NamedTuple):
    """Some heads of some sequences: where their parts and their values are among the rows, and what is theirs alone."""

    sequences: slice
    heads: slice
    rows: list[slice]
    values: slice
    mask_b1L: Tensor | None
    map_GKK: Tensor | None
    weights: tuple[Tensor, ...]
    how: tuple[int | None, Backend]  # the power's degree, and what weighs the products

    def parts(self, inputs: Inputs) -> list[Tensor]:
        """Their rows after the short convolution, zero at padding, (b, G, rows of a head, L) each."""
        found = []
        for rows in self.runs():
            u_bRL = convolve_taps(inputs.p_BEL[self.sequences, rows], inputs.taps_ET[rows], inputs.bias_E[rows])
            found.append(u_bRL if self.mask_b1L is None else u_bRL.mul_(self.mask_b1L))
        parts = found if len(found) > 1 else found[0].split([rows.stop - rows.start for rows in self.rows], 1)
        return [part.unflatten(1, (self.heads.stop - self.heads.start, -1)) for part in parts]

    def runs(self) -> list[slice]:
        """The rows of all parts: one run where these are all heads."""
        touching = all(a.stop == b.start for a, b in pairwise(self.rows))
        return [slice(self.rows[0].start, self.rows[-1].stop)] if touching else self.rows

    def features(self, parts: list[Tensor], map_GKK: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        mask_bL = None if self.mask_b1L is None else self.mask_b1L[:, 0]
        return features(parts, layout, map_GKK, mask_bL)


def _groups(inputs: Inputs, weights: tuple[Tensor, ...], layout: Layout) -> Iterator[_Group]:
    p_BEL, mask_BL, *_, map_HKK = inputs
    backend = backend_for(p_BEL, len(p_BEL) * layout.heads, *layout.mixed, layout.degree)
    for sequences, heads in _chosen(p_BEL, weights, layout, backend):
        values = slice(heads.start * layout.value_width, heads.stop * layout.value_width)
        theirs = (
            None if mask_BL is None else mask_BL[sequences, None].to(p_BEL.dtype),
            None if map_HKK is None else map_HKK[heads],
            tuple(weight[heads] for weight in weights),
            (layout.degree, backend),
        )
        yield _Group(sequences, heads, layout.rows_of(heads), values, *theirs)


def _chosen(
    p_BEL: Tensor, weights: tuple[Tensor, ...], layout: Layout, backend: Backend
) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads at a time."""
    batch, _, length = p_BEL.shape
    if len(weights) == 1:
        yield from groups(p_BEL[:, :1, None].expand(-1, layout.heads, -1, -1), length, backend)
        return
    for sequence in range(batch):
        every = [slice(0, layout.heads)]
        for heads in heads_at_a_time(layout.mixed[0], length, Bases(*weights)) if p_BEL.device.type == "cpu" else every:
            yield slice(sequence, sequence + 1), heads


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *given: Any) -> Tensor:
        inputs, weights = Inputs(*given[:6]), given[6:]
        batch, _, length = inputs.p_BEL.shape
        y_BDL = inputs.p_BEL.new_empty(batch, len(inputs.direct_D), length)
        mixed_BHVL = y_BDL.new_empty(batch, layout.heads, layout.mixed[1], length) if layout.normalised else None
        for group in _groups(inputs, weights, layout):
            parts = group.parts(inputs)
            y = _mix(group.features(parts, group.map_GKK, layout), group)
            if mixed_BHVL is not None:
                mixed_BHVL[group.sequences, group.heads] = y
                y = divided(y)
            direct = inputs.direct_D[group.values, None].to(y.dtype)
            out = y_BDL[group.sequences, group.values]
            torch.addcmul(y.flatten(1, 2), parts[2].flatten(1, 2), direct, out=out)
        ctx.save_for_backward(mixed_BHVL, *given)
        ctx.layout = layout
        return y_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Tensor | None, ...]:
        mixed_BHVL, *given = ctx.saved_tensors
        inputs, weights = Inputs(*given[:6]), tuple(given[6:])
        dp_BEL = torch.empty_like(inputs.p_BEL, memory_format=torch.contiguous_format)
        dtaps, dbias, ddirect, *dweights = (torch.zeros_like(x) for x in (*inputs[2:5], *weights))
        dmap: Any = None if inputs.map_HKK is None else torch.zeros_like(inputs.map_HKK)
        with torch.autocast(grad_BDL.device.type, enabled=False):
            for group in _groups(inputs, weights, ctx.layout):
                parts, grad_bDL = group.parts(inputs), grad_BDL[group.sequences, group.values].contiguous()
                ddirect[group.values] += (grad_bDL * parts[2].flatten(1, 2)).sum((0, 2))
                dmixed = grad_bDL.view_as(parts[2])
                if mixed_BHVL is not None:
                    dmixed = _divided_backward(dmixed, mixed_BHVL[group.sequences, group.heads])
                dparts, dmaps, dtheirs = _backward(group, parts, dmixed, ctx.layout)
                du = [part.flatten(1, 2) for part in dparts]
                du[2] = torch.addcmul(du[2], grad_bDL, inputs.direct_D[group.values, None].to(du[2].dtype))
                runs = group.runs()
                for rows, du_bRL in zip(runs, du if len(runs) > 1 else [torch.cat(du, dim=1)], strict=True):
                    if group.mask_b1L is not None:
                        du_bRL *= group.mask_b1L
                    p_bRL, dp_bRL = (x[group.sequences, rows] for x in (inputs.p_BEL, dp_BEL))
                    found = convolve_taps_backward(du_bRL, p_bRL, inputs.taps_ET[rows], dp_bRL)
                    dtaps[rows] += found[0]
                    dbias[rows] += found[1]
                for dmap_GKK in dmaps:
                    dmap[group.heads] += dmap_GKK
                for dweight, dtheir in zip(dweights, dtheirs, strict=True):
                    dweight[group.heads] += dtheir
        return None, dp_BEL, None, dtaps, dbias, ddirect, dmap, *dweights


def _backward(
    group: _Group, parts: list[Tensor], dmixed: Tensor, layout: Layout
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Gradients of the parts, of the map if there is one, and of the weights, from that of the mixed values."""
    if layout.plain:
        dparts, dweights = _mix_backward([*parts, dmixed], group)
        return dparts, [], dweights
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*parts, *([] if group.map_GKK is None else [group.map_GKK]))]
        count = len(parts)
        mixed = group.features(leaves[:count], None if group.map_GKK is None else leaves[-1], layout)
    found, dweights = _mix_backward([*(x.detach() for x in mixed), dmixed], group)
    grads = torch.autograd.grad(mixed, leaves, [dx.to(x.dtype) for dx, x in zip(found, mixed, strict=True)])
    return list(grads[:count]), list(grads[count:]), dweights


def _divided_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient of mixed values from that of the divided ones."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (found,) = torch.autograd.grad(divided(y), y, grad)
    return found


def _mix(parts: tuple[Tensor, Tensor, Tensor], group: _Group) -> Tensor:
    if len(group.weights) == 1:
        return masked_forward(*parts, group.weights[0], *group.how)
    q, k, v = (part[0] for part in parts)
    return chunked_forward(q, k, v, Bases(*group.weights))[None]


def _mix_backward(parts: list[Tensor], group: _Group) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Gradients of queries, keys and values, and of the weights."""
    if len(group.weights) == 1:
        *grads, dh = masked_backward(parts, group.weights[0], *group.how)
        return grads, (dh,)
    grads, dbases = chunked_backward([part[0] for part in parts], Bases(*group.weights))
    return [grad[None] for grad in grads], dbases


def mix_fused(inputs: Inputs, weights: tuple[Tensor] | Bases, layout: Layout) -> Tensor:
    """From projections to what the last projection reads, differentiable by all but the mask.

    Args:
        inputs: projections in bfloat16, already masked, and what else is read.
        weights: of the mixing, see `forms.weights_for`, float32.
        layout: of the rows.

    Returns:
        (B, D, L) in bfloat16; run it outside autocast.
    """
    p_BEL, mask_BL, *others = inputs
    floats = (None if x is None else x.float() for x in others)
    return cast(Tensor, _Fused.apply(layout, p_BEL, mask_BL, *floats, *weights))  # type: ignore[no-untyped-call]
