"""Channel-wise Hyena of any order: gates and long convolutions, channel by channel (Poli et al. 2023, definition 3.1).

The rows of `in_proj` are N + 1 blocks of width D: x_0, x_1, .., x_{N-1}, v. The long convolutions use the gates from
the last, x_{N-1}, down to x_1, as safari's code does.

Shapes: as in `hyena`.
"""

import torch
from torch import Tensor

from operators.ahead import FIRST_WINDOW, Ahead
from operators.config import HyenaConfig
from operators.convolution import compute_dtype, long_conv, long_conv_reference
from operators.decode import Filters
from operators.filters import draw_uniform
from operators.gated import Inputs, gated, gated_trained
from operators.hyena import Hyena, outside_autocast
from operators.state import State
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
        step = h_CT is None and u_BEL.shape[-1] == 1
        for index, gate_BDL in enumerate(reversed(gates)):
            if step:
                assert state is not None
                y_BDL = self._convolve_step(gate_BDL * y_BDL, index, state)
            else:
                y_BDL = self._convolve(gate_BDL * y_BDL, index, h_CT, state)
        return first_BDL * y_BDL

    def frozen(self) -> Filters:
        """The filters with `direct` at lag 0, where it belongs."""
        return self.filter.frozen(self.direct)

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
        """See `Hyena.whole`: one pass (`gated`), which tells a state what the prompt adds to the outputs after it."""
        batch, _, length = p_BEL.shape
        blocks = (self.config.order + 1, self.d_model)
        inputs = Inputs(
            p_BEL.unflatten(1, blocks),
            mask_BL,
            self.short_weight.unflatten(0, blocks),
            self.short_bias.unflatten(0, blocks),
        )
        like_BDL = p_BEL.new_empty((batch, self.d_model, length), dtype=compute_dtype(p_BEL.dtype))
        histories = [] if state is None else [state.room(f"gated_{i}", like_BDL) for i in range(self.convolutions)]
        with outside_autocast(p_BEL.device.type):
            if h_CL is not None:
                h_NDL, direct_ND = (part.unflatten(0, (self.convolutions, -1)) for part in (h_CL, self.direct))
                return gated_trained(inputs, h_NDL, direct_ND, histories)
            beyond = 0 if state is None else min(max(FIRST_WINDOW, length // 4), self.max_length - length)
            spectrum_CF = self.frozen().spectrum(length, beyond)
            y_BDL, *known = gated(inputs, spectrum_CF.unflatten(0, (self.convolutions, -1)), histories, beyond)
            for index, known_BDW in enumerate(known):
                assert state is not None
                self._look_ahead(index, histories[index], state, known_BDW)
            return y_BDL

    def _convolve(self, z_BDL: Tensor, index: int, h_CT: Tensor | None, state: State | None) -> Tensor:
        """Long convolution number `index` at the new positions."""
        channels = slice(index * self.d_model, (index + 1) * self.d_model)
        past_BDT = z_BDL if state is None else state.append(f"gated_{index}", z_BDL)
        if h_CT is not None:
            return long_conv(past_BDT, h_CT[channels], self.direct[channels])
        assert state is not None
        assert state.filters is not None
        h_DT = state.filters.h_CL[channels, : past_BDT.shape[-1]]
        return long_conv(past_BDT, h_DT, torch.zeros_like(h_DT[:, 0]))[..., -z_BDL.shape[-1] :]

    def _convolve_step(self, z_BD1: Tensor, index: int, state: State) -> Tensor:
        """The same at one position, from what was added up ahead."""
        name = f"gated_{index}"
        past_BDT, ahead = state.append(name, z_BD1), state.ahead.get(name)
        if ahead is None or ahead.position != state.length:
            ahead = self._look_ahead(index, past_BDT[..., :-1], state)
        return ahead.step(z_BD1, past_BDT)

    def _look_ahead(self, index: int, past_BDT: Tensor, state: State, known_BDW: Tensor | None = None) -> Ahead:
        assert state.filters is not None
        channels = slice(index * self.d_model, (index + 1) * self.d_model)
        ahead = state.ahead[f"gated_{index}"] = Ahead(state.filters, channels, past_BDT, known_BDW)
        return ahead
