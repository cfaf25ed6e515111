"""What operators are measured against: a Hyena straight from the textbook, and attention with a key-value cache.

Neither is used anywhere else: the first regenerates its filter at every call, copies for every change of layout and
convolves with twice the length, as one writes it from the paper; the second is torch's own attention between its
projections, and decodes with a cache that is there from the start.

Shapes: B batch, L positions, D model width, T positions seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class TextbookHyena(nn.Module):
    """Channel-wise Hyena of order 2 with the paper's filter network: width 64, four layers, sine frequency 14."""

    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.short = nn.Conv1d(3 * d_model, 3 * d_model, 3, padding=2, groups=3 * d_model)
        self.layers = nn.ModuleList([nn.Linear(5, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
        self.readout = nn.Linear(64, d_model, bias=False)
        self.direct = nn.Parameter(torch.randn(d_model))
        time = torch.linspace(0, 1, max_length)[:, None]
        angle = 2 * math.pi * torch.arange(max_length)[:, None] / max_length * torch.tensor([1e-4, 1.0])
        self.register_buffer("features", torch.cat([time, torch.cos(angle), -torch.sin(angle)], dim=-1))
        rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, d_model)
        self.register_buffer("window", torch.exp(-time * rates))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        length = x_BLD.shape[1]
        hidden = self.features[:length]  # type: ignore[index]
        for layer in self.layers:
            hidden = torch.sin(14.0 * layer(hidden))
        h_DL = (self.readout(hidden) * self.window[:length]).transpose(0, 1).float()  # type: ignore[index]
        u_BEL = self.short(self.in_proj(x_BLD).transpose(1, 2))[..., :length]
        first, gate, value = u_BEL.chunk(3, dim=1)
        z_BDL = (gate * value).float()
        size = 2 * length
        y_BDL = torch.fft.irfft(torch.fft.rfft(z_BDL, size) * torch.fft.rfft(h_DL, size), size)[..., :length]
        y_BDL = first * (y_BDL + self.direct[:, None] * z_BDL).to(first.dtype)
        return self.out_proj(y_BDL.transpose(1, 2))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Softmax attention between its projections."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BLD).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def init_state(self, batch: int, capacity: int) -> dict[str, Any]:
        """A cache for `capacity` positions, nothing seen."""
        weight = self.qkv.weight
        shape = (batch, self.heads, capacity, weight.shape[1] // self.heads)
        return {"k": weight.new_zeros(shape), "v": weight.new_zeros(shape), "length": 0}

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Process positions after those seen: a prompt at the beginning, one position later."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BLD).chunk(3, dim=-1))
        start, stop = state["length"], state["length"] + x_BLD.shape[1]
        state["k"][:, :, start:stop], state["v"][:, :, start:stop], state["length"] = k, v, stop
        seen = (state["k"][:, :, :stop], state["v"][:, :, :stop])
        y = nn.functional.scaled_dot_product_attention(q, *seen, is_causal=start == 0)
        return self.out(y.transpose(1, 2).flatten(2)), state
