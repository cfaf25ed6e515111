"""Multi-head Hyena: every position gathers the values before it by lag and by query and key, per head.

    y_t = sum_s h_{t-s} f(q_t, k_s) g_s v_s / n_t + direct v_t      (Massaroli et al. 2023, section 4, where f is q . k)

f is the feature map (`mixing.features`), g = exp(gate) the key gate or 1, n the sum of the same weights where they are
normalised, else 1. The rows of `in_proj` are query, key, value and, with a key gate, a gate for every head.

With one channel per head and no direct term this is the channel-wise operator of order 2. Without a feature map the
weights are divided by sqrt(width), as in attention: with copied queries and keys the products keep the size of the
attention's logits, and the filters sum to about 1, so outputs start at the size of values.

Shapes: as in `hyena`, and H heads, K here the width of a head's query and key, V of its value.
"""

import math

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig
from operators.decoding.extend import narrowed, outside_autocast
from operators.decoding.frozen import Filters
from operators.decoding.multihead import HEAD_STATES, HeadMemory, KeysAndValues
from operators.decoding.state import HyenaState
from operators.filters.modes import Modes
from operators.hyena import Hyena
from operators.mixing.chunked import Bases
from operators.mixing.features import LARGEST_GATE, SMALLEST_SUM, Layout, divided, features
from operators.mixing.forms import Path, mix_fastest, path_of, weights_for
from operators.mixing.fused import Inputs, mix_fused
from operators.mixing.head_states import extend, first_state, step
from operators.mixing.masked import mix, mix_reference, mix_step
from operators.native.decode import step_heads, step_modal_heads, takes
from operators.transfer.attention import Affine, AttentionWeights
from operators.transfer.low_rank import centred_products


