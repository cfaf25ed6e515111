"""Long convolutions as products of Toeplitz blocks with blocks of the sequence, on matrix units.

A sequence in columns of N positions turns y_t = sum_s h_{t-s} z_s into Y[:, a] = sum_d T_d Z[:, a - d] with blocks
T_d[r, s] = h[d N + r - s]: products of N x N with as many columns as there are, of all sequences of a batch. That is
L^2 multiplications a channel, at the rate of matrix units rather than of memory. Operands are bfloat16, sums float32.

A column of T_d is a piece of h that may begin anywhere, and loads are wide only where they begin at a multiple of
`WIDE` numbers. So there are `WIDE` copies of h, each shifted by one more: whichever way a piece begins, it does not in
one of them. Zeros stand around them, so that no lag is out of reach.

Shapes: B batch, D channels, L positions, A = L / N columns of a sequence, W places of a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from operators.gpu import OPERAND, Kernel, jit, next_power, tl, touching

SIDE = 64  # N
COLUMNS = 128  # of a program
WIDE = 8  # bfloat16 numbers in 16 bytes
AROUND = 2 * SIDE  # zeros before the lags, and more behind


@jit
def toeplitz_tile(copies, width, first, r, s):
    """h[first + r - s], zero where that is no lag; `r` varies along the axis that is contiguous in memory."""
    place = first + 128 - s  # AROUND
    up = (place + 7) // 8  # WIDE
    return tl.load(copies + (7 - up * 8 + place) * width + up * 8 + r).to(OPERAND)


@Kernel
def _copy(h, h_row, copies, lags, width, PLACES: tl.constexpr):
    channel, copy = tl.program_id(0), tl.program_id(1)
    place = tl.program_id(2) * PLACES + tl.arange(0, PLACES)
    lag = place - 128 - 7 + copy
    value = tl.load(h + channel.to(tl.int64) * h_row + lag, mask=(lag >= 0) & (lag < lags), other=0.0)
    to = copies + (channel.to(tl.int64) * 8 + copy) * width + place
    tl.store(to, value.to(tl.bfloat16), mask=place < width)


def shifted_copies(h_DL: Tensor) -> Tensor:
    """What `toeplitz_tile` reads: (D, WIDE, W) in bfloat16; in the last copy lag l is at place AROUND + l."""
    h_DL = touching(h_DL)
    channels, lags = h_DL.shape
    width = -(-(lags + 3 * AROUND) // 16) * 16
    copies = h_DL.new_empty(channels, WIDE, width, dtype=torch.bfloat16)
    _copy[(channels, WIDE, -(-width // 1024))](h_DL, h_DL.stride(0), copies, lags, width, PLACES=1024)
    return copies


@Kernel
def _convolve(
    z, z_batch, z_row, copies, width, out, channels, length, batch,
    CAUSAL: tl.constexpr, SEQUENCES: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of one channel; backwards in time unless causal. Columns of all sequences stand side by side."""
    channel, group = tl.program_id(0), tl.program_id(2)
    columns = (length + N - 1) // N
    WIDTH: tl.constexpr = COLUMNS // SEQUENCES
    block = tl.program_id(1)
    place = tl.arange(0, COLUMNS)
    a, sequence = block * WIDTH + place // SEQUENCES, group * SEQUENCES + place % SEQUENCES
    r = tl.arange(0, N)
    rows = channel.to(tl.int64) * z_row + sequence.to(tl.int64) * z_batch
    copies += channel.to(tl.int64) * 8 * width
    distances = tl.minimum((block + 1) * WIDTH, columns) if CAUSAL else columns - block * WIDTH
    total = tl.zeros((N, COLUMNS), tl.float32)
    for d in range(0, distances):
        if CAUSAL:
            toeplitz, at = toeplitz_tile(copies, width, d * N, r[:, None], r[None, :]), a - d
        else:
            toeplitz, at = toeplitz_tile(copies, width, d * N, r[None, :], r[:, None]), a + d
        t = at[None, :] * N + r[:, None]
        there = (at >= 0)[None, :] & (t < length) & (sequence < batch)[None, :]
        earlier = tl.load(z + rows[None, :] + t, mask=there, other=0.0)
        total = tl.dot(toeplitz, earlier.to(tl.bfloat16).to(OPERAND), total)
    t = a[None, :] * N + r[:, None]
    to = out + (sequence.to(tl.int64) * channels + channel)[None, :] * length + t
    tl.store(to, total.to(out.dtype.element_ty), mask=(t < length) & (sequence < batch)[None, :])


