"""Channel-wise Hyena of any order: gates and long convolutions, channel by channel (Poli et al. 2023, definition 3.1).

The rows of `in_proj` are N + 1 blocks of width D: x_0, x_1, .., x_{N-1}, v. The long convolutions use the gates from
the last, x_{N-1}, down to x_1, as safari's code does.

Shapes: as in `hyena`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from operators.config import HyenaConfig
from operators.convolution.causal import compute_dtype, long_conv_reference
from operators.convolution.gated import Inputs, gated, gated_trained
from operators.decoding.channelwise import CHANNEL_STATES, ChannelState, Tiled
from operators.decoding.extend import outside_autocast
from operators.decoding.frozen import Filters
from operators.decoding.state import HyenaState
from operators.filters.base import draw_uniform
from operators.gpu import accelerated
from operators.gpu.channels import gated as gated_by_kernels
from operators.gpu.channels import takes as takes_by_kernels
from operators.hyena import Hyena
from operators.native import serves
from operators.native.channels import convolve, convolve_trained
from operators.native.decode import open_window, step, takes
from operators.transfer.attention import AttentionWeights

GATE_WEIGHT = 0.02


class ChannelHyena(Hyena):
    """E = (N + 1) D; `filter` has (N - 1) D filters, one block of D per convolution in order of application, and
    `direct` as many entries. Otherwise as `Hyena`."""

    STATES = CHANNEL_STATES

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int) -> None:
        super().__init__(config, d_model, max_length)
        self.convolutions = config.order - 1
        filters = self.convolutions * d_model
        self.build((config.order + 1) * d_model, filters, self.convolutions, filters)

    def combine(
        self, u_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """See `Hyena.combine`; always with a state, for whole sequences take one pass."""
        assert isinstance(state, ChannelState) and isinstance(filters, Filters)
        if u_BEL.shape[-1] == 1:
            return self.combine_step(u_BEL.transpose(1, 2), filters, state).transpose(1, 2)
        first_BDL, *gates, y_BDL = u_BEL.chunk(self.config.order + 1, dim=1)
        for index, gate_BDL in enumerate(reversed(gates)):
            y_BDL = state.chunk(index, self._channels(index), gate_BDL * y_BDL)
        return first_BDL * y_BDL

    def combine_step(self, u_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor:
        """See `Hyena.combine_step`."""
        assert isinstance(state, ChannelState)
        first_B1D, *gates, y_B1D = u_B1E.chunk(self.config.order + 1, dim=2)
        for index, gate_B1D in enumerate(reversed(gates)):
            y_B1D = state.step(index, self._channels(index), gate_B1D * y_B1D)
        return first_B1D * y_B1D

    def freeze(self) -> Filters:
        """See `Hyena.freeze`; with `direct` at lag 0, where it belongs."""
        return self.filter.freeze(self.direct)

    def step_modes(self) -> tuple[str, ...]:
        """See `Hyena.step_modes`: those of the filter."""
        return self.filter.step_modes

    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        """See `Hyena.combine_reference`."""
        first_BDL, *gates, y_BDL = u_BEL.chunk(self.config.order + 1, dim=1)
        filters, directs = h_CL.chunk(self.convolutions), self.direct.chunk(self.convolutions)
        for gate_BDL, h_DL, direct_D in zip(reversed(gates), filters, directs, strict=True):
            y_BDL = long_conv_reference(gate_BDL * y_BDL, h_DL, direct_D)
        return first_BDL * y_BDL

    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        """Values are copied; the gates get bias 1 and small random weights, so that they start open."""
        draw_uniform(self.in_proj.weight, GATE_WEIGHT, generator)
        self.in_proj.bias.fill_(1.0)
        self.in_proj.weight[-self.d_model :] = attention.value
        self.in_proj.bias[-self.d_model :] = attention.bias_of("value")

    def project(self, linear: nn.Module, x_BDL: Tensor) -> Tensor:
        """See `Hyena.project`; for the core one product over all positions of a batch, channels last."""
        return linear(x_BDL.transpose(1, 2)).transpose(1, 2) if serves(x_BDL) else super().project(linear, x_BDL)

    def whole(
        self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """See `Hyena.whole`: one pass, `gated` or the compiled core's."""
        if state is None and accelerated(p_BEL) and takes_by_kernels(p_BEL, self.short_weight):
            return self._one_pass_gpu(p_BEL, mask_BL, filters)
        if isinstance(filters, Tensor):
            return self._one_pass_trained(p_BEL, mask_BL, filters)
        one_pass = self._one_pass_native if serves(p_BEL) else self._one_pass
        if state is None:
            return one_pass(p_BEL, mask_BL, filters, [], None)[0]
        assert isinstance(state, ChannelState)
        like_BDL = p_BEL.new_empty((state.batch, self.d_model, p_BEL.shape[-1]), dtype=compute_dtype(p_BEL.dtype))
        rooms = state.rooms(like_BDL, self.convolutions)
        y_BDL, *known = one_pass(p_BEL, mask_BL, filters, rooms, state)
        for index, (z_BDL, known_BDW) in enumerate(zip(rooms, known, strict=True)):
            state.filled(index, self._channels(index), z_BDL, known_BDW)
        return y_BDL

    def _one_pass_trained(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor) -> Tensor:
        """Outputs (B, D, L) that are differentiable."""
        if serves(p_BEL):
            return convolve_trained(p_BEL, mask_BL, self.short_weight, self.short_bias, h_CL, self.direct)
        each = (self.convolutions, self.d_model)
        with outside_autocast(p_BEL.device.type):
            return gated_trained(self._inputs(p_BEL, mask_BL), h_CL.unflatten(0, each), self.direct.unflatten(0, each))

    def _inputs(self, p_BEL: Tensor, mask_BL: Tensor | None) -> Inputs:
        blocks = (self.config.order + 1, self.d_model)
        short = (self.short_weight.unflatten(0, blocks), self.short_bias.unflatten(0, blocks))
        return Inputs(p_BEL.unflatten(1, blocks), mask_BL, *short)

    def _one_pass(
        self,
        p_BEL: Tensor,
        mask_BL: Tensor | None,
        filters: Filters,
        rooms: Sequence[Tensor],
        state: ChannelState | None,
    ) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """Outputs (B, D, L) and, for a state, what each convolution adds to those after them as far as that is known;
        what each reads goes to `rooms`."""
        length = p_BEL.shape[-1]
        beyond = 0 if state is None else state.beyond(length)
        with outside_autocast(p_BEL.device.type):
            y_BDL, *known = gated(self._inputs(p_BEL, mask_BL), filters.convolution(length, beyond), rooms, beyond)
        return y_BDL, *known

    def _one_pass_gpu(self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters) -> Tensor:
        """The same without a state by the kernels for accelerators, outputs in the dtype of the projections."""
        if isinstance(filters, Tensor):
            h_CL = filters + torch.nn.functional.pad(self.direct[:, None], (0, filters.shape[1] - 1))
        else:
            h_CL = filters.first(p_BEL.shape[-1])
        each = (self.convolutions, self.d_model)
        with outside_autocast(p_BEL.device.type):
            return gated_by_kernels(*self._inputs(p_BEL, mask_BL), h_CL.float().unflatten(0, each))

    def _one_pass_native(
        self,
        p_BEL: Tensor,
        mask_BL: Tensor | None,
        filters: Filters,
        rooms: Sequence[Tensor],
        state: ChannelState | None,
    ) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """The same by the compiled core, outputs in the dtype of the projections."""
        ahead = None
        if isinstance(state, Tiled):
            ahead = open_window(state, p_BEL.shape[-1], self.d_model, self.convolutions)
        y_BDL = convolve(p_BEL, mask_BL, self.short_weight, self.short_bias, filters, rooms, ahead)
        return y_BDL, *[None] * len(rooms)

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        """See `Hyena.between`."""
        if not (isinstance(state, Tiled) and takes(state, x_B1D, p_B1E)):
            return None
        return step(x_B1D, p_B1E, self.short_of(state), filters, state)

    def _channels(self, index: int) -> slice:
        """The filters of a convolution."""
        return slice(index * self.d_model, (index + 1) * self.d_model)
