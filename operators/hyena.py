"""What channel-wise and multi-head Hyena share: projections, short convolution, decoding by extension.

    channel-wise (Poli et al. 2023, definition 3.1)      multi-head (Massaroli et al. 2023, section 4)
    v <- h_n * (x_n v) + direct_n x_n v, n = 1 .. N-1    y_t = sum_s h_{t-s} f(q_t, k_s) v_s + direct v_t
    y  = x_0 v

Both are: one projection, a short convolution, gating and long convolution, one projection out. `channels.py` and
`heads.py` are what lies between the projections.

Projections run in the ambient precision (bfloat16 under autocast), all that lies between them in float32 or
float64. Positions are the last axis between the projections: no transposition is ever copied.

Shapes: B batch, L positions, D model width, E rows of the projection, K taps, C filters, T positions seen.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig
from operators.convolution.causal import compute_dtype, short_conv, short_conv_reference
from operators.convolution.projection import project
from operators.decoding.frozen import Filters
from operators.decoding.state import ShortConv, State
from operators.filters.base import LongFilter, draw_linear, draw_uniform
from operators.filters.fir import FirFilter
from operators.filters.implicit import ImplicitFilter
from operators.filters.modal import ModalFilter
from operators.native import in_use
from operators.native.projection import project_step
from operators.transfer.attention import AttentionWeights

FILTERS: dict[str, Callable[..., LongFilter]] = {"implicit": ImplicitFilter, "modal": ModalFilter, "fir": FirFilter}


class Hyena(nn.Module, ABC):
    """Causal operator (B, L, D) -> (B, L, D); call `initialise` before use.

    Parameters: `in_proj` (E, D), `short_weight` (E, K) oldest tap first, `short_bias` (E,), `filter` with C
    filters, `direct`, `out_proj` (D, D).

    Args:
        config: see `HyenaConfig`.
        d_model: model width D.
        max_length: longest sequence.

    Raises:
        ValueError: `heads` does not divide `d_model`, `max_length` is not positive, or the filter does not fit it.
    """

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 but is {max_length}.")
        self.config, self.d_model, self.max_length = config, d_model, max_length

    def build(self, inner: int, filters: int, steps: int, direct: int) -> None:
        """Make the parameters, with `inner` rows of the projection; `steps` convolutions share the filters.

        ValueError if the filter does not fit `max_length`.
        """
        self.in_proj = nn.Linear(self.d_model, inner)
        self.short_weight = nn.Parameter(torch.zeros(inner, self.config.short_taps))
        self.short_bias = nn.Parameter(torch.zeros(inner))
        config = self.config.filter
        self.filter = FILTERS[config.kind](config, filters, self.max_length, steps)
        self.direct = nn.Parameter(torch.zeros(direct))
        self.out_proj = nn.Linear(self.d_model, self.d_model)

    @abstractmethod
    def combine(self, u_BEL: Tensor, mask_BL: Tensor | None, h_CT: Tensor | None, state: State | None) -> Tensor:
        """What lies between the projections, (B, D, L), in u's precision and outside autocast.

        With a state the positions follow those it has seen. Without `h_CT` the filters are the `frozen` ones, and
        nobody asks for gradients of what came before.
        """

    def combine_step(self, u_B1E: Tensor, state: State) -> Tensor:
        """`combine` of one position that is not padded, (B, 1, D)."""
        return self.combine(u_B1E.transpose(1, 2), None, None, state).transpose(1, 2)

    def whole(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor | None, state: State | None) -> Tensor:
        """Whole sequences from their projections on: short convolution and `combine`, (B, D, L)."""
        u_BEL = _masked(short_conv(p_BEL, self.short_weight, self.short_bias), mask_BL)
        with outside_autocast(p_BEL.device.type):
            return self.combine(u_BEL, mask_BL, h_CL, state)

    def frozen(self) -> Filters:
        """The filters as they are at this moment, computed once."""
        return self.filter.frozen()

    @abstractmethod
    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        """`combine` of whole sequences from its definition, O(L^2), differentiable by autograd."""

    @abstractmethod
    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        """Set `in_proj` and, where it follows the attention, the filter."""

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
        h_CL = self._trained_filters(x_BLD.shape[1])
        p_BEL = _masked(self.project(self.in_proj, x_BLD.transpose(1, 2)), mask_BL)
        return self._project_out(self.whole(p_BEL, mask_BL, h_CL, None))

    def reference(self, x_BLD: Tensor) -> Tensor:
        """`forward` from the definitions, O(L^2), differentiable by autograd; for tests and for reading."""
        h_CL = self.filter(x_BLD.shape[1])
        u_BEL = short_conv_reference(self.in_proj(x_BLD).transpose(1, 2), self.short_weight, self.short_bias)
        y_BDL = self.combine_reference(u_BEL.to(compute_dtype(x_BLD.dtype)), h_CL)
        return self.out_proj(y_BDL.transpose(1, 2).to(x_BLD.dtype))  # type: ignore[no-any-return]

    def step_modes(self) -> tuple[str, ...]:
        """Ways of decoding, the usual one first."""
        return ("direct",)

    def init_state(self, batch: int, mode: str | None = None, *, croppable: bool = True) -> State:
        """State of `batch` sequences of which nothing was seen.

        Args:
            batch: sequences.
            mode: how to go on position by position, one of `step_modes`, see `steps`; None for the usual one, which
                gives what `forward` gives but for rounding. Only "modal" of implicit filters, as modes fitted to them,
                does not: `frozen().fitted` has the relative error of every filter.
            croppable: keep the inputs of all positions (D numbers each), from which a crop computes again what it
                needs. Without them the memory of "modal" and "window" is constant, and `crop` goes to 0 only.

        Raises:
            ValueError: a mode that the operator does not have.
        """
        modes = self.step_modes()
        if mode is not None and mode not in modes:
            raise ValueError(
                f"mode must be one of {', '.join(modes)} with {self.config.filter.kind} filters "
                f"{'and heads ' if self.config.heads else ''}but is {mode!r}: choose one of these, or another filter."
            )
        return State(batch, self.max_length, mode or modes[0], croppable)

    def extend(self, x_BLD: Tensor, state: State, mask_BL: Tensor | None = None) -> tuple[Tensor, State]:
        """Process n >= 1 new positions after those the state has seen: prefill, chunked prefill and steps.

        A prefill costs what `forward` costs, a step one pass over the history of heads and a few operations for
        channels, a later chunk a convolution over history and chunk. Of the projections only those that the short
        convolution still sees are kept; after a crop they, and memories of a constant size, are computed again from the
        inputs, which makes it exact. With a history the state is as large as a key-value cache (channel-wise of order
        2; half as large again for heads), without one half as large, or constant if it is not croppable.

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
        if state.behind:
            self._catch_up(state)
        start, stop = state.length, state.length + new
        if state.filters is None and (start > 0 or not torch.is_grad_enabled()):
            state.filters = self.frozen()
        if new == 1 and start >= self.config.short_taps and mask_BL is None and state.recent_projections is not None:
            return self._step(x_BLD, state), state
        if start == 0:
            p_BEL = _masked(self.project(self.in_proj, state.keep_input("input", x_BLD.transpose(1, 2))), mask_BL)
            _append_mask(state, mask_BL, x_BLD)
            y_BDn = self.whole(p_BEL, mask_BL, self._trained_filters(stop), state)
        else:
            u_BEn, mask_Bn, p_BEL = self._project_onwards(x_BLD, state, mask_BL)
            with outside_autocast(x_BLD.device.type):
                y_BDn = self.combine(u_BEn, mask_Bn, None, state)
        first_kept = max(0, p_BEL.shape[-1] - self.config.short_taps + 1)
        state.recent_projections = tuple(p_BE[:, None].detach().clone() for p_BE in p_BEL[..., first_kept:].unbind(2))
        state.length = stop
        if new > 1:
            state.mark()
        return self._project_out(y_BDn), state

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """Set every parameter, deterministically given the generator's state.

        "transfer": value and output projections are copied, the rest follows the attention as `transfer` of the
        operator says; the short convolution starts as the identity and `direct` as 0.
        "random": torch's usual uniform bounds, `direct` standard normal as in safari.

        Raises:
            ValueError: "transfer" without an attention, with weights of another shape than (D, D), or without the
                statistics that the configuration needs.
        """
        self.filter.initialise(generator)
        if self.config.init == "random":
            draw_linear(self.in_proj, generator)
            draw_linear(self.out_proj, generator)
            bound = self.config.short_taps**-0.5
            draw_uniform(self.short_weight, bound, generator)
            draw_uniform(self.short_bias, bound, generator)
            self.direct.copy_(torch.randn(self.direct.shape, generator=generator, device=generator.device))
            return
        if attention is None:
            raise ValueError("init: transfer needs the attention to copy from but got None: use init: random.")
        attention.check(self.d_model)
        self.transfer(attention, generator)
        self.out_proj.weight.copy_(attention.output)
        self.out_proj.bias.copy_(attention.bias_of("output"))
        self.short_weight.zero_()
        self.short_weight[:, -1] = 1.0
        self.short_bias.zero_()
        self.direct.zero_()

    def _project_onwards(
        self, x_BLD: Tensor, state: State, mask_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Projection and short convolution (B, E, n) after the state's positions, zero at padded ones; their mask; and
        the projections that the short convolution saw."""
        start, x_BDn = state.length, x_BLD.transpose(1, 2)
        before = min(start, self.config.short_taps - 1)
        seen_BDT = state.keep_input("input", x_BDn)
        mask_BT = _append_mask(state, mask_BL, x_BLD)
        if state.recent_projections is None:
            mask_window = None if mask_BT is None else mask_BT[:, start - before :]
            p_BEL = _masked(self.project(self.in_proj, seen_BDT[..., start - before :]), mask_window)
        else:
            p_BEn = _masked(self.project(self.in_proj, x_BDn), mask_BL)
            p_BEL = torch.cat([*(p_B1E.transpose(1, 2) for p_B1E in state.recent_projections), p_BEn], dim=-1)
        mask_Bn = None if mask_BT is None else mask_BT[:, -x_BDn.shape[-1] :]
        u_BEn = short_conv(p_BEL, self.short_weight, self.short_bias)[..., before:]
        return _masked(u_BEn, mask_Bn), mask_Bn, p_BEL

    @torch.no_grad()
    def _catch_up(self, state: State) -> None:
        """Compute again what a memory of a constant size has lost by a crop, from the inputs behind the last mark."""
        kept = slice(state.length - state.behind, state.length)
        x_BLD = state.histories["input"][..., kept].transpose(1, 2).clone()
        mask_BT = state.histories.get("mask")
        state.length, state.behind = kept.start, 0
        self.extend(x_BLD, state, None if mask_BT is None else mask_BT[:, kept].clone())

    def _trained_filters(self, length: int) -> Tensor | None:
        """Filters (C, length) to differentiate; None, for the frozen ones, where nobody does."""
        self.filter.check(length)
        return self.filter(length) if torch.is_grad_enabled() else None

    def _step(self, x_B1D: Tensor, state: State) -> Tensor:
        """`extend` by one position that is not padded, after as many as the short convolution sees: few operations."""
        _append_mask(state, None, x_B1D)
        p_B1E = project_step(self.in_proj, x_B1D)
        y_B1D = self.between(x_B1D, p_B1E, state) if in_use() else None
        if y_B1D is None:
            if state.croppable:
                state.write("input", x_B1D.transpose(1, 2))
            with outside_autocast(x_B1D.device.type):
                y_B1D = self.combine_step(self._short_step(p_B1E, state), state)
        state.length += 1
        if y_B1D.dtype != self.direct.dtype and not torch.is_autocast_enabled(y_B1D.device.type):
            y_B1D = y_B1D.to(self.direct.dtype)
        return project_step(self.out_proj, y_B1D)

    def _short_step(self, p_B1E: Tensor, state: State) -> Tensor:
        """The short convolution of one position, (B, 1, E)."""
        assert state.recent_projections is not None
        bias_E, _, taps = self.short_of(state)
        seen = (*state.recent_projections, p_B1E)
        state.recent_projections = tuple(p.detach() for p in seen[1:]) if p_B1E.requires_grad else seen[1:]
        u_B1E = bias_E
        for p, tap_E in zip(seen, taps, strict=True):
            u_B1E = torch.addcmul(u_B1E, p, tap_E)
        return u_B1E

    def short_of(self, state: State) -> ShortConv:
        """The short convolution that the state goes on with; as it is now where gradients are asked for."""
        if state.short is None or torch.is_grad_enabled():
            dtype = compute_dtype(self.short_weight.dtype)
            weight_KE = self.short_weight.to(dtype).t().contiguous()
            short = ShortConv(self.short_bias.to(dtype), weight_KE, weight_KE.unbind())
            if torch.is_grad_enabled():
                return short
            state.short = short
        return state.short

    def project(self, linear: nn.Module, x_BDL: Tensor) -> Tensor:
        """`linear` at every position, (B, E, L), in the ambient precision."""
        return project(linear, x_BDL)

    def between(self, x_B1D: Tensor, p_B1E: Tensor, state: State) -> Tensor | None:
        """What lies between the projections of a step, (B, 1, D), where the compiled core computes it: the position
        written to the state's histories, but its length not moved. None, and nothing done, where it does not."""

    def _project_out(self, y_BDL: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(y_BDL.device.type):
            y_BDL = y_BDL.to(self.direct.dtype)
        return self.project(self.out_proj, y_BDL).transpose(1, 2)


def _masked(x_BEL: Tensor, mask_BL: Tensor | None) -> Tensor:
    return x_BEL if mask_BL is None else x_BEL * mask_BL[:, None].to(x_BEL.dtype)


def _append_mask(state: State, mask_BL: Tensor | None, x_BLD: Tensor) -> Tensor | None:
    """The mask (B, T) of all positions, of the new ones if the state is not croppable; None while none was given."""
    if not state.croppable:
        return mask_BL
    if mask_BL is None and "mask" not in state.histories:
        return None
    ones_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device)
    if "mask" not in state.histories:
        state.histories["mask"] = ones_BL[:, :1].repeat(1, state.length)
    return state.append("mask", ones_BL if mask_BL is None else mask_BL.bool())


def outside_autocast(device: str) -> Any:
    """No automatic casts; entering that costs as much as a small operation, so only where there are any."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
