"""Queries and keys of near positions as attention has them, normed and turned by position; the level of their weights.

    near weight = exp(q_t . k_s - level_t),   level_t = q_t . mean_key + shift

with q scaled by K^-1/2, and in the level not turned. The level is what makes near weights and far ones comparable: far
weights leave out what all keys have in common, since it does not matter where they are divided by their sum.

Shapes: B batch, H heads, G of keys (each shared by H / G), K width of query and key, n new positions.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig, NearNorm, OperatorConfig, WindowConfig
from operators.convolution.causal import compute_dtype
from operators.filters.base import HALF, Wide
from operators.mixing.near import for_heads, rotated, turns
from operators.transfer.attention import Affine, AttentionWeights, first_of_groups
from operators.transfer.near import norm_kind, turned
from operators.transfer.rotation import Rotation

BASE = 10_000.0  # of the frequencies where no attention is replaced
EPSILON = 1e-6


class Near(Wide):
    """What is done to queries and keys after their projection; call `initialise` before use.

    Parameters, none a matrix: `frequencies` (K // 2,) which are not trained; `mean_key` (H K,) and `shift` (H,) where
    there is a level; `query_weight`, `query_bias` (H K,), `key_weight`, `key_bias` (G K,) where there is a norm;
    `centre` (G K,) where far positions are weighed by the same queries and keys.
    """

    mean_key: nn.Parameter
    shift: nn.Parameter
    centre: nn.Parameter

    def __init__(self, heads: tuple[int, int], width: int, norm: NearNorm, *, level: bool, tied: bool = False) -> None:
        super().__init__()
        self.heads, self.groups = heads
        self.width, self.norm = width, norm
        self.frequencies = nn.Parameter(torch.zeros(width // 2), requires_grad=False)
        sizes = {"mean_key": self.heads * width, "shift": self.heads} if level else {}
        sizes |= {"centre": self.groups * width} if tied else {}
        if norm != "none":
            each = {"query": self.heads, "key": self.groups}
            sizes |= {f"{one}_{part}": count * width for one, count in each.items() for part in ("weight", "bias")}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))
        if torch.get_default_dtype() in HALF:
            self.float()

    @torch.no_grad()
    def initialise(self) -> None:
        """Rotations of usual frequencies, norms that only norm, no level."""
        place = torch.arange(len(self.frequencies), dtype=torch.float64) / max(1, len(self.frequencies))
        self.frequencies.copy_(BASE**-place)
        for name, parameter in self.named_parameters():
            if name != "frequencies":
                parameter.fill_(1.0 if name.endswith("_weight") else 0.0)

    @torch.no_grad()
    def transfer(self, attention: AttentionWeights, heads: int, width: int) -> tuple[Affine, Affine]:
        """Take over rotation and norms; returns the projections to query and key.

        Raises ValueError where heads, their width or the kind of their norm are not the attention's.
        """
        if (heads, width) != (attention.heads, attention.key_width):
            raise ValueError(
                f"a window weighs as the attention's {attention.heads} heads of {attention.key_width} channels do, but "
                f"heads are {heads} of {width}: set heads: {attention.heads}, or use init: random."
            )
        if (kind := norm_kind(attention)) != self.norm:
            raise ValueError(
                f"near_norm must be {kind!r} as the attention's but is {self.norm!r}: use near_norm: {kind}."
            )
        return self.follow(attention, attention.seen_near()[1])

    @torch.no_grad()
    def follow(self, attention: AttentionWeights, rotation: Rotation) -> tuple[Affine, Affine]:
        """Take over norms, and frequencies for that rotation; returns the projections to query and key that go with
        them."""
        frequencies, query, key = turned(attention, rotation)
        self.frequencies.copy_(frequencies)
        for name, norm in (("query", query.norm), ("key", self._of_groups(key.norm))):
            if norm is not None:
                getattr(self, f"{name}_weight").copy_(norm[0])
                getattr(self, f"{name}_bias").copy_(norm[1])
        rows = self._of_groups(key.rows)
        assert rows is not None
        return query.rows, rows

    def _of_groups(self, rows: Affine | None) -> Affine | None:
        return None if rows is None else first_of_groups(rows, self.heads, self.groups)

    def products(self, q_BHKn: Tensor, k_BGKn: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries as they are multiplied, and before they are turned; then keys. In their precision."""
        q_BHKn, k_BGKn = self.normed(q_BHKn, k_BGKn)
        q_BHKn = q_BHKn / math.sqrt(self.width)
        by = turns(self.frequencies, start, q_BHKn.shape[-1], q_BHKn.dtype)
        return rotated(q_BHKn, by), q_BHKn, rotated(k_BGKn, by), k_BGKn

    def normed(self, q_BHKn: Tensor, k_BGKn: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, neither turned nor scaled."""
        return self._normed("query", q_BHKn), self._normed("key", k_BGKn)

    def turned(self, k_BGKn: Tensor) -> Tensor:
        """Keys of the first positions, turned."""
        return rotated(k_BGKn, turns(self.frequencies, 0, k_BGKn.shape[-1], k_BGKn.dtype))

    def centred(self, k_BGKn: Tensor) -> Tensor:
        """Keys that are not turned as far positions have them."""
        return k_BGKn - self.centre.view(self.groups, self.width, 1).to(k_BGKn.dtype)

    def level(self, q_BHKn: Tensor) -> Tensor:
        """(B, H, 1, n) of queries that are not turned."""
        mean_H1K, shift_H11 = self.mean_key.view(self.heads, 1, self.width), self.shift.view(self.heads, 1, 1)
        return mean_H1K.to(q_BHKn.dtype) @ q_BHKn + shift_H11.to(q_BHKn.dtype)

    def _normed(self, name: str, x_BHKn: Tensor) -> Tensor:
        if self.norm == "none":
            return x_BHKn
        dtype, x_BHKn = x_BHKn.dtype, x_BHKn.to(compute_dtype(x_BHKn.dtype))
        over = (1, 2) if self.norm.endswith("_all") else (2,)
        if self.norm.startswith("layer"):
            x_BHKn = x_BHKn - x_BHKn.mean(over, keepdim=True)
        x_BHKn = x_BHKn * (x_BHKn.square().mean(over, keepdim=True) + EPSILON).rsqrt()
        weight, bias = (
            getattr(self, f"{name}_{part}").view(-1, self.width, 1).to(x_BHKn.dtype) for part in ("weight", "bias")
        )
        normed: Tensor = torch.addcmul(bias, x_BHKn, weight).to(dtype)
        return normed


def fitting(config: OperatorConfig, attention: AttentionWeights | None) -> OperatorConfig:
    """The configuration with what it leaves to the attention: norms of near queries and keys, heads that share keys and
    values, heads of a window alone; of random weights too, so that they have the form that others have.

    Raises ValueError where a transfer finds queries and keys that are normed unlike each other.
    """
    if attention is None or not isinstance(config, HyenaConfig | WindowConfig) or config.window is None:
        return config
    norm = config.near_norm
    with contextlib.nullcontext() if config.init == "transfer" else contextlib.suppress(ValueError):
        norm = cast(NearNorm, norm_kind(attention))
    heads = attention.heads if isinstance(config, WindowConfig) and config.heads is None else config.heads
    groups = config.groups
    if groups is None and heads == attention.heads and attention.groups < heads:
        groups = attention.groups
    return replace(config, near_norm=norm, heads=heads, groups=groups)


def split_rows(u_BEn: Tensor, rows: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """What lies in the rows, by name (B, heads, rows of a head, n), given heads and rows of a head by name in order."""
    parts = u_BEn.split_with_sizes([heads * width for heads, width in rows.values()], 1)
    return {name: part.unflatten(1, (heads, -1)) for (name, (heads, _)), part in zip(rows.items(), parts, strict=True)}


def counted_rows(rows: Mapping[str, tuple[int, int]]) -> int:
    """E."""
    return sum(count * width for count, width in rows.values())


def near_places(length: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Which positions are near to which, (L, L)."""
    place_L = torch.arange(length, device=device)
    lag_LL = place_L[:, None] - place_L
    return (lag_LL >= 0) & ((lag_LL < window) | (place_L < sinks))


def with_direct(y_BHVL: Tensor, v_BGVL: Tensor, direct_I: Tensor) -> Tensor:
    """(B, I, L) with the direct term of the values."""
    values_BIL = for_heads(v_BGVL, y_BHVL.shape[1]).flatten(1, 2)
    return torch.addcmul(y_BHVL.flatten(1, 2).to(v_BGVL.dtype), values_BIL, direct_I[:, None].to(v_BGVL.dtype))
