"""Multi-head mixing chunk by chunk: near lags exactly, all lags further away through states of few numbers.

Between positions a of a chunk and b of one that lies d chunks before it a smooth filter is h(d C + a - b) =
sum_{rs} out_r(a) G_d[r, s] into_s(b), with a few functions `into` and `out` of the place in a chunk. So every chunk
of keys and values becomes a state U[s] = sum_b into_s(b) k_b v_b^T, states are carried to later chunks,
M_n = sum_d G_d U_{n-d}, and read there: y_a = sum_r out_r(a) M_n[r]^T q_a. What is nearer is a masked matrix product as
in `masked`. O(L (C + R K)) instead of O(L^2), and nothing but queries, keys and values is kept for backward.

`into`, `out` and G are exact for sums of R real exponentials (`head_states`), G_d being powers of one matrix: a
recurrence. For other filters they are polynomials, and as exact as the filter is smooth (`smooth`).

Shapes: B batch, H heads, G heads at a time, K key width, V value width, L positions, C positions of a chunk, N chunks,
P chunks of which the near lags are (the own one and P - 1 before it), F = N - P chunks that are far from another,
R functions, S modes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.convolution.causal import compute_dtype
from operators.mixing.lags import lag_sums, lag_weights

CHUNK, CHUNK_BFLOAT16 = 128, 256  # of modal filters, measured
SCRATCH = 2**19  # numbers of an intermediate result, so that it stays in the cache
SCRATCH_ELSEWHERE = 2**26  # on accelerators


class Bases(NamedTuple):
    """A filter by chunks: lags near by (H, P C); `into` and `out` (H, R, C); and how states are carried.

    That is the matrix (H, R, R) from chunk to chunk, or one for every distance from P on (H, F, R, R).
    """

    near_HW: Tensor
    into_HRC: Tensor
    out_HRC: Tensor
    carry: Tensor


def _in_chunks(x_GKL: Tensor, chunk: int) -> Tensor:
    """(G, N, K, C), contiguous, zeros behind the end."""
    missing = -x_GKL.shape[-1] % chunk
    padded = torch.nn.functional.pad(x_GKL, (0, missing)) if missing else x_GKL
    return padded.view(*x_GKL.shape[:2], -1, chunk).transpose(1, 2).contiguous()


def _in_line(x_GNKC: Tensor, length: int) -> Tensor:
    return x_GNKC.transpose(1, 2).flatten(2)[..., :length]


def _spread(x_GNKC: Tensor, basis_GRC: Tensor) -> Tensor:
    """Each row times each function, (G, N, R K, C)."""
    spread: Tensor = x_GNKC[:, :, None] * basis_GRC[:, None, :, None]
    return spread.flatten(2, 3)


def _collect(x_GNTC: Tensor, basis_GRC: Tensor) -> Tensor:
    """Adjoint of `_spread` in its first argument, (G, N, K, C)."""
    parts_GNKC = x_GNTC.unflatten(2, (basis_GRC.shape[1], -1)).unbind(2)
    first_G1C, *others = basis_GRC[:, None, None].unbind(3)
    collected: Tensor = parts_GNKC[0] * first_G1C
    for part_GNKC, function_G1C in zip(parts_GNKC[1:], others, strict=True):
        collected.addcmul_(part_GNKC, function_G1C)
    return collected


def _weigh_basis(x_GNTC: Tensor, rows_GNKC: Tensor) -> Tensor:
    """Adjoint of `_spread` in its second argument, (G, R, C)."""
    products: Tensor = x_GNTC.unflatten(2, (-1, rows_GNKC.shape[2])) * rows_GNKC[:, :, None]
    return products.sum(3).sum(1, dtype=compute_dtype(products.dtype))


def _toeplitz(carry_GFRR: Tensor, count: int) -> Tensor:
    """The matrix (G, F R, F R) from states to carried states."""
    place = torch.arange(count, device=carry_GFRR.device)
    distance = place[:, None] - place
    blocks: Tensor = carry_GFRR[:, distance.clamp_min(0)] * (distance >= 0)[:, :, None, None]
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _carry(states_GFTV: Tensor, carry: Tensor) -> Tensor:
    """States as they are read, P chunks later: (G, F, R K, V), the recurrence in float32."""
    rows, count = carry.shape[-1], states_GFTV.shape[1]
    u_GFRX = states_GFTV.unflatten(2, (rows, -1)).flatten(3)
    if carry.dim() == 4:
        mixed: Tensor = _toeplitz(carry, count).to(u_GFRX.dtype) @ u_GFRX.flatten(1, 2)
        return mixed.view_as(states_GFTV)
    m_GFRX: Tensor = u_GFRX.to(carry.dtype, copy=True)
    for n in range(1, count):
        m_GFRX[:, n].baddbmm_(carry, m_GFRX[:, n - 1])
    return m_GFRX.view_as(states_GFTV)


def _carry_backward(dm_GFTV: Tensor, u_GFTV: Tensor, m_GFTV: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states and of `carry`."""
    rows, count = carry.shape[-1], dm_GFTV.shape[1]
    dm_GFRX, u_GFRX, m_GFRX = (x.unflatten(2, (rows, -1)).flatten(3) for x in (dm_GFTV, u_GFTV, m_GFTV))
    dcarry = torch.zeros_like(carry)
    if carry.dim() == 4:
        du: Tensor = _toeplitz(carry, count).to(dm_GFRX.dtype).transpose(1, 2) @ dm_GFRX.flatten(1, 2)
        dmatrix = (dm_GFRX.flatten(1, 2) @ u_GFRX.flatten(1, 2).transpose(1, 2)).to(carry.dtype)
        dblocks = dmatrix.unflatten(2, (count, rows)).unflatten(1, (count, rows)).transpose(2, 3)
        for distance in range(count):
            dcarry[:, distance] = dblocks.diagonal(-distance, 1, 2).sum(-1)
        return du.view_as(dm_GFTV), dcarry
    du_GFRX = dm_GFRX.to(carry.dtype, copy=True)
    for n in range(count - 1, 0, -1):
        du_GFRX[:, n - 1].baddbmm_(carry.transpose(1, 2), du_GFRX[:, n])
    if count > 1:
        dcarry += (du_GFRX[:, 1:] @ m_GFRX[:, :-1].to(carry.dtype).transpose(2, 3)).sum(1)
    return du_GFRX.view_as(dm_GFTV), dcarry


