"""Near positions and sinks by softmax, as attention has them, and far ones by convolution, over one sum.

    y_t = (sum_{s near} exp(q'_t . k'_s - c_t) v_s + sum_{s far} h_{t-s} f(q_t, k_s) g_s v_s) / n_t + direct v_t

Near are the last `window` positions and the first `sinks` of a text; q', k' and the level c are those of `near`, the
far sum is that of `heads`, n the sum of all weights. The rows of `in_proj` are those of `heads`, then q' and k'; where
these are `tied`, far positions have them too, before they are turned and keys less a centre, and the rows are those of
q', k' and v. Heads of a group have v and k' in common. The far part reads keys `window` positions late, with filters
that begin there, so all forms of `mixing` serve as they are.

Shapes: as in `heads`, G heads of near keys and of values, and W positions of the window.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from operators.config import HyenaConfig
from operators.decoding.frozen import Filters
from operators.decoding.multihead import (
    NEAR_STATES,
    KeysAndValues,
    NearHistory,
    NearMemory,
)
from operators.decoding.state import HyenaState
from operators.filters.modes import Modes
from operators.heads import HeadHyena
from operators.hyena import Hyena
from operators.mixing.features import LARGEST_GATE, counted, features, squares
from operators.mixing.forms import Path
from operators.mixing.head_states import extend, first_state, step
from operators.mixing.masked import mix_reference, mix_step
from operators.mixing.near import SMALLEST, for_heads, joined, joined_reference, near, turns, whole, without_first
from operators.native.decode import step_modal_window_heads, step_window_heads, takes
from operators.native.window import Far, mix_window, takes_whole
from operators.near import Near, counted_rows, near_places, split_rows, with_direct
from operators.transfer.attention import Affine, AttentionWeights, first_of_groups
from operators.transfer.level import level_for


class Rows(NamedTuple):
    """What the rows say of n positions: near queries and keys, turned and not, values, and the parts of the far sum."""

    q_BHKn: Tensor
    still_q_BHKn: Tensor
    k_BGKn: Tensor
    still_k_BGKn: Tensor
    v_BGVn: Tensor
    far: list[Tensor]


class WindowedHeads(HeadHyena):
    """E as `parts` says; `near` is a `Near`. Otherwise as `HeadHyena`."""

    STATES = NEAR_STATES

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__(config, d_model, max_length, inner)
        assert config.window is not None
        self.window, self.sinks = config.window, config.sinks
        both = (self.heads, self.groups)
        self.near = Near(both, self.layout.value_width, config.near_norm, level=True, tied=config.tied)

    @property
    def groups(self) -> int:
        """G, heads of near keys and of values."""
        return self.config.groups or self.heads

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Heads and rows of a head of what the projection makes, in order."""
        all_heads, groups = (self.heads, self.layout.value_width), (self.groups, self.layout.value_width)
        if self.config.tied:
            return {"query": all_heads, "key": groups, "value": groups}
        far = {"far query": (self.heads, self.key_dim), "far key": (self.heads, self.key_dim), "value": groups}
        gate = {"gate": (self.heads, 1)} if self.config.key_gate else {}
        return far | gate | {"query": all_heads, "key": groups}

    def rows(self) -> int:
        return counted_rows(self.parts)

    def read(self, u_BEn: Tensor, start: int) -> Rows:
        """What the rows say of positions from `start` on."""
        of = split_rows(u_BEn, self.parts)
        products, value = self.near.products(of["query"], of["key"], start), of["value"]
        if self.config.tied:
            return self._tied(Rows(*products, value, []))
        gate = [of["gate"]] if self.config.key_gate else []
        return Rows(*products, value, [of["far query"], of["far key"], for_heads(value, self.heads), *gate])

    def _tied(self, rows: Rows) -> Rows:
        """With far queries, keys and values that are the near ones."""
        return rows._replace(far=[rows.still_q_BHKn, self.near.centred(rows.still_k_BGKn), rows.v_BGVn])

    def freeze(self) -> Filters:
        """The filters, whose modes are those of what is left of them behind the window."""
        return Filters(self.filter, self.max_length, self.modes, None, self.filter.lags)

    def modes(self) -> Modes | None:
        modes = super().modes()
        if modes is None:
            return None
        return Modes(modes.log_poles_CS, modes.residues_CS * torch.exp(modes.log_poles_CS * self.window))

    @property
    def lags(self) -> int | None:
        return None if self.filter.lags is None else self.filter.lags - self.window

    def path(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> Path:
        """How the far part of whole sequences is computed, see `HeadHyena.path`, but for what the core
        computes in one pass with the near part (`native.window`)."""
        if length <= self.window:
            return Path("masked", "torch", fused=False)
        with torch.no_grad():
            h_HL = self.filter(length)[:, self.window :]
            return self._path((batch, length - self.window), dtype, *self._scaled_filters(dtype, h_HL))

    def whole(
        self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """See `Hyena.whole`; under autocast to bfloat16 all values, and the far queries and keys, are so too."""
        return Hyena.whole(self, p_BEL, mask_BL, filters, state)  # what is fused for heads knows no window

    def combine(
        self, u_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        start = 0 if state is None else state.length
        by_modes = isinstance(state, NearMemory) and not self.layout.squared
        even = self.key_dim % 2 == 0 and self.layout.value_width % 2 == 0
        if start == 0 and even and not by_modes and self.hedgehog is None and takes_whole(u_BEL, mask_BL):
            return self._by_core(u_BEL, filters, state)
        q_BHKL, still_BHKL, k_BGKL, _, v_BGVL, parts = self.read(u_BEL, start)
        if state is None:
            seen = whole(k_BGKL, v_BGVL, self.sinks, mask_BL)
        elif isinstance(state, NearHistory):
            seen = state.see(k_BGKL, v_BGVL, mask_BL, self.sinks)
        else:
            assert isinstance(state, NearMemory)
            seen = state.see(k_BGKL, v_BGVL, mask_BL, self.window, self.sinks)
        y_BHVL, lse_BH1L = near(q_BHKL.to(seen.k_BHKT.dtype), seen, self.window)
        qf_BHKL, kf_BHKL, vf_BHXL = features(parts, self.layout, self.hedgehog, mask_BL)
        vf_BHXL = without_first(vf_BHXL, self.sinks, seen.padding_B, start)
        far_BHXL = self._far([qf_BHKL, kf_BHKL, vf_BHXL], filters, state)
        return self._summed(joined(y_BHVL, lse_BH1L, self.near.level(still_BHKL), far_BHXL), v_BGVL)

    def _by_core(self, u_BEL: Tensor, filters: Tensor | Filters, state: HyenaState | None) -> Tensor:
        """`combine` of whole sequences in one pass; the state has what steps of the core go on from, in float32."""
        of, length = split_rows(u_BEL, self.parts), u_BEL.shape[-1]
        q_BHKL, k_BGKL = self.near.normed(of["query"], of["key"])
        if self.config.tied:
            far_q, far_k = q_BHKL / self.key_dim**0.5, self.near.centred(k_BGKL)
        else:
            far_q, far_k = of["far query"], of["far key"]
        memory = None if state is None else self._remember(state, of, k_BGKL, far_k)
        far = None
        if length > self.window:
            h_HL = filters if isinstance(filters, Tensor) else filters.first(length)
            gate = counted(of["gate"]) if self.config.key_gate else None
            level = (self.near.mean_key.view(self.heads, -1), self.near.shift)
            modes = self.modes() if self.layout.squared else None
            far = Far(far_q, far_k, h_HL[:, self.window :], level, gate, self.config.power or 0, modes)
        turned_by = torch.stack(turns(self.near.frequencies, 0, length, torch.float32))
        given = ((q_BHKL, k_BGKL, of["value"]), turned_by, far, self.window, self.sinks)
        return self._summed(mix_window(*given, memory if far else None), of["value"])

    def _remember(self, state: HyenaState, of: dict[str, Tensor], k_BGKL: Tensor, far_k: Tensor) -> Tensor | None:
        """Let a state begin with whole sequences; returns the memory that is to be filled, where it has one."""
        turned, v_BGVL = self.near.turned(k_BGKL.float()), of["value"].float()
        # Of far positions a memory has the last alone: what lies behind them is in the sum that the core fills.
        first = max(0, far_k.shape[-1] - self.window) if isinstance(state, NearMemory) else 0
        far_k, far_v = far_k[..., first:].float(), v_BGVL[..., first:]
        parts = [far_k, far_k, far_v if self.config.tied else for_heads(far_v, self.heads)]
        parts += [of["gate"][..., first:].float()] if self.config.key_gate else []
        values_BHXn = without_first(features(parts, self.layout.unsquared(), None, None)[2], self.sinks, None, first)
        keys_BHKn = squares(far_k) if self.layout.squared else far_k
        if isinstance(state, NearHistory):
            state.see(turned, v_BGVL, None, self.sinks)
            state.keys.append(0, keys_BHKn)
            state.values.append(0, values_BHXn)
            return None
        assert isinstance(state, NearMemory) and state.filters is not None
        state.see(turned, v_BGVL, None, self.window, self.sinks)
        memory = first_state(state.batch, state.filters.head_recurrence, keys_BHKn.shape[2], values_BHXn.shape[2])
        state.leave([keys_BHKn, values_BHXn], self.window, memory)
        return memory

    def _far(self, parts: list[Tensor], filters: Tensor | Filters, state: HyenaState | None) -> Tensor:
        """What new positions gather from behind the window, (B, H, V + 1, n)."""
        q_BHKn, k_BHKT, v_BHXT = parts
        new = q_BHKn.shape[-1]
        if isinstance(state, NearMemory):
            assert state.filters is not None
            recurrence = state.filters.head_recurrence
            widths = (state.batch, recurrence, k_BHKT.shape[2], v_BHXT.shape[2])
            go_on = partial(step if new == 1 else extend, recurrence=recurrence)
            return state.go_on(parts, self.window, partial(first_state, *widths), go_on)
        if isinstance(state, KeysAndValues):
            k_BHKT, v_BHXT = state.keys.append(state.length, k_BHKT), state.values.append(state.length, v_BHXT)
        k_BHKT, v_BHXT = (for_heads(x, self.heads) for x in (k_BHKT, v_BHXT))
        length = k_BHKT.shape[-1]
        there = length - self.window
        count = min(new, there)  # of the new ones, whose text is longer than the window
        if count <= 0:
            nothing = q_BHKn.sum() + filters.sum() if isinstance(filters, Tensor) else 0.0  # whose gradients are 0
            return v_BHXT.new_zeros(*v_BHXT.shape[:3], new) + 0.0 * nothing
        q_BHKn = q_BHKn[..., new - count :].to(k_BHKT.dtype)
        k_BHKT, v_BHXT = k_BHKT[..., :there], v_BHXT[..., :there]
        if isinstance(filters, Filters) and state is not None and state.length > 0 and new == 1:
            first = max(0, length - filters.taps)
            weights_HT = filters.reversed(length)[:, first:there]
            return mix_step(q_BHKn, k_BHKT[..., first:], v_BHXT[..., first:], weights_HT, self.degree)
        h_HL = filters if isinstance(filters, Tensor) else filters.first(length)
        mixed_BHXn = self._mix(q_BHKn, k_BHKT, v_BHXT, h_HL[:, self.window :])
        return torch.nn.functional.pad(mixed_BHXn, (new - count, 0))

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        if self.hedgehog is not None or self.config.near_norm != "none" or not takes(state, x_B1D, p_B1E):
            return None
        short = self.short_of(state)
        near = [self.near.frequencies, self.near.mean_key, self.near.shift]
        how = {"gated": self.config.key_gate, "largest_gate": LARGEST_GATE}
        if isinstance(state, NearMemory):
            modes = (filters.head_recurrence.decay_HS11, filters.head_recurrence.modes.residues_CS)
            how |= {"keys": self.key_dim}
            return step_modal_window_heads(x_B1D, p_B1E, short, modes, near, self.direct, state, **how)
        if self.layout.squared:
            return None
        assert isinstance(state, NearHistory)
        near += [self.near.centre] if self.config.tied else []
        how |= {"degree": self.degree or 0, "heads": self.heads, "window": self.window, "sinks": self.sinks}
        return step_window_heads(x_B1D, p_B1E, short, near, self.direct, state, **how)

    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        q_BHKL, still_BHKL, k_BGKL, _, v_BGVL, parts = self.read(u_BEL, 0)
        parts, v_BHVL = [for_heads(part, self.heads) for part in parts], for_heads(v_BGVL, self.heads)
        near_LL = near_places(h_CL.shape[1], self.window, self.sinks, h_CL.device)
        products = q_BHKL.transpose(-1, -2) @ for_heads(k_BGKL, self.heads)
        q_BHKL, k_BHKL, v_BHXL = features(parts, self.layout.unsquared(), self.hedgehog, None)
        place_L = torch.arange(h_CL.shape[1], device=h_CL.device)
        v_BHXL = v_BHXL * (place_L >= self.sinks)
        far_BHXL = mix_reference(q_BHKL, k_BHKL, v_BHXL, h_CL * (place_L >= self.window), self.config.power)
        level_BH1L = self.near.level(still_BHKL)
        return self._summed(joined_reference(products, near_LL, v_BHVL, level_BH1L, far_BHXL), v_BHVL)

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """As `HeadHyena.initialise`; near queries and keys are the attention's, and the level is the one that comes
        nearest to the shares of the weight that near positions have in it on its examples (`transfer.level`)."""
        self.near.initialise()
        super().initialise(attention, generator)
        if attention is not None and self.config.init == "transfer":
            self._set_level(attention.seen_near()[0])

    def maps(self, attention: AttentionWeights) -> tuple[Affine, ...]:
        far = () if self.config.tied else super().maps(attention)
        return *far, *self.near.transfer(attention, self.heads, self.layout.value_width)

    def values(self, attention: AttentionWeights) -> Affine:
        return first_of_groups(super().values(attention), self.heads, self.groups)

    def _set_level(self, x_BLD: Tensor) -> None:
        """From whole texts of inputs, one at a time; before it the centre that far keys are taken from, their mean."""
        x_BLD = x_BLD[:, : self.max_length].to(self.in_proj.weight)
        texts = [self._read_inputs(x_LD) for x_LD in x_BLD]
        mean_GK = torch.stack([rows.still_k_BGKn.mean((0, 3)) for rows in texts]).mean(0)
        if self.config.tied:
            self.near.centre.copy_(mean_GK.flatten())
            texts = [self._tied(rows) for rows in texts]
        h_HL, found = self.filter(x_BLD.shape[1]), []
        for q_1HKL, still_q_1HKL, k_1GKL, _, v_1GVL, parts in texts:
            seen = whole(k_1GKL, v_1GVL, self.sinks, None)
            lse, of_all = (near(q_1HKL, seen, window)[1][:, :, 0] for window in (self.window, x_BLD.shape[1]))
            qf, kf, vf = features(parts, self.layout, self.hedgehog, None)
            sums = self._far([qf, kf, without_first(vf, self.sinks, None, 0)], h_HL, None)[:, :, -1]
            found.append((still_q_1HKL, lse, of_all, sums))
        q_BHKL, lse_BHL, of_all_BHL, sums_BHL = (torch.cat(parts) for parts in zip(*found, strict=True))
        there_BHL = sums_BHL >= SMALLEST
        odds_BHL, share_BHL = lse_BHL - sums_BHL.clamp_min(SMALLEST).log(), (lse_BHL - of_all_BHL).exp()
        q_HNK, odds_HN, share_HN, there_HN = (
            x.transpose(0, 1).flatten(1, 2) for x in (q_BHKL.transpose(2, 3), odds_BHL, share_BHL, there_BHL)
        )
        key_HK, shift_H = level_for(
            q_HNK, odds_HN, share_HN, there_HN, mean_GK.repeat_interleave(self.heads // self.groups, 0)
        )
        self.near.mean_key.copy_(key_HK.flatten())
        self.near.shift.copy_(shift_H)

    def _read_inputs(self, x_LD: Tensor) -> Rows:
        """Of one text without the short convolution, which starts as the identity."""
        p_EL = self.in_proj.weight @ x_LD.t() + self.in_proj.bias[:, None]
        return self.read(p_EL[None], 0)

    def _summed(self, y_BHVL: Tensor, v_BGVL: Tensor) -> Tensor:
        return with_direct(y_BHVL, v_BGVL, self.direct)
