"""Masked mixing of heads block by block: products, f, weights by lag and values in one kernel, as in flash attention.

    y_t = sum_{s <= t} h_{t-s} f(q_t . k_s) v_s

Nothing quadratic reaches memory; the way back computes the products again: once for queries, once for keys and values
and once for the filter, each with sums in a fixed order. Operands are bfloat16, sums float32.

Values may have one row more than a power of two (a row that counts, for normalisers): it is summed beside the product.

Shapes: as in `mixing.masked`; M queries and M keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from operators.gpu import OPERAND, Kernel, accelerated, jit, next_power, tl
from operators.gpu.toeplitz import folded, shifted_copies, skewed_sums, toeplitz_tile

SIDE = 64  # M


@jit
def _tile(x, t, length, width, W: tl.constexpr):
    """Rows of positions `t`, (W, M), zero outside."""
    w = tl.arange(0, W)
    there = (w < width)[:, None] & ((t >= 0) & (t < length))[None, :]
    return tl.load(x + w[:, None] * length + t[None, :], mask=there, other=0.0).to(OPERAND)


@jit
def _row(x, t, length, ROW: tl.constexpr):
    return tl.load(x + ROW * length + t, mask=(t >= 0) & (t < length), other=0.0).to(tl.float32)


@jit
def _power(base, DOUBLINGS: tl.constexpr):
    for _ in tl.static_range(DOUBLINGS):
        base = base * base
    return base


@jit
def _slope(base, DOUBLINGS: tl.constexpr):
    """base^(2^DOUBLINGS - 1)."""
    slope = base
    for _ in tl.static_range(DOUBLINGS - 1):
        base = base * base
        slope = slope * base
    return slope


@jit
def _by_lag(h, width, first, m):
    """h[first + row - column], (M, M) in float32."""
    return toeplitz_tile(h, width, first, m[:, None], m[None, :]).to(tl.float32)


@Kernel
def _forward(
    q, k, v, h, y, heads, queries, keys, key_width, lags, width,
    V: tl.constexpr, COUNTED: tl.constexpr, DOUBLINGS: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    block, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows: tl.constexpr = V + COUNTED
    q, k, v = q + row * key_width * queries, k + row * key_width * keys, v + row * rows * keys
    h, y = h + (row % heads) * 8 * width, y + row * rows * queries
    m, offset = tl.arange(0, M), keys - queries
    at = block * M + m
    queries_MK = tl.trans(_tile(q, at, queries, key_width, K))
    total, counted = tl.zeros((M, V), tl.float32), tl.zeros((M,), tl.float32)
    first = tl.maximum(0, (offset + block * M - lags + 1) // M)
    for j in range(first, (tl.minimum(keys, offset + (block + 1) * M) + M - 1) // M):
        s = j * M + m
        products = tl.dot(queries_MK, _tile(k, s, keys, key_width, K))
        if DOUBLINGS:
            products = _power(1.0 + products * (1.0 / (1 << DOUBLINGS)), DOUBLINGS)
        scores = products * _by_lag(h, width, offset + block * M - j * M, m)
        if COUNTED:
            counted += tl.sum(scores * _row(v, s, keys, V)[None, :], axis=1)
        total = tl.dot(scores.to(tl.bfloat16).to(OPERAND), tl.trans(_tile(v, s, keys, V, V)), total)
    to = y + tl.arange(0, V)[:, None] * queries + at[None, :]
    tl.store(to, tl.trans(total).to(y.dtype.element_ty), mask=(at < queries)[None, :])
    if COUNTED:
        tl.store(y + V * queries + at, counted.to(y.dtype.element_ty), mask=at < queries)


@jit
def _gradients(
    q_MK, k_KM, dy_MV, v_VM, dy_row, v_row,
    COUNTED: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    """f of a tile's products, its slope, and the gradient of the scores."""
    products, dscores = tl.dot(q_MK, k_KM), tl.dot(dy_MV, v_VM)
    if COUNTED:
        dscores += dy_row[:, None] * v_row[None, :]
    slope = tl.full(products.shape, 1.0, tl.float32)
    if DOUBLINGS:
        base = 1.0 + products * (1.0 / (1 << DOUBLINGS))
        slope = _slope(base, DOUBLINGS)
        products = slope * base
    return products, slope, dscores


