"""Queries and keys of few channels whose products are nearest to an attention's, on inputs like those it has seen.

An attention's logit is q_t . k_s of affine maps of the inputs. Around the mean input it has four parts: one of both
inputs, one of x_s alone, one of x_t alone, and a constant. Divided by the sum of the weights the last two cancel; the
second is what a key gate can say; the first is a matrix, and its best approximation of a given rank on inputs of
covariance C is the truncated singular value decomposition of C^1/2 W_q^T W_k C^1/2 (Eckart and Young 1936). The root is
taken once for all heads; of a head's two factors, which have few columns, only the triangles of their QR decompositions
are multiplied and decomposed. Rotations of queries and keys by position are left to the filter.
"""

import torch
from torch import Tensor

from operators.transfer.attention import Affine, AttentionWeights

RIDGE = 1e-6  # of the mean variance, so that directions never seen have an inverse


def centred_products(
    attention: AttentionWeights, heads: int, key_dim: int, *, gated: bool
) -> list[tuple[Affine, Affine, Affine]]:
    """Query, key and gate of each of `heads` heads as affine maps of the input, in float64; the gate has one row.

    q . k is the part of both inputs, to rank `key_dim`; the gate the part of x_s alone, 0 at the mean input. Without a
    gate (`gated` false) that part is in the products too, as one of the `key_dim` channels at most. Heads that differ
    in number from the attention's own the same rows of it, cut or merged.

    Raises ValueError without statistics, or where the rows of the attention's queries cannot be divided so.
    """
    mean_D, covariance_DD = (part.double() for part in attention.seen().inputs)
    maps, scale = attention.products(), float(attention.key_width) ** -0.5
    rows = len(maps[0][0])
    if rows % heads:
        raise ValueError(
            f"heads must divide the {rows} rows of the attention's queries but is {heads}: use the attention's "
            f"{attention.heads}, or init: random."
        )
    moment = torch.zeros(len(mean_D) + 1, len(mean_D) + 1, dtype=torch.float64, device=mean_D.device)
    moment[:-1, :-1], moment[-1, -1] = covariance_DD, 1.0
    roots, found = _roots(moment), []
    for query, query_bias, key in zip(*(part.double().chunk(heads) for part in (*maps[0], maps[1][0])), strict=True):
        at_mean = query @ mean_D + query_bias
        left = torch.cat([query, torch.zeros_like(at_mean)[:, None] if gated else at_mean[:, None]], dim=1)
        right = torch.cat([key, torch.zeros_like(at_mean)[:, None]], dim=1)
        query_map, key_map = (_uncentred(part, mean_D) for part in _nearest(scale * left, right, roots, key_dim))
        gate_D = scale * (at_mean @ key)
        found.append((query_map, key_map, (gate_D[None], -(gate_D @ mean_D)[None])))
    return found


def _nearest(left: Tensor, right: Tensor, roots: tuple[Tensor, Tensor], rank: int) -> list[Tensor]:
    """Two matrices of `rank` rows whose product left^T right is nearest to that of the given ones on the inputs."""
    root, inverse = roots
    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(root @ part.t()) for part in (left, right))
    u, sigma, v = torch.linalg.svd(r_left @ r_right.t())
    kept = min(rank, len(sigma))
    size = sigma[:kept].sqrt()[:, None]
    factors = (size * (q_left @ u[:, :kept]).t(), size * (q_right @ v[:kept].t()).t())
    return [torch.nn.functional.pad(factor @ inverse, (0, 0, 0, rank - kept)) for factor in factors]


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0.0) + RIDGE * values.mean()
    return (vectors * values.sqrt()) @ vectors.t(), (vectors * values.rsqrt()) @ vectors.t()


def _uncentred(rows: Tensor, mean_D: Tensor) -> Affine:
    """An affine map of x - mean, the constant last, as one of x."""
    weight = rows[:, :-1]
    return weight, rows[:, -1] - weight @ mean_D