class HeadHyena(Hyena):
    """E = 2 H K + I (+ H); `filter` has H filters, `direct` is (I,), `hedgehog` (H, K, K) is there for that map.

    Otherwise as `Hyena`.
    """

    STATES = HEAD_STATES

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__(config, d_model, max_length, inner)
        assert config.heads is not None
        if self.inner % config.heads:
            width = "model width" if self.inner == d_model else "width of all values"
            raise ValueError(
                f"heads must divide the {width} {self.inner} but is {config.heads}: choose a divisor of it."
            )
        self.heads = config.heads
        self.key_dim = config.key_dim or self.inner // config.heads
        self.degree = None if config.squares else config.power
        how = (config.key_gate, config.normalise, config.feature_map == "hedgehog", config.squares, self.degree)
        self.layout = Layout(self.heads, self.key_dim, self.inner // self.heads, *how)
        self.build(self.rows(), self.long_filter(self.heads, 1), self.inner)
        self.scale = 1 / math.sqrt(self.key_dim) if config.feature_map == "identity" else 1.0
        self.hedgehog: nn.Parameter | None = None
        if config.feature_map == "hedgehog":
            self.hedgehog = nn.Parameter(torch.zeros(self.heads, self.key_dim, self.key_dim))

    def rows(self) -> int:
        """E."""
        return sum(self.heads * rows for rows in self.layout.rows)

    def whole(
        self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """See `Hyena.whole`; under autocast to bfloat16 what is mixed is so too, without a state in one pass."""
        narrow = narrowed(p_BEL)
        if narrow and self.config.normalise and isinstance(filters, Tensor):
            filters = _of_any_scale(filters)
        if narrow and state is None:
            inputs = Inputs(p_BEL, mask_BL, self.short_weight, self.short_bias, self.direct, self.hedgehog)
            with outside_autocast(p_BEL.device.type):
                weights = self._weights(len(p_BEL), p_BEL.dtype, _first(filters, p_BEL.shape[-1]))
                return mix_fused(inputs, weights, self.layout)
        return super().whole(p_BEL, mask_BL, filters, state)

    def combine(
        self, u_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        parts = self.layout.parts(u_BEL)
        q_BHKL, k_BHKL, v_BHVL = features(parts, self.layout, self.hedgehog, mask_BL)
        if isinstance(state, HeadMemory):
            return self._finish(self._from_memory(q_BHKL, k_BHKL, v_BHVL, state), parts[2])
        if isinstance(state, KeysAndValues):
            k_BHKL = state.keys.append(state.length, k_BHKL)
            v_BHVL = state.values.append(state.length, v_BHVL)
        return self._finish(self._gathered(q_BHKL.to(k_BHKL.dtype), k_BHKL, v_BHVL, filters, state), parts[2])

    def modes(self) -> Modes | None:
        """Of the filters, where they have any."""
        return self.filter.modes()

    @property
    def lags(self) -> int | None:
        """Where the filters end."""
        return self.filter.lags

    def step_modes(self) -> tuple[str, ...]:
        """See `Hyena.step_modes`: of modal filters "modal", where the features of queries and keys are at hand."""
        return ("modal", "direct") if self.config.filter.kind == "modal" and self.degree is None else ("direct",)

    def path(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> Path:
        """How whole sequences are computed at the moment; `dtype` is bfloat16 under autocast to that, else float32, or
        float64 in a model of that.

        The filters are computed to answer, for some forms want smooth ones.
        """
        with torch.no_grad():
            return self._path((batch, length), dtype, *self._scaled_filters(dtype, self.filter(length)))

    def _path(self, shape: tuple[int, int], dtype: torch.dtype, h_HL: Tensor, modes: Modes | None) -> Path:
        return path_of(shape, self.layout, dtype, h_HL, modes, fused=dtype == torch.bfloat16)

    def _scaled_filters(self, dtype: torch.dtype, h_HL: Tensor) -> tuple[Tensor, Modes | None]:
        """Filters and their modes; in bfloat16 scaled, which spares a copy of the queries."""
        modes = self.modes()
        if dtype != torch.bfloat16:
            return h_HL, modes
        return self._scaled(h_HL), None if modes is None else Modes(modes[0], self._scaled(modes.residues_CS))

    def _weights(self, batch: int, dtype: torch.dtype, h_HL: Tensor) -> tuple[Tensor] | Bases:
        """What whole sequences are mixed with."""
        h_HL, modes = self._scaled_filters(dtype, h_HL)
        path = self._path((batch, h_HL.shape[1]), dtype, h_HL, modes)
        weights = weights_for(path, dtype, h_HL, modes)
        return weights if isinstance(weights, Bases) else (h_HL[:, : self.lags],)

    def _mix(self, q_BHKQ: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, h_HT: Tensor) -> Tensor:
        scaled_BHKQ = q_BHKQ if q_BHKQ.dtype == torch.bfloat16 else self._scaled(q_BHKQ)
        if q_BHKQ.shape[-1] == k_BHKT.shape[-1]:
            weights = self._weights(len(q_BHKQ), q_BHKQ.dtype, h_HT)
            return mix_fastest(scaled_BHKQ, k_BHKT, v_BHVT, weights, self.degree)
        return mix(self._scaled(q_BHKQ), k_BHKT, v_BHVT, h_HT[:, : self.lags], self.degree)

    def _gathered(
        self, q_BHKn: Tensor, k_BHKT: Tensor, v_BHVT: Tensor, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """What the last positions gather from all of them."""
        length = k_BHKT.shape[-1]
        if isinstance(filters, Tensor) or state is None or state.length == 0 or q_BHKn.shape[-1] > 1:
            return self._mix(q_BHKn, k_BHKT, v_BHVT, _first(filters, length))
        seen = min(length, filters.taps)
        if seen < length:
            k_BHKT, v_BHVT = (part.narrow(-1, length - seen, seen) for part in (k_BHKT, v_BHVT))
        return mix_step(self._scaled(q_BHKn), k_BHKT, v_BHVT, filters.reversed(seen), self.degree)

    def _from_memory(self, q_BHKn: Tensor, k_BHKn: Tensor, v_BHVn: Tensor, state: HeadMemory) -> Tensor:
        """New positions after a memory of constant size."""
        assert state.filters is not None
        recurrence = state.filters.head_recurrence
        if not state.memory:
            state.memory = [first_state(state.batch, recurrence, k_BHKn.shape[2], v_BHVn.shape[2])]
        go_on = step if q_BHKn.shape[-1] == 1 else extend
        y_BHVn, state.memory[0] = go_on(self._scaled(q_BHKn), k_BHKn, v_BHVn, state.memory[0], recurrence)
        return y_BHVn

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        if self.hedgehog is not None or self.layout.squared or not takes(state, x_B1D, p_B1E):
            return None
        short = self.short_of(state)
        how = {"gated": self.config.key_gate, "largest_gate": LARGEST_GATE, "scale": self.scale}
        if isinstance(state, KeysAndValues):
            how |= {"degree": self.degree or 0, "normalised": self.config.normalise, "smallest_sum": SMALLEST_SUM}
            return step_heads(x_B1D, p_B1E, short, self.direct, state, **how)
        assert isinstance(state, HeadMemory)
        modes = (filters.head_recurrence.decay_HS11, filters.head_recurrence.modes.residues_CS)
        return step_modal_heads(x_B1D, p_B1E, short, modes, self.direct, state, **how)

    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        parts = self.layout.parts(u_BEL)
        q_BHKL, k_BHKL, v_BHVL = features(parts, self.layout.unsquared(), self.hedgehog, None)
        return self._finish(mix_reference(self._scaled(q_BHKL), k_BHKL, v_BHVL, h_CL, self.config.power), parts[2])

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """As `Hyena.initialise`; the map of `hedgehog` starts as the identity."""
        super().initialise(attention, generator)
        if self.hedgehog is not None:
            self.hedgehog.copy_(torch.eye(self.key_dim).expand_as(self.hedgehog))

    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        """Values are copied, and queries and keys where they keep their form; heads may differ in number from the
        attention's, which then are cut or merged along the same rows. Else query and key are the best of rank K for
        the attention's products around the mean input, whose own part goes to the gate (`low_rank`). Positive filters
        follow the profile."""
        if self.config.filter.positive:
            self.filter.follow(attention.profile_of(self.heads))
        rows, biases = zip(*self.maps(attention), strict=True)
        value, bias = self.values(attention)
        self.in_proj.weight.copy_(torch.cat([rows[0], rows[1], value, *rows[2:]]))
        self.in_proj.bias.copy_(torch.cat([biases[0], biases[1], bias, *biases[2:]]))

    def values(self, attention: AttentionWeights) -> Affine:
        """The rows of the values."""
        return attention.value, attention.bias_of("value")

    def maps(self, attention: AttentionWeights) -> tuple[Affine, ...]:
        """The rows of the projections but for the values, which come third."""
        return self._fitted(attention) if self.config.fits_products else self._copied(attention)

    def _copied(self, attention: AttentionWeights) -> tuple[Affine, ...]:
        """Queries and keys as they are. ValueError where they are of another width than the values."""
        if len(attention.query) != self.heads * self.key_dim:
            raise ValueError(
                f"queries can be copied where they are as wide as values, and {attention.heads} heads have "
                f"{attention.key_width} channels of query and {self.inner // attention.heads} of value: set key_dim, "
                "or use init: random."
            )
        return attention.products()

    def _fitted(self, attention: AttentionWeights) -> tuple[Affine, ...]:
        """Query, key and gate for all heads."""
        each = centred_products(attention, self.heads, self.key_dim, gated=self.config.key_gate)
        parts = [tuple(torch.cat(part) for part in zip(*maps, strict=True)) for maps in zip(*each, strict=True)]
        return tuple((weight, bias) for weight, bias in parts[: 3 if self.config.key_gate else 2])

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1.0 else x * self.scale

    def _finish(self, y_BHVL: Tensor, v_BHVL: Tensor) -> Tensor:
        """(B, I, L): divided where that is asked for, and the direct term of the values themselves."""
        if self.config.normalise:
            y_BHVL = divided(y_BHVL)
        direct_I1 = self.direct.unsqueeze(1).to(v_BHVL.dtype)
        return torch.addcmul(y_BHVL.flatten(1, 2).to(v_BHVL.dtype), v_BHVL.flatten(1, 2), direct_I1)


def _first(filters: Tensor | Filters, length: int) -> Tensor:
    """Filters of whole sequences, (H, length)."""
    return filters if isinstance(filters, Tensor) else filters.first(length)


def _of_any_scale(h_HL: Tensor) -> Tensor:
    """h itself, but with no gradient by its scale, which the normaliser takes out: in half precision that would be
    rounding, and most of what a timescale is told."""
    sum_H1 = h_HL.sum(1, keepdim=True)
    return h_HL * (sum_H1.detach() / sum_H1)
