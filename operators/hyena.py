"""The Hyena operator, channel-wise of any order and multi-head, in parallel and step by step.

    channel-wise (Poli et al. 2023, definition 3.1)      multi-head (Massaroli et al. 2023, section 4)
    v <- h_n * (x_n v) + direct_n x_n v, n = 1 .. N-1    y = scale sum_s h_{t-s} (q_t . k_s) v_s + direct v
    y  = x_0 v

Both are: one projection, a short convolution, gating and long convolution, one projection out. The rows of
`in_proj` are N + 1 blocks of width D: x_0, x_1, .., x_{N-1}, v; read for heads: query, key, value. The long
convolutions use the gates from the last, x_{N-1}, down to x_1, as safari's code does. With one channel per
head and no direct term the multi-head operator is the channel-wise one of order 2.

The scale is 1 / sqrt(head width), as in softmax attention: with copied queries and keys the products keep the
size of the attention's logits, and the filters sum to about 1, so outputs start at the size of values.

Projections run in the ambient precision (bfloat16 under autocast), all that lies between them in float32 or
float64. Positions are the last axis between the projections: no transposition is ever copied.

Shapes: B batch, L positions, D model width, E = (N + 1) D, K taps, C filters, H heads, T positions seen.
"""

import math

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig
from operators.convolution import (
    compute_dtype,
    long_conv,
    long_conv_reference,
    short_conv,
    short_conv_reference,
)
from operators.filters import ImplicitFilter, draw_linear, draw_uniform
from operators.mixing import mix, mix_reference
from operators.state import State
from operators.transfer import AttentionWeights

GATE_WEIGHT = 0.02
FEW_POSITIONS = 8


