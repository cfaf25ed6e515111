"""Channel-wise Hyena of any order: gates and long convolutions, channel by channel (Poli et al. 2023, definition 3.1).

The rows of `in_proj` are N + 1 blocks of width D: x_0, x_1, .., x_{N-1}, v. The long convolutions use the gates from
the last, x_{N-1}, down to x_1, as safari's code does.

Shapes: as in `hyena`.
"""

import torch
from torch import Tensor, nn

from operators import native
from operators.config import HyenaConfig
from operators.convolution import add_taps, blocks_of, compute_dtype, fft_size, long_conv, long_conv_reference
from operators.decode import Filters
from operators.filters import draw_uniform
from operators.hyena import Hyena, outside_autocast
from operators.native.channels import convolve, convolve_trained
from operators.native.decode import open_window, reserve, step, takes
from operators.native.projection import project
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
        opened = state is not None and step and state.open_window()
        for index, gate_BDL in enumerate(reversed(gates)):
            if step:
                assert state is not None
                y_BDL = self._convolve_step(gate_BDL * y_BDL, index, state, opened)
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

    def project(self, linear: nn.Linear, x_BDL: Tensor) -> Tensor:
        """See `Hyena.project`; the core has channels last."""
        return project(linear, x_BDL) if native.serves(x_BDL) else super().project(linear, x_BDL)

    def whole(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor | None, state: State | None) -> Tensor:
        """See `Hyena.whole`; without gradients all that happens to a block of channels happens while it is in the
        cache."""
        if native.serves(p_BEL):
            return self._whole_native(p_BEL, mask_BL, h_CL, state)
        if h_CL is not None:
            return super().whole(p_BEL, mask_BL, h_CL, state)
        batch, _, length = p_BEL.shape
        blocks = (self.config.order + 1, self.d_model)
        p_BPDL, weight_PDK = p_BEL.unflatten(1, blocks), self.short_weight.unflatten(0, blocks)
        bias_PD, spectrum_CF = self.short_bias.unflatten(0, blocks), self.frozen().spectrum(length)
        y_BDL = p_BEL.new_empty((batch, self.d_model, length), dtype=compute_dtype(p_BEL.dtype))
        histories = [] if state is None else [state.room(f"gated_{i}", y_BDL) for i in range(self.convolutions)]
        with outside_autocast(p_BEL.device.type):
            for block in blocks_of(self.d_model, batch * length):
                inputs_BPDL, taps_PDK = p_BPDL[:, :, block].to(y_BDL.dtype), weight_PDK[:, block].to(y_BDL.dtype)
                u_BPDL = add_taps(inputs_BPDL, taps_PDK, bias_PD[:, block])
                if mask_BL is not None:
                    u_BPDL *= mask_BL[:, None, None].to(u_BPDL.dtype)
                self._convolve_block(u_BPDL, block, spectrum_CF, histories, y_BDL)
        return y_BDL

    def _whole_native(self, p_BEL: Tensor, mask_BL: Tensor | None, h_CL: Tensor | None, state: State | None) -> Tensor:
        """`whole` through the compiled core, in the dtype of the projections."""
        rooms, ahead, inputs = [], None, (p_BEL, mask_BL, self.short_weight, self.short_bias)
        if state is not None:
            like_BDL = p_BEL.new_empty((p_BEL.shape[0], self.d_model, p_BEL.shape[-1]), dtype=torch.float32)
            rooms = [state.room(f"gated_{i}", like_BDL) for i in range(self.convolutions)]
        if h_CL is None:
            if state is not None:
                ahead = open_window(state, p_BEL.shape[-1], self.d_model, self.convolutions)
            return convolve(*inputs, self.frozen(), rooms, ahead)
        return convolve_trained(*inputs, h_CL, self.direct, rooms)

    def reserve(self, x_BLD: Tensor, state: State) -> None:
        """See `Hyena.reserve`."""
        if native.serves(x_BLD.transpose(1, 2)) and not torch.is_grad_enabled() and not state.histories:
            reserve(state, x_BLD, self.convolutions)

    def between(self, x_B1D: Tensor, p_B1E: Tensor, state: State) -> Tensor | None:
        """See `Hyena.between`."""
        if not takes(state, x_B1D, p_B1E):
            return None
        assert state.filters is not None
        return step(x_B1D, p_B1E, self.short_weight, self.short_bias, state.filters, state)

    def _convolve_block(
        self, u_BPDL: Tensor, block: slice, spectrum_CF: Tensor, histories: list[Tensor], y_BDL: Tensor
    ) -> None:
        length = u_BPDL.shape[-1]
        size = fft_size(2 * length - 1)
        y = u_BPDL[:, -1]
        for index in range(self.convolutions):
            z = u_BPDL[:, -2 - index] * y
            if histories:
                histories[index][:, block] = z
            filters = slice(index * self.d_model + block.start, index * self.d_model + block.stop)
            spectrum = torch.fft.rfft(z, size)
            spectrum *= spectrum_CF[filters]
            y = torch.fft.irfft(spectrum, size)[..., :length]
        torch.mul(u_BPDL[:, 0], y, out=y_BDL[:, block])

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

    def _convolve_step(self, z_BD1: Tensor, index: int, state: State, opened: bool) -> Tensor:
        """The same at one position, from what was added up ahead (`decode`)."""
        name, channels = f"gated_{index}", slice(index * self.d_model, (index + 1) * self.d_model)
        assert state.filters is not None
        past_BDT = state.append(name, z_BD1)
        start, stop = state.window
        if opened:
            state.ahead[name] = state.filters.fold(channels, past_BDT[..., :-1], stop - start)
        ahead_BDW, place = state.ahead[name], state.length - start
        y_BD1 = torch.addcmul(ahead_BDW.narrow(2, place, 1), z_BD1, state.filters.now(channels))
        if place + 1 < stop - start:
            state.filters.add_tile(channels, past_BDT, ahead_BDW, place + 1)
        return y_BD1