@jit
def skewed_sums(x, N: tl.constexpr):
    """Sums of x[r, s] over equal r - s: those of 0 .. N - 1, and those of -N .. -1."""
    r, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    skewed = tl.gather(x, (r - c + N) % N, 1)
    return tl.sum(tl.where(r >= c, skewed, 0.0), axis=0), tl.sum(tl.where(r < c, skewed, 0.0), axis=0)


def folded(sums_DA2N: Tensor) -> Tensor:
    """Both `skewed_sums` of pairs of columns 0, 1, .. A - 1 apart as sums by lag, (D, A N)."""
    near_DAN, far_DAN = sums_DA2N.unbind(2)
    near_DAN[:, :-1] += far_DAN[:, 1:]
    return near_DAN.flatten(1)


@Kernel
def _correlate(
    g, g_batch, g_row, z, z_batch, z_row, sums, length, batch,
    SEQUENCES: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum over positions and sequences of g_t z_{t-lag} for the lags between columns d apart."""
    channel, d = tl.program_id(0), tl.program_id(1)
    columns = (length + N - 1) // N
    WIDTH: tl.constexpr = COLUMNS // SEQUENCES
    r, place = tl.arange(0, N), tl.arange(0, COLUMNS)
    g, z = g + channel.to(tl.int64) * g_row, z + channel.to(tl.int64) * z_row
    total = tl.zeros((N, N), tl.float32)
    for group in range(0, batch, SEQUENCES):
        sequence = (group + place % SEQUENCES).to(tl.int64)
        g_at, z_at = g + (sequence * g_batch)[None, :], z + (sequence * z_batch)[None, :]
        for start in range(d, columns, WIDTH):
            t = (start + place // SEQUENCES)[None, :] * N + r[:, None]
            before, real = t - d * N, (sequence < batch)[None, :]
            left = tl.load(g_at + t, mask=(t < length) & real, other=0.0).to(tl.bfloat16).to(OPERAND)
            right = tl.load(z_at + before, mask=(before < length) & real, other=0.0).to(tl.bfloat16).to(OPERAND)
            total = tl.dot(left, tl.trans(right), total)
    near, far = skewed_sums(total, N)
    to = sums + (channel * columns + d).to(tl.int64) * 2 * N
    tl.store(to + r, near)
    tl.store(to + N + r, far)


def convolve(z_BDL: Tensor, h_DL: Tensor, *, causal: bool = True) -> Tensor:
    """y_t = sum_{s <= t} h_{t-s} z_s, or its adjoint y_s = sum_{t >= s} h_{t-s} z_t; (B, D, L) in z's dtype."""
    z_BDL, copies = touching(z_BDL), shifted_copies(h_DL)
    batch, channels, length = z_BDL.shape
    out_BDL = torch.empty_like(z_BDL, memory_format=torch.contiguous_format)
    columns = -(-length // SIDE)
    sequences = min(next_power(batch), 16)
    width = max(16, min(COLUMNS, sequences * next_power(columns)))
    grid = (channels, -(-columns // (width // sequences)), -(-batch // sequences))
    _convolve[grid](
        z_BDL, z_BDL.stride(0), z_BDL.stride(1), copies, copies.shape[2], out_BDL, channels, length, batch,
        CAUSAL=causal, SEQUENCES=sequences, N=SIDE, COLUMNS=width, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_BDL


def correlate(g_BDL: Tensor, z_BDL: Tensor) -> Tensor:
    """Gradient of the filters, sum over sequences and t of g_t z_{t-lag}; (D, L) in float32."""
    g_BDL, z_BDL = touching(g_BDL), touching(z_BDL)
    batch, channels, length = z_BDL.shape
    columns = -(-length // SIDE)
    sums_DA2N = z_BDL.new_empty(channels, columns, 2, SIDE, dtype=torch.float32)
    _correlate[(channels, columns)](
        g_BDL, g_BDL.stride(0), g_BDL.stride(1), z_BDL, z_BDL.stride(0), z_BDL.stride(1), sums_DA2N, length, batch,
        SEQUENCES=min(next_power(batch), 16), N=SIDE, COLUMNS=32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return folded(sums_DA2N)[:, :length]