class Hyena(nn.Module):
    """Causal operator (B, L, D) -> (B, L, D); call `initialise` before use.

    Parameters: `in_proj` (E, D), `short_weight` (E, K) oldest tap first, `short_bias` (E,), `filter` with C
    filters, `direct`, `out_proj` (D, D). Channel-wise C = (N - 1) D, one block of D per convolution in order
    of application, and `direct` is (C,); multi-head C = H and `direct` is (D,).

    Args:
        config: see `HyenaConfig`.
        d_model: model width D.
        max_length: longest sequence.

    Raises:
        ValueError: `heads` does not divide `d_model`, or `max_length` is not positive.
    """

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int) -> None:
        super().__init__()
        if config.heads is not None and d_model % config.heads:
            raise ValueError(
                f"heads must divide the model width {d_model} but is {config.heads}: choose a divisor of it."
            )
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 but is {max_length}.")
        self.config, self.d_model, self.max_length = config, d_model, max_length
        self.convolutions = config.order - 1
        inner = (config.order + 1) * d_model
        filters = config.heads or self.convolutions * d_model
        self.in_proj = nn.Linear(d_model, inner)
        self.short_weight = nn.Parameter(torch.zeros(inner, config.short_taps))
        self.short_bias = nn.Parameter(torch.zeros(inner))
        self.filter = ImplicitFilter(config.filter, filters, max_length, self.convolutions)
        self.direct = nn.Parameter(torch.zeros(self.convolutions * d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Whole sequences at once.

        Args:
            x_BLD: inputs, 1 <= L <= max_length.
            mask_BL: 1 at real tokens, 0 at left padding, which leaves the outputs of real tokens unchanged.

        Returns:
            (B, L, D) in the dtype of the projections.

        Raises:
            ValueError: the sequence is longer than `max_length`.
        """
        h_CL = self.filter(x_BLD.shape[1])
        u_BEL = self._project_locally(x_BLD.transpose(1, 2), mask_BL)
        return self._project_out(self._mix_globally(u_BEL, h_CL, None))

    def reference(self, x_BLD: Tensor) -> Tensor:
        """`forward` from the definitions, O(L^2), differentiable by autograd; for tests and for reading."""
        dtype = compute_dtype(x_BLD.dtype)
        h_CL = self.filter(x_BLD.shape[1])
        u_BEL = short_conv_reference(self.in_proj(x_BLD).transpose(1, 2), self.short_weight, self.short_bias)
        blocks = u_BEL.to(dtype).chunk(self.config.order + 1, dim=1)
        if self.config.heads:
            q, k, v = (_split_heads(block, self.config.heads) for block in blocks)
            y_BHVL = mix_reference(q, k, v, h_CL) / math.sqrt(q.shape[2])
            y_BDL = y_BHVL.flatten(1, 2) + self.direct[:, None] * blocks[2]
        else:
            first, *gates, y_BDL = blocks
            filters, directs = h_CL.chunk(self.convolutions), self.direct.chunk(self.convolutions)
            steps = zip(reversed(gates), filters, directs, strict=True)
            for gate_BDL, h_DL, direct_D in steps:
                y_BDL = long_conv_reference(gate_BDL * y_BDL, h_DL, direct_D)
            y_BDL = first * y_BDL
        return self.out_proj(y_BDL.transpose(1, 2).to(x_BLD.dtype))  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> State:
        """State of `batch` sequences of which nothing was seen; memory grows with the positions."""
        return State(batch, self.max_length)

    def extend(self, x_BLD: Tensor, state: State, mask_BL: Tensor | None = None) -> tuple[Tensor, State]:
        """Process n >= 1 new positions after those the state has seen: prefill, chunked prefill and steps.

        A prefill costs what `forward` costs, a step one pass over the history, a later chunk a convolution
        over history and chunk. Of the projections only those that the short convolution still sees are kept;
        after a crop they are computed again from the inputs, which makes it exact. The state is as large as
        a key-value cache (channel-wise of order 2; half as large again for heads).

        Args:
            x_BLD: inputs of the new positions.
            state: from `init_state`; changed in place.
            mask_BL: mask of the new positions, see `forward`.

        Returns:
            Outputs (B, n, D) and the state.

        Raises:
            ValueError: another batch than the state's, no new position, or more than `max_length` in all.
        """
        batch, new, _ = x_BLD.shape
        state.check(batch, new)
        start, stop = state.length, state.length + new
        u_BEn, recent_BEK = self._project_onwards(x_BLD, state, mask_BL)
        if start > 0 and state.reversed_filter is None:
            with torch.no_grad():
                state.reversed_filter = self.filter(self.max_length).flip(-1)
        h_CT = self.filter(stop) if start == 0 else None
        y_BnD = self._project_out(self._mix_globally(u_BEn, h_CT, state))
        state.length, state.recent_projections = stop, recent_BEK
        return y_BnD, state

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """Set every parameter, deterministically given the generator's state.

        "transfer": value and output projections are copied; with heads so are query and key (heads may differ
        in number from the attention's, which then are cut or merged along the same rows) and positive filters
        follow its profile, else the gates get bias 1 and small random weights. The short convolution starts as
        the identity and `direct` as 0.
        "random": torch's usual uniform bounds, `direct` standard normal as in safari.

        Raises:
            ValueError: "transfer" without an attention, with weights of another shape than (D, D), or without the
                profile that a positive filter of heads follows.
        """
        self.filter.initialise(generator)
        if self.config.init == "random":
            draw_linear(self.in_proj, generator)
            draw_linear(self.out_proj, generator)
            bound = 1 / math.sqrt(self.config.short_taps)
            draw_uniform(self.short_weight, bound, generator)
            draw_uniform(self.short_bias, bound, generator)
            self.direct.copy_(torch.randn(self.direct.shape, generator=generator, device=generator.device))
            return
        if attention is None:
            raise ValueError("init: transfer needs the attention to copy from but got None: use init: random.")
        attention.check(self.d_model)
        if self.config.needs_profile:
            self.filter.follow(attention.profile_of(self.config.heads or 1))
        draw_uniform(self.in_proj.weight, GATE_WEIGHT, generator)
        self.in_proj.bias.fill_(1.0)
        copied = [(attention.value, attention.value_bias)]
        if self.config.heads:
            copied = [(attention.query, attention.query_bias), (attention.key, attention.key_bias), *copied]
        first_row = (self.config.order + 1 - len(copied)) * self.d_model
        self.in_proj.weight[first_row:] = torch.cat([weight for weight, _ in copied])
        self.in_proj.bias[first_row:] = torch.cat([_bias_of(weight, bias) for weight, bias in copied])
        self.out_proj.weight.copy_(attention.output)
        self.out_proj.bias.copy_(_bias_of(attention.output, attention.output_bias))
        self.short_weight.zero_()
        self.short_weight[:, -1] = 1.0
        self.short_bias.zero_()
        self.direct.zero_()

    def _project_locally(self, x_BDL: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Projection and short convolution (B, E, L) in the computing precision; zero at padded positions."""
        p_BEL = _masked(_project(self.in_proj, x_BDL), mask_BL)
        return _masked(short_conv(p_BEL, self.short_weight, self.short_bias), mask_BL)

    def _project_onwards(self, x_BLD: Tensor, state: State, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_project_locally` at positions after the state's, and the projections the next ones need."""
        start, x_BDn = state.length, x_BLD.transpose(1, 2)
        before = min(start, self.config.short_taps - 1)
        seen_BDT = state.append("input", x_BDn)
        mask_BT = _append_mask(state, mask_BL, x_BLD)
        mask_window = None if mask_BT is None else mask_BT[:, start - before :]
        if state.recent_projections is None:
            p_BEL = _masked(_project(self.in_proj, seen_BDT[..., start - before :]), mask_window)
        else:
            p_BEn = _masked(_project(self.in_proj, x_BDn), mask_BL)
            p_BEL = torch.cat([state.recent_projections, p_BEn], dim=-1)
        u_BEL = _masked(short_conv(p_BEL, self.short_weight, self.short_bias), mask_window)
        first_kept = max(0, p_BEL.shape[-1] - self.config.short_taps + 1)
        return u_BEL[..., before:], p_BEL[..., first_kept:].detach().clone()

    def _mix_globally(self, u_BEL: Tensor, h_CT: Tensor | None, state: State | None) -> Tensor:
        """The long-range part, (B, D, L); without `h_CT` the filters are those the state remembers."""
        blocks = u_BEL.chunk(self.config.order + 1, dim=1)
        with torch.autocast(u_BEL.device.type, enabled=False):
            if self.config.heads:
                return self._gather(blocks[0], blocks[1], blocks[2], h_CT, state)
            first, *gates, y_BDL = blocks
            for index, gate_BDL in enumerate(reversed(gates)):
                y_BDL = self._convolve(gate_BDL * y_BDL, index, h_CT, state)
            return first * y_BDL

    def _convolve(self, z_BDL: Tensor, index: int, h_CT: Tensor | None, state: State | None) -> Tensor:
        """Long convolution number `index` at the new positions; one alone is a dot product with the past."""
        new, channels = z_BDL.shape[-1], slice(index * self.d_model, (index + 1) * self.d_model)
        direct_D = self.direct[channels].to(z_BDL.dtype)
        past_BDT = z_BDL if state is None else state.append(f"gated_{index}", z_BDL)
        if h_CT is not None:
            return long_conv(past_BDT, h_CT[channels], direct_D)
        reversed_DT = _remembered(state, past_BDT.shape[-1])[channels]
        if new == 1:
            y_BD: Tensor = torch.linalg.vecdot(past_BDT, reversed_DT)
            return y_BD[..., None] + direct_D[:, None] * z_BDL
        return long_conv(past_BDT, reversed_DT.flip(-1), direct_D)[..., -new:]

    def _gather(self, q_BDL: Tensor, k_BDL: Tensor, v_BDL: Tensor, h_CT: Tensor | None, state: State | None) -> Tensor:
        """Multi-head mixing of the past at the new positions."""
        k_BDT = k_BDL if state is None else state.append("key", k_BDL)
        v_BDT = v_BDL if state is None else state.append("value", v_BDL)
        if h_CT is None:
            h_CT = _remembered(state, k_BDT.shape[-1]).flip(-1)
        q, k, v = (_split_heads(block, h_CT.shape[0]) for block in (q_BDL, k_BDT, v_BDT))
        y_BDL = mix(q, k, v, h_CT / math.sqrt(q.shape[2])).flatten(1, 2)
        return torch.addcmul(y_BDL, v_BDL, self.direct[:, None].to(y_BDL.dtype))

    def _project_out(self, y_BDL: Tensor) -> Tensor:
        return _project(self.out_proj, y_BDL.to(self.out_proj.weight.dtype)).transpose(1, 2)


def _project(linear: nn.Linear, x_BDL: Tensor) -> Tensor:
    """`linear` over channels-first inputs, (B, out, L): no transposed copies, unless they are tiny."""
    if x_BDL.shape[-1] <= FEW_POSITIONS:
        return nn.functional.linear(x_BDL.transpose(1, 2), linear.weight, linear.bias).transpose(1, 2)
    return torch.baddbmm(linear.bias[:, None], linear.weight.expand(x_BDL.shape[0], -1, -1), x_BDL)


def _masked(x_BEL: Tensor, mask_BL: Tensor | None) -> Tensor:
    return x_BEL if mask_BL is None else x_BEL * mask_BL[:, None].to(x_BEL.dtype)


def _append_mask(state: State, mask_BL: Tensor | None, x_BLD: Tensor) -> Tensor | None:
    """The mask (B, T) of all positions, or None while no mask was ever given."""
    if mask_BL is None and "mask" not in state.histories:
        return None
    ones_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device)
    if "mask" not in state.histories:
        state.histories["mask"] = ones_BL[:, :1].repeat(1, state.length)
    return state.append("mask", ones_BL if mask_BL is None else mask_BL.bool())


def _remembered(state: State | None, length: int) -> Tensor:
    """Filters (C, length) with time reversed, the last entry at lag 0."""
    assert state is not None
    assert state.reversed_filter is not None
    return state.reversed_filter[:, state.max_length - length :]


def _split_heads(x_BDL: Tensor, heads: int) -> Tensor:
    """(B, D, L) as (B, heads, D / heads, L)."""
    return x_BDL.view(x_BDL.shape[0], heads, -1, x_BDL.shape[-1])


def _bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
