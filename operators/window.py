"""Near positions and sinks by softmax, as attention has them, and nothing far: the control to `windowed`.

    y_t = sum_{s near} exp(q'_t . k'_s) v_s / sum_{s near} exp(q'_t . k'_s) + direct v_t

Shapes: as in `hyena`, and H heads, K the width of a head's query and key, V of its value.
"""

import torch
from torch import Tensor

from operators.config import WindowConfig
from operators.decoding.frozen import Filters
from operators.decoding.multihead import WINDOW_STATES, WindowMemory
from operators.decoding.state import HyenaState
from operators.filters.none import NoFilter
from operators.hyena import Hyena
from operators.mixing.near import for_heads, near, turns, whole
from operators.native.decode import step_window, takes
from operators.native.window import mix_window, takes_whole
from operators.near import Near, counted_rows, near_places, split_rows, with_direct
from operators.transfer.attention import AttentionWeights, first_of_groups


class WindowAttention(Hyena):
    """Near positions and sinks alone: E as `parts` says; `near` is a `Near` without a level."""

    STATES = WINDOW_STATES
    config: WindowConfig  # type: ignore[assignment]

    def __init__(self, config: WindowConfig, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__(config, d_model, max_length, inner)
        if config.heads is None:
            raise ValueError("heads must be set where there is no attention to take them from but is None: set heads.")
        if self.inner % config.heads:
            raise ValueError(f"heads must divide the width {self.inner} but is {config.heads}: choose a divisor of it.")
        self.heads, self.window, self.sinks = config.heads, config.window, config.sinks
        self.build(counted_rows(self.parts), NoFilter(max_length), self.inner)
        self.near = Near((self.heads, self.groups), self.inner // self.heads, config.near_norm, level=False)

    @property
    def groups(self) -> int:
        """G, heads of keys and of values."""
        return self.config.groups or self.heads

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Heads and rows of a head of what the projection makes, in order."""
        width = self.inner // self.heads
        return {"value": (self.groups, width), "query": (self.heads, width), "key": (self.groups, width)}

    def step_modes(self) -> tuple[str, ...]:
        return ("window",)

    def described(self) -> str:
        return "with a window alone "

    def combine(
        self, u_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        v_BGVL, q_BHKL, k_BGKL = split_rows(u_BEL, self.parts).values()
        start = 0 if state is None else state.length
        if start == 0 and q_BHKL.shape[2] % 2 == 0 and takes_whole(u_BEL, mask_BL):
            return with_direct(self._by_core(q_BHKL, k_BGKL, v_BGVL, state), v_BGVL, self.direct)
        q_BHKL, _, k_BGKL, _ = self.near.products(q_BHKL, k_BGKL, start)
        if state is None:
            seen = whole(k_BGKL, v_BGVL, self.sinks, mask_BL)
        else:
            assert isinstance(state, WindowMemory)
            seen = state.see(k_BGKL, v_BGVL, mask_BL, self.window, self.sinks)
        y_BHVL = near(q_BHKL.to(seen.k_BHKT.dtype), seen, self.window)[0]
        return with_direct(y_BHVL, v_BGVL, self.direct)

    def _by_core(self, q_BHKL: Tensor, k_BGKL: Tensor, v_BGVL: Tensor, state: HyenaState | None) -> Tensor:
        """Whole sequences in one pass; the state has what steps of the core go on from, in float32."""
        q_BHKL, k_BGKL = self.near.normed(q_BHKL, k_BGKL)
        if state is not None:
            assert isinstance(state, WindowMemory)
            state.see(self.near.turned(k_BGKL.float()), v_BGVL.float(), None, self.window, self.sinks)
        turned_by = torch.stack(turns(self.near.frequencies, 0, q_BHKL.shape[-1], torch.float32))
        return mix_window((q_BHKL, k_BGKL, v_BGVL), turned_by, None, self.window, self.sinks)

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        if self.config.near_norm != "none" or not takes(state, x_B1D, p_B1E):
            return None
        assert isinstance(state, WindowMemory)
        given = (x_B1D, p_B1E, self.short_of(state), self.near.frequencies, self.direct, state)
        return step_window(*given, self.heads)

    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        v_BGVL, q_BHKL, k_BGKL = split_rows(u_BEL, self.parts).values()
        near_LL = near_places(h_CL.shape[1], self.window, self.sinks, h_CL.device)
        q_BHKL, _, k_BGKL, _ = self.near.products(q_BHKL, k_BGKL, 0)
        products = q_BHKL.transpose(-1, -2) @ for_heads(k_BGKL, self.heads)
        v_BHVL = for_heads(v_BGVL, self.heads)
        weights_BHLL = products.masked_fill(~near_LL, float("-inf")).softmax(-1)
        return with_direct(v_BHVL @ weights_BHLL.transpose(-1, -2), v_BHVL, self.direct)

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """As `Hyena.initialise`; queries and keys are the attention's."""
        self.near.initialise()
        super().initialise(attention, generator)

    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        query, key = self.near.transfer(attention, self.heads, self.inner // self.heads)
        value = first_of_groups((attention.value, attention.bias_of("value")), self.heads, self.groups)
        self.in_proj.weight.copy_(torch.cat([value[0], query[0], key[0]]))
        self.in_proj.bias.copy_(torch.cat([value[1], query[1], key[1]]))
