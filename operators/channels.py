"""Channel-wise Hyena of any order: gates and long convolutions, channel by channel (Poli et al. 2023, definition 3.1).

The rows of `in_proj` are N + 1 blocks of the inner width: x_0, x_1, .., x_{N-1}, v. The long convolutions use the gates
from the last, x_{N-1}, down to x_1, as safari's code does.

Shapes: as in `hyena`, but D the channels of a convolution, which are as many as the inner width.
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

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__(config, d_model, max_length, inner)
        self.convolutions = config.order - 1
        filters = self.convolutions * self.inner
        self.build((config.order + 1) * self.inner, self.long_filter(filters, self.convolutions), filters)

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
        first_BDL, *gates, y_BDL = u_BEL.chunk(self.config.order + 1, dim=1)
        filters, directs = h_CL.chunk(self.convolutions), self.direct.chunk(self.convolutions)
        for gate_BDL, h_DL, direct_D in zip(reversed(gates), filters, directs, strict=True):
            y_BDL = long_conv_reference(gate_BDL * y_BDL, h_DL, direct_D)
        return first_BDL * y_BDL

    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        """Values are copied; the gates get bias 1 and small random weights, so that they start open."""
        draw_uniform(self.in_proj.weight, GATE_WEIGHT, generator)
        self.in_proj.bias.fill_(1.0)
        self.in_proj.weight[-self.inner :] = attention.value
        self.in_proj.bias[-self.inner :] = attention.bias_of("value")

    def project(self, linear: nn.Module, x_BDL: Tensor) -> Tensor:
        """See `Hyena.project`; for the core one product over all positions of a batch, channels last."""
        if not serves(x_BDL):
            return super().project(linear, x_BDL)
        narrow, x_BLD = self.narrow(linear, x_BDL), x_BDL.transpose(1, 2)
        return (linear(x_BLD) if narrow is None else torch.nn.functional.linear(x_BLD, *narrow)).transpose(1, 2)

    def whole(
        self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters, state: HyenaState | None
    ) -> Tensor:
        """See `Hyena.whole`: one pass, `gated` or the compiled core's."""
        if state is None and accelerated(p_BEL) and takes_by_kernels(p_BEL, self.short_weight):
            return self._one_pass_gpu(p_BEL, mask_BL, filters)
        if isinstance(filters, Tensor):
            return self._one_pass_trained(p_BEL, mask_BL, filters)
        assert state is None or isinstance(state, ChannelState)
        length = p_BEL.shape[-1]
        buffers: Sequence[Tensor] = []
        if state is not None:
            shape = (state.batch, self.inner, length)
            like_BDL = p_BEL.new_empty(shape, dtype=compute_dtype(p_BEL.dtype))
            buffers = state.buffers(like_BDL, self.convolutions)
        pending: Sequence[Tensor | None] = [None] * len(buffers)
        if serves(p_BEL):
            ahead = None
            if isinstance(state, Tiled):
                ahead = open_window(state, length, self.inner, self.convolutions)
            y_BDL = convolve(p_BEL, mask_BL, self.short_weight, self.short_bias, filters, buffers, ahead)
        else:
            beyond = 0 if state is None else state.beyond(length)
            with outside_autocast(p_BEL.device.type):
                convolution = filters.convolution(length, beyond)
                y_BDL, *pending = gated(self._inputs(p_BEL, mask_BL), convolution, buffers, beyond)
        if state is not None:
            for index, (z_BDL, pending_BDW) in enumerate(zip(buffers, pending, strict=True)):
                state.filled(index, self._channels(index), z_BDL, pending_BDW)
        return y_BDL

    def _one_pass_trained(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor) -> Tensor:
        """Outputs (B, D, L) that are differentiable."""
        if serves(p_BEL):
            return convolve_trained(p_BEL, mask_BL, self.short_weight, self.short_bias, h_CL, self.direct)
        each = (self.convolutions, self.inner)
        with outside_autocast(p_BEL.device.type):
            return gated_trained(self._inputs(p_BEL, mask_BL), h_CL.unflatten(0, each), self.direct.unflatten(0, each))

    def _inputs(self, p_BEL: Tensor, mask_BL: Tensor | None) -> Inputs:
        blocks = (self.config.order + 1, self.inner)
        short = (self.short_weight.unflatten(0, blocks), self.short_bias.unflatten(0, blocks))
        return Inputs(p_BEL.unflatten(1, blocks), mask_BL, *short)

    def _one_pass_gpu(self, p_BEL: Tensor, mask_BL: Tensor | None, filters: Tensor | Filters) -> Tensor:
        """Whole sequences by the kernels for accelerators, outputs (B, D, L) in the dtype of the projections."""
        if isinstance(filters, Tensor):
            h_CL = filters + torch.nn.functional.pad(self.direct[:, None], (0, filters.shape[1] - 1))
        else:
            h_CL = filters.first(p_BEL.shape[-1])
        each = (self.convolutions, self.inner)
        with outside_autocast(p_BEL.device.type):
            return gated_by_kernels(*self._inputs(p_BEL, mask_BL), h_CL.float().unflatten(0, each))

    def between(self, x_B1D: Tensor, p_B1E: Tensor, filters: Filters, state: HyenaState) -> Tensor | None:
        if not (isinstance(state, Tiled) and takes(state, x_B1D, p_B1E)):
            return None
        return step(x_B1D, p_B1E, self.short_of(state), filters, state)

    def _channels(self, index: int) -> slice:
        """The filters of a convolution."""
        return slice(index * self.inner, (index + 1) * self.inner)
