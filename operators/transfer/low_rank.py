"""Queries and keys of few channels whose products are nearest to an attention's, on inputs like those it has seen.

An attention's logit is q_t . k_s of affine maps of the inputs. Around the mean input it has four parts: one of both
inputs, one of x_s alone, one of x_t alone, and a constant. Divided by the sum of the weights the last two cancel; the
second is what a key gate can say; the first is a matrix, and its best approximation of a given rank on inputs of
covariance C is the truncated singular value decomposition of C^1/2 W_q^T W_k C^1/2 (Eckart and Young 1936). Rotations
of queries and keys by position are left to the filter.
"""

import torch
from torch import Tensor

from operators.transfer.attention import AttentionWeights

RIDGE = 1e-6  # of the mean variance, so that directions never seen have an inverse
Affine = tuple[Tensor, Tensor]  # weight (rows, D), bias (rows,)


def centred_products(
    attention: AttentionWeights, head: int, heads: int, key_dim: int, *, gated: bool
) -> tuple[Affine, Affine, Affine]:
    """Query, key and gate of one of `heads` heads as affine maps of the input, the gate of one row.

    q . k is the part of both inputs, to rank `key_dim`; the gate the part of x_s alone, 0 at the mean input. Without a
    gate (`gated` false) that part is in the products too, as one of the `key_dim` channels at most.

    Raises ValueError without statistics.
    """
    seen = attention.seen()
    mean_D, covariance_DD = seen.input_mean.double(), seen.input_covariance.double()
    (query, query_bias), (key, _), scale = attention.products_of(head, heads)
    at_mean = query @ mean_D + query_bias
    gate_D = scale * (at_mean @ key)
    width = len(mean_D)
    moment = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    moment[:width, :width], moment[-1, -1] = covariance_DD, 1.0
    left = torch.cat([query, torch.zeros_like(at_mean)[:, None] if gated else at_mean[:, None]], dim=1)
    right = torch.cat([key, torch.zeros_like(at_mean)[:, None]], dim=1)
    root, inverse = _roots(moment)
    u, sigma, v = torch.linalg.svd(scale * root @ left.t() @ right @ root)
    kept = min(key_dim, len(sigma))
    size = sigma[:kept].sqrt()[:, None]
    rows = [torch.zeros(key_dim, width + 1, dtype=torch.float64) for _ in range(2)]
    rows[0][:kept], rows[1][:kept] = size * (u.t()[:kept] @ inverse), size * (v[:kept] @ inverse)
    query_map, key_map = (_uncentred(part, mean_D) for part in rows)
    return query_map, key_map, (gate_D[None], -(gate_D @ mean_D)[None])


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0.0) + RIDGE * values.mean()
    return (vectors * values.sqrt()) @ vectors.t(), (vectors * values.rsqrt()) @ vectors.t()


def _uncentred(rows: Tensor, mean_D: Tensor) -> Affine:
    """An affine map of x - mean, the constant last, as one of x."""
    weight = rows[:, :-1]
    return weight, rows[:, -1] - weight @ mean_D