@Kernel
def _backward_queries(
    q, k, v, h, dy, dq, heads, queries, keys, key_width, lags, width,
    V: tl.constexpr, COUNTED: tl.constexpr, DOUBLINGS: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    block, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows: tl.constexpr = V + COUNTED
    q, k, v = q + row * key_width * queries, k + row * key_width * keys, v + row * rows * keys
    h, dy, dq = h + (row % heads) * 8 * width, dy + row * rows * queries, dq + row * key_width * queries
    m, offset = tl.arange(0, M), keys - queries
    at = block * M + m
    queries_MK = tl.trans(_tile(q, at, queries, key_width, K))
    dy_MV = tl.trans(_tile(dy, at, queries, V, V))
    dy_row = _row(dy, at, queries, V) if COUNTED else tl.zeros((M,), tl.float32)
    total = tl.zeros((M, K), tl.float32)
    first = tl.maximum(0, (offset + block * M - lags + 1) // M)
    for j in range(first, (tl.minimum(keys, offset + (block + 1) * M) + M - 1) // M):
        s = j * M + m
        keys_KM, values_VM = _tile(k, s, keys, key_width, K), _tile(v, s, keys, V, V)
        v_row = _row(v, s, keys, V) if COUNTED else tl.zeros((M,), tl.float32)
        _, slope, dscores = _gradients(queries_MK, keys_KM, dy_MV, values_VM, dy_row, v_row, COUNTED, DOUBLINGS)
        dproducts = dscores * slope * _by_lag(h, width, offset + block * M - j * M, m)
        total = tl.dot(dproducts.to(tl.bfloat16).to(OPERAND), tl.trans(keys_KM), total)
    w = tl.arange(0, K)
    there = (w < key_width)[:, None] & (at < queries)[None, :]
    tl.store(dq + w[:, None] * queries + at[None, :], tl.trans(total).to(dq.dtype.element_ty), mask=there)


@Kernel
def _backward_keys(
    q, k, v, h, dy, dk, dv, heads, queries, keys, key_width,
    lags, width,
    V: tl.constexpr, COUNTED: tl.constexpr, DOUBLINGS: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    j, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows: tl.constexpr = V + COUNTED
    q, k, v = q + row * key_width * queries, k + row * key_width * keys, v + row * rows * keys
    h, dy = h + (row % heads) * 8 * width, dy + row * rows * queries
    dk, dv = dk + row * key_width * keys, dv + row * rows * keys
    m, offset = tl.arange(0, M), keys - queries
    s = j * M + m
    keys_KM, values_VM = _tile(k, s, keys, key_width, K), _tile(v, s, keys, V, V)
    v_row = _row(v, s, keys, V) if COUNTED else tl.zeros((M,), tl.float32)
    dkeys, dvalues, dcounted = tl.zeros((K, M), tl.float32), tl.zeros((V, M), tl.float32), tl.zeros((M,), tl.float32)
    first = tl.maximum(0, j * M - offset) // M
    last = tl.minimum(queries, j * M + M - 1 + lags - offset)
    for i in range(first, (last + M - 1) // M):
        at = i * M + m
        queries_KM, dy_VM = _tile(q, at, queries, key_width, K), _tile(dy, at, queries, V, V)
        dy_row = _row(dy, at, queries, V) if COUNTED else tl.zeros((M,), tl.float32)
        scores, slope, dscores = _gradients(
            tl.trans(queries_KM), keys_KM, tl.trans(dy_VM), values_VM, dy_row, v_row, COUNTED, DOUBLINGS
        )
        weights = _by_lag(h, width, offset + (i - j) * M, m)
        scores *= weights
        if COUNTED:
            dcounted += tl.sum(scores * dy_row[:, None], axis=0)
        dvalues = tl.dot(dy_VM, scores.to(tl.bfloat16).to(OPERAND), dvalues)
        dkeys = tl.dot(queries_KM, (dscores * slope * weights).to(tl.bfloat16).to(OPERAND), dkeys)
    w = tl.arange(0, K)
    there = (w < key_width)[:, None] & (s < keys)[None, :]
    tl.store(dk + w[:, None] * keys + s[None, :], dkeys.to(dk.dtype.element_ty), mask=there)
    to = dv + tl.arange(0, V)[:, None] * keys + s[None, :]
    tl.store(to, dvalues.to(dv.dtype.element_ty), mask=(s < keys)[None, :])
    if COUNTED:
        tl.store(dv + V * keys + s, dcounted.to(dv.dtype.element_ty), mask=s < keys)


@Kernel
def _backward_filter(
    q, k, v, dy, sums, batch, heads, queries, keys, key_width,
    V: tl.constexpr, COUNTED: tl.constexpr, DOUBLINGS: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles that lie d tiles apart, of all sequences of a part; then over equal lags."""
    d, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows: tl.constexpr = V + COUNTED
    m, offset = tl.arange(0, M), keys - queries
    total = tl.zeros((M, M), tl.float32)
    for sequence in range(part, batch, tl.num_programs(2)):
        row = (sequence * heads + head).to(tl.int64)
        q_at, k_at = q + row * key_width * queries, k + row * key_width * keys
        v_at, dy_at = v + row * rows * keys, dy + row * rows * queries
        for i in range(tl.maximum(0, d * M - offset - M + 1) // M, (queries + M - 1) // M):
            at = i * M + m
            s = offset + at - d * M
            q_MK, dy_MV = tl.trans(_tile(q_at, at, queries, key_width, K)), tl.trans(_tile(dy_at, at, queries, V, V))
            keys_KM, values_VM = _tile(k_at, s, keys, key_width, K), _tile(v_at, s, keys, V, V)
            dy_row = _row(dy_at, at, queries, V) if COUNTED else tl.zeros((M,), tl.float32)
            v_row = _row(v_at, s, keys, V) if COUNTED else tl.zeros((M,), tl.float32)
            scores, _, dscores = _gradients(q_MK, keys_KM, dy_MV, values_VM, dy_row, v_row, COUNTED, DOUBLINGS)
            total += scores * dscores
    near, far = skewed_sums(total, M)
    to = sums + ((part * heads + head) * tl.num_programs(0) + d).to(tl.int64) * 2 * M
    tl.store(to + m, near)
    tl.store(to + M + m, far)


def takes(x: Tensor, rows: int, key_width: int, value_width: int, degree: int | None) -> bool:
    """Whether the kernels compute this: bfloat16, heads of at most 128 channels, values a power of two and perhaps one.

    `x` is anything of the dtype, and where the queries are; `rows` are heads of all sequences.
    """
    main = _main(value_width)
    fitting = key_width <= 128 and 16 <= main <= 128 and value_width - main <= 1
    return accelerated(x) and x.dtype == torch.bfloat16 and fitting and rows < 2**16 and degree != 1


def masked_forward(q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor, degree: int | None) -> Tensor:
    """As `mixing.masked.masked_forward`."""
    q_BHKQ, k_BHKT, v_BHVT = (x.contiguous() for x in (q_BHKQ, k_BHKT, v_BHVT))
    copies = shifted_copies(h_HT)
    y_BHVQ = q_BHKQ.new_empty(*v_BHVT.shape[:3], q_BHKQ.shape[-1])
    shape, how = _how(q_BHKQ, k_BHKT, v_BHVT, degree)
    places = (h_HT.shape[1], copies.shape[2])
    grid = (-(-q_BHKQ.shape[-1] // SIDE), q_BHKQ.shape[0] * q_BHKQ.shape[1])
    _forward[grid](q_BHKQ, k_BHKT, v_BHVT, copies, y_BHVQ, *shape, *places, **how, num_warps=4, num_stages=3)
    return y_BHVQ


def masked_backward(parts: list[Tensor], h_HT: Tensor, degree: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `mixing.masked.masked_backward`."""
    q_BHKQ, k_BHKT, v_BHVT, grad_BHVQ = (part.contiguous() for part in parts)
    copies = shifted_copies(h_HT)
    dq, dk, dv = torch.empty_like(q_BHKQ), torch.empty_like(k_BHKT), torch.empty_like(v_BHVT)
    shape, how = _how(q_BHKQ, k_BHKT, v_BHVT, degree)
    heads, queries, keys, _ = shape
    batch, lags = q_BHKQ.shape[0], h_HT.shape[1]
    places = (lags, copies.shape[2])
    over_queries, over_keys = -(-queries // SIDE), -(-keys // SIDE)
    inputs = (q_BHKQ, k_BHKT, v_BHVT)
    launch = how | {"num_warps": 4, "num_stages": 3}
    _backward_queries[(over_queries, batch * heads)](*inputs, copies, grad_BHVQ, dq, *shape, *places, **launch)
    _backward_keys[(over_keys, batch * heads)](*inputs, copies, grad_BHVQ, dk, dv, *shape, *places, **launch)
    apart, parts_of_batch = -(-min(lags, keys) // SIDE) + 1, min(batch, 4)
    sums = q_BHKQ.new_empty(parts_of_batch, heads, apart, 2, SIDE, dtype=torch.float32)
    grid = (apart, heads, parts_of_batch)
    _backward_filter[grid](*inputs, grad_BHVQ, sums, batch, *shape, **launch)
    dh_HT, known = torch.zeros_like(h_HT, dtype=torch.float32), min(lags, apart * SIDE)
    dh_HT[:, :known] = folded(sums.sum(0))[:, :known]
    return dq, dk, dv, dh_HT


def _main(values: int) -> int:
    """Rows of values that are multiplied as a matrix."""
    return next_power(values) if next_power(values) == values else next_power(values) // 2


def _how(
    q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, degree: int | None
) -> tuple[tuple[int, int, int, int], dict[str, Any]]:
    """Shapes: heads, queries, keys, key width; and what is compiled in."""
    values = v_BHVT.shape[2]
    shape = (q_BHKQ.shape[1], q_BHKQ.shape[3], k_BHKT.shape[3], q_BHKQ.shape[2])
    return shape, {
        "V": _main(values), "COUNTED": int(values != _main(values)),
        "DOUBLINGS": 0 if degree is None else degree.bit_length() - 1, "K": next_power(shape[3], 16), "M": SIDE,
    }  # fmt: skip
