"""Channel-wise Hyena of any order: gates and long convolutions, channel by channel (Poli et al. 2023, definition 3.1).

The rows of `in_proj` are N + 1 blocks of width D: x_0, x_1, .., x_{N-1}, v. The long convolutions use the gates from
the last, x_{N-1}, down to x_1, as safari's code does.

Shapes: as in `hyena`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from operators.config import HyenaConfig
from operators.convolution import add_taps, blocks_of, compute_dtype, long_conv_reference
from operators.decode import Filters
from operators.filters import draw_uniform
from operators.hyena import Hyena, outside_autocast
from operators.state import State
from operators.steps import STEP_MODES
from operators.transfer import AttentionWeights

GATE_WEIGHT = 0.02


class ChannelHyena(Hyena):
    """E = (N + 1) D; `filter` has (N - 1) D filters, one block of D per convolution in order of application, and
    `direct` as many entries. Otherwise as `Hyena`."""

    def __init__(self, config: HyenaConfig, d_model: int, max_length: int) -> None:
        super().__init__(config, d_model, max_length)
        self.convolutions = config.order - 1
        filters = self.convolutions * d_model
        self.build((config.order + 1) * d_model, filters, self.convolutions, filters)

    def combine(self, u_BEL: Tensor, mask_BL: Tensor | None, h_CT: Tensor | None, state: State | None) -> Tensor:
        """See `Hyena.combine`."""
        first_BDL, *gates, y_BDL = u_BEL.chunk(self.config.order + 1, dim=1)
        for index, gate_BDL in enumerate(reversed(gates)):
            y_BDL = self._convolve(gate_BDL * y_BDL, index, h_CT, state)
        return first_BDL * y_BDL

    def frozen(self) -> Filters:
        """The filters with `direct` at lag 0, where it belongs."""
        return self.filter.frozen(self.direct)

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

    def whole(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor | None, state: State | None) -> Tensor:
        """See `Hyena.whole`; without gradients all that happens to a block of channels happens while it is in the
        cache."""
        if h_CL is not None:
            return super().whole(p_BEL, mask_BL, h_CL, state)
        batch, _, length = p_BEL.shape
        blocks = (self.config.order + 1, self.d_model)
        p_BPDL, weight_PDK = p_BEL.unflatten(1, blocks), self.short_weight.unflatten(0, blocks)
        bias_PD, filters = self.short_bias.unflatten(0, blocks), self.frozen()
        convolve = filters.convolution(length)
        y_BDL = p_BEL.new_empty((batch, self.d_model, length), dtype=compute_dtype(p_BEL.dtype))
        names = [] if state is None else [f"gated_{i}" for i in range(self.convolutions)]
        histories = [STEP_MODES[state.mode].room(state, name, y_BDL) for name in names] if state is not None else []
        with outside_autocast(p_BEL.device.type):
            for block in blocks_of(self.d_model, batch * length):
                inputs_BPDL, taps_PDK = p_BPDL[:, :, block].to(y_BDL.dtype), weight_PDK[:, block].to(y_BDL.dtype)
                u_BPDL = add_taps(inputs_BPDL, taps_PDK, bias_PD[:, block])
                if mask_BL is not None:
                    u_BPDL *= mask_BL[:, None, None].to(u_BPDL.dtype)
                self._convolve_block(u_BPDL, block, convolve, histories, y_BDL)
            if state is not None:
                for index, (name, z_BDL) in enumerate(zip(names, histories, strict=True)):
                    STEP_MODES[state.mode].filled(filters, state, name, self._channels(index), z_BDL)
        return y_BDL

    def _convolve_block(
        self,
        u_BPDL: Tensor,
        block: slice,
        convolve: Callable[[Tensor, slice], Tensor],
        histories: list[Tensor],
        y_BDL: Tensor,
    ) -> None:
        y = u_BPDL[:, -1]
        for index in range(self.convolutions):
            z = u_BPDL[:, -2 - index] * y
            if histories:
                histories[index][:, block] = z
            y = convolve(z, slice(index * self.d_model + block.start, index * self.d_model + block.stop))
        torch.mul(u_BPDL[:, 0], y, out=y_BDL[:, block])

    def _convolve(self, z_BDL: Tensor, index: int, h_CT: Tensor | None, state: State | None) -> Tensor:
        """Long convolution number `index` at the new positions; with `h_CT` they are the first."""
        name, channels = f"gated_{index}", self._channels(index)
        if h_CT is not None:
            if state is not None:
                mode = STEP_MODES[state.mode]
                written_BDL = mode.room(state, name, z_BDL).copy_(z_BDL.detach())
                if mode.constant:
                    mode.filled(self.frozen(), state, name, channels, written_BDL)
            return self.filter.convolve(z_BDL, h_CT[channels], self.direct[channels])
        assert state is not None
        assert state.filters is not None
        mode = STEP_MODES[state.mode]
        go_on = mode.step if z_BDL.shape[-1] == 1 else mode.chunk
        return go_on(state.filters, state, name, channels, z_BDL)

    def _channels(self, index: int) -> slice:
        return slice(index * self.d_model, (index + 1) * self.d_model)
