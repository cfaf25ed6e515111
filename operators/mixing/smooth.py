"""Bases of smooth filters for `chunked`: polynomials of the place in a chunk, fitted once for every distance.

Filters that vary slowly over a chunk are, between two chunks that are not neighbours, polynomials of low degree in both
places. With orthonormal ones the best G_d in least squares is the projection of h(d C + a - b) on their products, a
weighted sum of 2 C - 1 lags, through which gradients reach the filter.

Shapes: as in `chunked`, T lags, W lags of a window.
"""

import functools

import torch
from torch import Tensor

from operators.mixing.chunked import Bases

CHUNK, FUNCTIONS = 128, (4, 6, 8)
LARGEST_RESIDUAL = 1e-3  # a quarter of what bfloat16 rounds away
TINY = 1e-300
NEAR = 2  # chunks: the own one and the one before it, whose lags begin at 1


@functools.cache
def _polynomials(chunk: int, functions: int) -> tuple[Tensor, Tensor]:
    """Orthonormal polynomials (R, C), float64; and sums (2 C - 1, R R) of products of two by difference of place."""
    place = torch.linspace(-1, 1, chunk, dtype=torch.float64)
    powers = torch.stack([place**degree for degree in range(functions)], dim=1)
    basis_RC = torch.linalg.qr(powers)[0].t().contiguous()
    products_RRCC = basis_RC[:, None, :, None] * basis_RC[None, :, None, :]
    sums = [products_RRCC.diagonal(back, 3, 2).sum(-1).flatten() for back in range(1 - chunk, chunk)]
    return basis_RC, torch.stack(sums)


def _windows(h_HT: Tensor, chunk: int) -> Tensor:
    """The lags (H, F, 2 C - 1) between chunks from NEAR chunks apart on.

    Behind the last lag filters go on as a point reflection of their end, which is as smooth there as a line.
    """
    lags = h_HT.shape[1]
    chunks = -(-lags // chunk)
    if chunks <= NEAR:
        return h_HT.new_zeros(h_HT.shape[0], 0, 2 * chunk - 1)
    missing = chunks * chunk - lags
    beyond = 2 * h_HT[:, -1:] - h_HT[:, lags - 1 - missing : lags - 1].flip(1)
    return torch.cat([h_HT, beyond], dim=1)[:, (NEAR - 1) * chunk + 1 :].unfold(1, 2 * chunk - 1, chunk)


def smooth_bases(h_HT: Tensor, chunk: int = CHUNK, functions: int = FUNCTIONS[0]) -> Bases:
    """Bases of filters over sequences of T positions, R functions; differentiable. See `residual` for their error."""
    basis_RC, sums = (x.to(h_HT) for x in _polynomials(chunk, functions))
    far_HFRR = (_windows(h_HT, chunk) @ sums).unflatten(2, (functions, functions))
    missing = max(0, NEAR * chunk - h_HT.shape[1])
    near_HW = torch.nn.functional.pad(h_HT[:, : NEAR * chunk], (0, missing))
    places_HRC = basis_RC.expand(h_HT.shape[0], -1, -1)
    return Bases(near_HW, places_HRC, places_HRC, far_HFRR)


@torch.no_grad()
def residual(h_HT: Tensor, chunk: int = CHUNK, functions: int = FUNCTIONS[0]) -> float:
    """What the bases miss of the filters, root mean square over positions of a chunk, relative to a filter's own.

    That is the relative error of outputs for white inputs, of the head where it is largest.
    """
    h_HT = h_HT.double()
    windows_HFW = _windows(h_HT, chunk)
    _, sums = _polynomials(chunk, functions)
    pairs = chunk - torch.arange(1 - chunk, chunk, device=h_HT.device).abs()  # of places with that difference
    missed_H = ((windows_HFW.square() @ pairs.double()) - (windows_HFW @ sums.to(h_HT)).square().sum(2)).sum(1)
    return float((missed_H.clamp_min(0) / chunk / h_HT.square().sum(1).clamp_min(TINY)).max().sqrt())


def functions_for(h_HT: Tensor, chunk: int = CHUNK) -> int | None:
    """The fewest functions that leave no more than a residual of `LARGEST_RESIDUAL`; None where none of ours do."""
    return next((count for count in FUNCTIONS if residual(h_HT, chunk, count) <= LARGEST_RESIDUAL), None)