def _masks(near_HW: Tensor, chunk: int) -> list[Tensor]:
    """Weights (H, 1, C, C) of the own chunk and of those before it."""
    weights_HCW = lag_weights(near_HW, chunk).flip(1)
    return [part[:, None].contiguous() for part in reversed(weights_HCW.split(chunk, dim=2))]


def _scratch(device: torch.device) -> int:
    return SCRATCH if device.type == "cpu" else SCRATCH_ELSEWHERE


def _runs(chunks: int, size: int, device: torch.device) -> Iterator[slice]:
    """Runs of chunks, `size` numbers a chunk, as many as fill the scratch."""
    width = max(1, _scratch(device) // size)
    for start in range(0, chunks, width):
        yield slice(start, min(start + width, chunks))


class _Chunks:
    """Queries, keys and values of some heads of a sequence in chunks, with weights and bases in their precision."""

    def __init__(self, parts: list[Tensor], bases: Bases) -> None:
        chunk, dtype = bases.into_HRC.shape[-1], parts[0].dtype
        self.q, self.k, self.v, *rest = (_in_chunks(x_GKL, chunk) for x_GKL in parts)
        self.rest, self.carry = rest, bases.carry
        self.masks = _masks(bases.near_HW.to(dtype), chunk)
        self.into, self.out = bases.into_HRC.to(dtype), bases.out_HRC.to(dtype)
        self.far = max(0, self.q.shape[1] - len(self.masks))
        self.spread = self.into.shape[1] * self.q[:, 0].numel()  # numbers of a chunk times all functions

    def near(self) -> Iterator[tuple[int, slice, slice]]:
        """Distance in chunks, and runs of queries and of keys."""
        heads, chunks, _, chunk = self.q.shape
        for back in range(len(self.masks)):
            for keys in _runs(chunks - back, heads * chunk**2, self.q.device):
                yield back, slice(keys.start + back, keys.stop + back), keys

    def far_runs(self) -> Iterator[slice]:
        """Runs of the chunks that write states."""
        return _runs(self.far, self.spread, self.q.device)

    def readers(self, run: slice) -> slice:
        """Where states of this run are read."""
        return slice(run.start + len(self.masks), run.stop + len(self.masks))

    def states(self) -> Tensor:
        """What far chunks write, (G, F, R K, V)."""
        heads, _, width, _ = self.k.shape
        states = self.k.new_empty(heads, self.far, self.into.shape[1] * width, self.v.shape[2])
        for run in self.far_runs():
            states[:, run] = _spread(self.k[:, run], self.into) @ self.v[:, run].transpose(-1, -2)
        return states


def chunked_forward(q_GKL: Tensor, k_GKL: Tensor, v_GVL: Tensor, bases: Bases) -> Tensor:
    """Mixed values (G, V, L) of some heads of a sequence."""
    it = _Chunks([q_GKL, k_GKL, v_GVL], bases)
    y = torch.zeros_like(it.v)
    for back, queries, keys in it.near():
        scores = (it.q[:, queries].transpose(-1, -2) @ it.k[:, keys]).mul_(it.masks[back])
        y[:, queries] += it.v[:, keys] @ scores.transpose(-1, -2)
    if it.far:
        carried = _carry(it.states(), it.carry).to(y.dtype)
        for run in it.far_runs():
            y[:, it.readers(run)] += carried[:, run].transpose(-1, -2) @ _spread(it.q[:, it.readers(run)], it.out)
    return _in_line(y, q_GKL.shape[-1])


def chunked_backward(parts: list[Tensor], bases: Bases) -> tuple[list[Tensor], Bases]:
    """Gradients of q, k and v, and those of the bases, from q, k, v and the gradient of the outputs."""
    it = _Chunks(parts, bases)
    q, k, v, dy = it.q, it.k, it.v, it.rest[0]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    dmasks = [torch.zeros_like(mask[:, 0], dtype=bases.near_HW.dtype) for mask in it.masks]
    for back, queries, keys in it.near():
        scores = q[:, queries].transpose(-1, -2) @ k[:, keys]
        dscores = dy[:, queries].transpose(-1, -2) @ v[:, keys]
        dmasks[back] += (scores * dscores).sum(1)
        dv[:, keys] += dy[:, queries] @ scores.mul_(it.masks[back])
        dk[:, keys] += q[:, queries] @ dscores.mul_(it.masks[back])
        dq[:, queries] += k[:, keys] @ dscores.transpose(-1, -2)
    dnear = lag_sums(torch.cat(dmasks[::-1], dim=2).flip(1))
    dbases = Bases(dnear, *(torch.zeros_like(basis) for basis in bases[1:]))
    if it.far:
        dbases = _backward_far(it, dq, dk, dv, dbases)
    return [_in_line(x, parts[0].shape[-1]) for x in (dq, dk, dv)], dbases


def _backward_far(it: _Chunks, dq: Tensor, dk: Tensor, dv: Tensor, dbases: Bases) -> Bases:
    """Add to the gradients, in place, what went through states; returns those of the bases."""
    q, k, v, dy = it.q, it.k, it.v, it.rest[0]
    states = it.states()
    carried, dcarried = _carry(states, it.carry), torch.empty_like(states)
    for run in it.far_runs():
        readers = it.readers(run)
        dcarried[:, run] = _spread(q[:, readers], it.out) @ dy[:, readers].transpose(-1, -2)
        read = carried[:, run].to(q.dtype) @ dy[:, readers]
        dbases.out_HRC.add_(_weigh_basis(read, q[:, readers]))
        dq[:, readers] += _collect(read, it.out)
    dstates, dcarry = _carry_backward(dcarried, states, carried, it.carry)
    dstates = dstates.to(q.dtype)
    for run in it.far_runs():
        dv[:, run] += dstates[:, run].transpose(-1, -2) @ _spread(k[:, run], it.into)
        written = dstates[:, run] @ v[:, run]
        dbases.into_HRC.add_(_weigh_basis(written, k[:, run]))
        dk[:, run] += _collect(written, it.into)
    return dbases._replace(carry=dcarry)


def heads_at_a_time(key_width: int, length: int, bases: Bases) -> Iterator[slice]:
    """As many as fill the scratch."""
    heads, rows, _ = bases.into_HRC.shape
    width = max(1, _scratch(bases.into_HRC.device) // (rows * key_width * length))
    for start in range(0, heads, width):
        yield slice(start, min(start + width, heads))


def _groups(q_BHKL: Tensor, bases: Bases) -> Iterator[tuple[int, slice, Bases]]:
    """A sequence, some of its heads, and their bases."""
    for sequence in range(q_BHKL.shape[0]):
        for some in heads_at_a_time(q_BHKL.shape[2], q_BHKL.shape[3], bases):
            yield sequence, some, Bases(*(basis[some] for basis in bases))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHKL: Tensor, k_BHKL: Tensor, v_BHVL: Tensor, *bases: Tensor) -> Tensor:
        ctx.save_for_backward(q_BHKL, k_BHKL, v_BHVL, *bases)
        y_BHVL = torch.empty_like(v_BHVL, memory_format=torch.contiguous_format)
        for sequence, some, theirs in _groups(q_BHKL, Bases(*bases)):
            q_GKL, k_GKL, v_GVL = (x[sequence, some] for x in (q_BHKL, k_BHKL, v_BHVL))
            y_BHVL[sequence, some] = chunked_forward(q_GKL, k_GKL, v_GVL, theirs)
        return y_BHVL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHVL: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *rest = ctx.saved_tensors
        bases = Bases(*rest)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        dbases = Bases(*(torch.zeros_like(basis) for basis in bases))
        with torch.autocast(grad_BHVL.device.type, enabled=False):
            for sequence, some, theirs in _groups(q, bases):
                parts, dtheirs = chunked_backward([x[sequence, some] for x in (q, k, v, grad_BHVL)], theirs)
                for grad, part in zip(grads, parts, strict=True):
                    grad[sequence, some] = part
                for dbasis, dtheir in zip(dbases, dtheirs, strict=True):
                    dbasis[some] += dtheir
        return *grads, *dbases


def mix_chunked(q_BHKL: Tensor, k_BHKL: Tensor, v_BHVL: Tensor, bases: Bases) -> Tensor:
    """`masked.mix` of whole sequences with the identity, by a filter given as bases.

    Args:
        q_BHKL, k_BHKL, v_BHVL: queries, keys and values, bfloat16, float32 or float64.
        bases: from `head_states` or `smooth`, in float32 or float64; differentiable.

    Returns:
        (B, H, V, L), in the inputs' dtype; run it outside autocast.
    """
    parts: tuple[Tensor, ...] = (q_BHKL, k_BHKL, v_BHVL)
    batch = q_BHKL.shape[0]
    together = batch > 1 and q_BHKL.device.type != "cpu"
    if together:  # all sequences are heads of one
        parts = tuple(part.flatten(0, 1)[None] for part in parts)
        bases = Bases(*(basis.repeat(batch, *[1] * (basis.dim() - 1)) for basis in bases))
    y_BHVL = cast(Tensor, _Chunked.apply(*parts, *bases))  # type: ignore[no-untyped-call]
    return y_BHVL.view_as(v_BHVL) if together else y_BHVL
