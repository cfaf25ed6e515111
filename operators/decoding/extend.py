"""Going on from a state: prefill, chunks and steps of every Hyena.

Prefill is the pass over whole sequences, which fills the state; a chunk convolves history and chunk; a step is a few
operations. States hold no gradients: where these are asked for, the state remembers the inputs and `forward` computes.

Shapes: B batch, n new positions, L positions, T positions seen, D model width (I between the projections, the inner
width), E rows of the projection, K taps, C filters.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig
from operators.convolution.causal import compute_dtype, short_conv
from operators.convolution.projection import project
from operators.decoding.frozen import Filters
from operators.decoding.kept import KeptFilters
from operators.decoding.state import HyenaState, ShortConv
from operators.filters.base import LongFilter
from operators.native import in_use
from operators.native.projection import project_step


class Extending(KeptFilters, ABC):
    """A Hyena's way through its projections, with a state and without one; for parameters see `Hyena`.

    Attributes:
        STATES: the states it can decode from, by mode.
    """

    STATES: ClassVar[Mapping[str, type[HyenaState]]]

    config: HyenaConfig
    d_model: int
    max_length: int
    inner: int
    in_proj: nn.Linear  # or what is wrapped around one
    short_weight: nn.Parameter
    short_bias: nn.Parameter
    filter: LongFilter
    direct: nn.Parameter
    out_proj: nn.Linear

    @abstractmethod
    def combine(
        self, u_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """What lies between the projections, (B, I, L), in u's precision and outside autocast.

        Filters are a tensor (C, L) where they are to be differentiated, which they are without a state only, else
        frozen ones. With a state the positions follow those it has seen.
        """

    def combine_step(self, u_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor:
        """`combine` of one position that is not padded, (B, 1, I)."""
        return self.combine(u_B1E.transpose(1, 2), None, filters, state).transpose(1, 2)

    def whole(
        self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """Whole sequences from their projections on: short convolution and `combine`, (B, I, L); in bfloat16 under
        autocast to that."""
        u_BEL = masked(short_conv(p_BEL, self.short_weight, self.short_bias, narrow=narrowed(p_BEL)), mask_BL)
        with outside_autocast(p_BEL.device.type):
            return self.combine(u_BEL, mask_BL, filters, state)

    def described(self) -> str:
        """What decides how it can decode, in words."""
        return f"with {self.config.filter.kind} filters {'and heads ' if self.config.heads else ''}"

    def step_modes(self) -> tuple[str, ...]:
        """Ways of decoding, keys of `STATES`, the usual one first."""
        return ("direct",)

    def init_state(self, batch: int, mode: str | None = None, *, croppable: bool = True) -> HyenaState:
        """State of `batch` sequences of which nothing was seen.

        Args:
            batch: sequences.
            mode: how to go on position by position, one of `step_modes`, see `STATES`; None for the usual one, which
                gives what `forward` gives but for rounding. Only "modal" of implicit filters, as modes fitted to them,
                does not: `freeze().fitted` has the relative error of every filter.
            croppable: keep the inputs of all positions (D numbers each), from which a crop computes again what it
                needs. Without them the memory of "modal" and "window" is constant, and `crop` goes to 0 only.

        Raises:
            ValueError: a mode that the operator does not have.
        """
        modes = self.step_modes()
        if mode is not None and mode not in modes:
            raise ValueError(
                f"mode must be one of {', '.join(modes)} {self.described()}but is {mode!r}: choose one of these, or "
                "another filter."
            )
        return self.STATES[mode or modes[0]](batch, self.max_length, croppable)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def extend(self, x_BLD: Tensor, state: HyenaState, mask_BL: Tensor | None = None) -> tuple[Tensor, HyenaState]:
        """Process n >= 1 new positions after those the state has seen: prefill, chunked prefill and steps.

        A prefill costs what `forward` costs, a step one pass over the history of heads and a few operations for
        channels, a later chunk a convolution over history and chunk. Of the projections only those that the short
        convolution still sees are kept; after a crop they, and memories of a constant size, are computed again from the
        inputs, which makes it exact. With a history the state is as large as a key-value cache (channel-wise of order
        2; half as large again for heads), without one half as large, or constant if it is not croppable.

        Where gradients are on and a parameter or the input wants them, new positions cost what `forward` of all
        positions costs, and have its gradients, with earlier inputs as constants; of them the state keeps the inputs,
        from which a later call without gradients computes the rest: decode under `torch.no_grad()`.

        Args:
            x_BLD: inputs of the new positions.
            state: from `init_state`; changed in place.
            mask_BL: mask of the new positions, see `forward`.

        Returns:
            Outputs (B, n, D) and the state.

        Raises:
            ValueError: another batch than the state's, no new position, or more than `max_length` in all; or gradients
                after positions of which a state that is not croppable has no inputs.
        """
        batch, new, _ = x_BLD.shape
        state.check(batch, new)
        start, stop = state.length, state.length + new
        if batch == 0:
            state.length = stop
            return self.of_no_sequences(x_BLD), state
        if torch.is_grad_enabled() and (x_BLD.requires_grad or any(p.requires_grad for p in self.parameters())):
            return self._extend_with_gradients(x_BLD, state, mask_BL), state
        if state.behind:
            self._catch_up(state)
        if state.filters is None:
            state.filters = self.frozen()
        if new == 1 and start >= self.config.short_taps and mask_BL is None and state.recent is not None:
            return self._step(x_BLD, state.filters, state), state
        if start == 0:
            p_BEL = masked(self.project(self.in_proj, state.keep_input(x_BLD.transpose(1, 2))), mask_BL)
            state.keep_mask(mask_BL, x_BLD)
            y_BIn = self.whole(p_BEL, mask_BL, state.filters, state)
        else:
            u_BEn, mask_Bn, p_BEL = self._project_onwards(x_BLD, state, mask_BL)
            with outside_autocast(x_BLD.device.type):
                y_BIn = self.combine(u_BEn, mask_Bn, state.filters, state)
        first_kept = max(0, p_BEL.shape[-1] - self.config.short_taps + 1)
        state.recent = tuple(p_BE[:, None].clone() for p_BE in p_BEL[..., first_kept:].unbind(2))
        state.length = stop
        if new > 1:
            state.mark()
        return self.project_out(y_BIn), state

    def of_no_sequences(self, x_0LD: Tensor) -> Tensor:
        """(0, L, D), with gradients of zero for every parameter as torch's own layers give them."""
        nothing = torch.stack([parameter.float().sum() for parameter in self.parameters()]).sum()
        inner_0LI = x_0LD[..., :1].expand(-1, -1, self.inner)
        return cast(Tensor, self.out_proj(inner_0LI)) + 0 * nothing

    def project(self, linear: nn.Module, x_BDL: Tensor) -> Tensor:
        """`linear` at every position, (B, E, L), in the ambient precision."""
        return project(linear, x_BDL, self.narrow(linear, x_BDL))

    def project_step(self, linear: nn.Module, x_B1D: Tensor) -> Tensor:
        """`linear` of one position, (B, 1, E)."""
        narrow = self.narrow(linear, x_B1D)
        return project_step(linear, x_B1D) if narrow is None else torch.nn.functional.linear(x_B1D, *narrow)

    def project_out(self, y_BIL: Tensor) -> Tensor:
        """The last projection of (B, I, L), (B, L, D)."""
        if not torch.is_autocast_enabled(y_BIL.device.type):
            y_BIL = y_BIL.to(self.direct.dtype)
        return self.project(self.out_proj, y_BIL).transpose(1, 2)

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        """What lies between the projections of a step, (B, 1, I), where the compiled core computes it: the position
        written to the state's histories, but its length not moved. None, and nothing done, where it does not."""

    def _extend_with_gradients(self, x_BnD: Tensor, state: HyenaState, mask_Bn: Tensor | None) -> Tensor:
        """`extend` as the end of `forward` over all positions; the state falls behind by the new ones."""
        start, x_BTD = state.length, x_BnD
        if not state.croppable and start > 0:
            raise ValueError(
                "gradients after the first call need the inputs of all positions, and this state keeps none: decode "
                "under torch.no_grad(), or make the state with croppable=True."
            )
        if not state.croppable:
            with torch.no_grad():
                self.extend(x_BnD, state, mask_Bn)
            return self(x_BnD, mask_Bn)  # type: ignore[no-any-return]
        if start > 0:
            x_BTD = torch.cat([state.inputs.first(start).transpose(1, 2), x_BnD], dim=1)
        state.inputs.write(start, x_BnD.transpose(1, 2))
        mask_BT = state.keep_mask(mask_Bn, x_BnD)
        state.length += x_BnD.shape[1]
        state.behind += x_BnD.shape[1]
        return self(x_BTD, None if mask_BT is None else mask_BT.clone())[:, start:]  # type: ignore[no-any-return]

    def _project_onwards(
        self, x_BLD: Tensor, state: HyenaState, mask_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Projection and short convolution (B, E, n) after the state's positions, zero at padded ones; their mask; and
        the projections that the short convolution saw."""
        start, x_BDn = state.length, x_BLD.transpose(1, 2)
        before = min(start, self.config.short_taps - 1)
        seen_BDT = state.keep_input(x_BDn)
        mask_BT = state.keep_mask(mask_BL, x_BLD)
        if state.recent is None:
            mask_window = None if mask_BT is None else mask_BT[:, start - before :]
            p_BEL = masked(self.project(self.in_proj, seen_BDT[..., start - before :]), mask_window)
        else:
            p_BEn = masked(self.project(self.in_proj, x_BDn), mask_BL)
            p_BEL = torch.cat([*(p_B1E.transpose(1, 2) for p_B1E in state.recent), p_BEn], dim=-1)
        mask_Bn = None if mask_BT is None else mask_BT[:, -x_BDn.shape[-1] :]
        u_BEn = short_conv(p_BEL, self.short_weight, self.short_bias)[..., before:]
        return masked(u_BEn, mask_Bn), mask_Bn, p_BEL

    @torch.no_grad()
    def _catch_up(self, state: HyenaState) -> None:
        """Compute what the state lacks, from its inputs: what a crop or a call with gradients has left it without."""
        first, stop = state.length - state.behind, state.length
        x_BLD = state.inputs.first(stop)[..., first:].transpose(1, 2).clone()
        mask_BT = None if state.mask is None else state.mask.first(stop)[:, first:].clone()
        state.length, state.behind = first, 0
        self.extend(x_BLD, state, mask_BT)

    def _step(self, x_B1D: Tensor, filters: Filters, state: HyenaState) -> Tensor:
        """`extend` by one position that is not padded, after as many as the short convolution sees: few operations."""
        state.keep_mask(None, x_B1D)
        p_B1E = self.project_step(self.in_proj, x_B1D)
        y_B1I = self.between(x_B1D, p_B1E, filters, state) if in_use() else None
        if y_B1I is None:
            if state.croppable:
                state.inputs.write(state.length, x_B1D.transpose(1, 2))
            with outside_autocast(x_B1D.device.type):
                y_B1I = self.combine_step(self._short_step(p_B1E, state), filters, state)
        state.length += 1
        if y_B1I.dtype != self.direct.dtype and not torch.is_autocast_enabled(y_B1I.device.type):
            y_B1I = y_B1I.to(self.direct.dtype)
        return self.project_step(self.out_proj, y_B1I)

    def _short_step(self, p_B1E: Tensor, state: HyenaState) -> Tensor:
        """The short convolution of one position, (B, 1, E)."""
        assert state.recent is not None
        short, seen = self.short_of(state), (*state.recent, p_B1E)
        state.recent = seen[1:]
        u_B1E = short.bias_E
        for p, tap_E in zip(seen, short.taps, strict=True):
            u_B1E = torch.addcmul(u_B1E, p, tap_E)
        return u_B1E

    def short_of(self, state: HyenaState) -> ShortConv:
        """The short convolution that the state goes on with."""
        if state.short is None:
            dtype = compute_dtype(self.short_weight.dtype)
            weight_KE = self.short_weight.detach().to(dtype).t().contiguous()
            state.short = ShortConv(self.short_bias.detach().to(dtype), weight_KE)
        return state.short


def masked(x_BEL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Zero at padded positions."""
    return x_BEL if mask_BL is None else x_BEL * mask_BL[:, None].to(x_BEL.dtype)


def narrowed(p_BEL: Tensor) -> bool:
    """Whether projections are in bfloat16 since autocast made them so."""
    return p_BEL.dtype == torch.bfloat16 and torch.is_autocast_enabled(p_BEL.device.type)


def outside_autocast(device: str) -> Any:
    """No automatic casts; entering that costs as much as a small operation, so only where there are any."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
