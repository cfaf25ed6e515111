"""Decoding by the core: one call for all that lies between the projections of a position.

Channel-wise, a window of outputs to come holds what the history adds to them. It opens with the prompt, whose
convolution computes it along with the outputs, up to the next power of two that leaves room for a quarter of the text.
It opens anew where it ends or where something else than a step came between. Inside, the work of every step is bounded
(`step.h`).

Heads read their history of keys and values as in torch, or go through their memory of modes once. With a window their
step has the near positions in it, and so has that of a window alone; queries and keys that are normed, and texts that
are padded, are left to torch.

Shapes: B batch, E rows of the projection, D model width, I inner width, H heads, L lags, N convolutions, P channels in
whole vectors, S modes, T positions with the new one, W positions of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from operators.decoding.channelwise import CoreTables, CoreWindow, Tiled
from operators.decoding.frozen import Filters
from operators.decoding.history import History
from operators.decoding.multihead import HeadMemory, KeysAndValues, NearHistory, NearMemory, WindowMemory
from operators.decoding.state import HyenaState, ShortConv
from operators.native import LONGEST, serves
from operators.native.channels import spectra_of, transform_size

LANES, NEAR, LEAST_ROOM = 16, 32, 64


def open_window(state: Tiled, seen: int, channels: int, convolutions: int) -> Tensor | None:
    """Room for what `seen` positions add to those behind, (B, N, W, P), to be filled; None where none can follow, or
    none that the core computes."""
    if state.max_length > LONGEST:
        return None
    room = max(LEAST_ROOM, seen // 4)
    stop = min(transform_size(min(seen + room, state.max_length)), state.max_length)
    if stop == seen:
        return None
    padded = -(-channels // LANES) * LANES
    state.core = CoreWindow(torch.empty(state.batch, convolutions, stop - seen, padded), seen, seen)
    return state.core.sums


def step(x_B1D: Tensor, p_B1E: Tensor, short: ShortConv, filters: Filters, state: Tiled) -> Tensor:
    """Outputs (B, 1, I) before the last projection at the state's next position, in the dtype of projections `p`.

    Writes the position to the state's histories but does not move its length.
    """
    width, position = p_B1E.shape[-1] // (len(state.gated) + 2), state.length
    histories = _buffers(state.inputs, *state.gated, position=position)
    core = state.core
    if core is None or core.position != position or position == core.first + core.sums.shape[2]:
        open_window(state, position, width, len(state.gated))
        assert state.core is not None
        core = state.core
        spectra = spectra_of(filters, width, position + core.sums.shape[2])
        torch.ops.layerswap.fold(histories[1:], position, spectra, core.sums)
    tables = _tables(filters, width, core.first + core.sums.shape[2], state)
    weights = (short.weight_KE, short.bias_E, tables.h_CL, tables.near, tables.spectra, tables.ready)
    y_B1D = torch.ops.layerswap.step(
        p_B1E, _recent(state, p_B1E), *weights, x_B1D.contiguous(), histories, core.sums, position, core.first
    )
    core.position = position + 1
    return cast(Tensor, y_B1D)


def step_heads(
    x_B1D: Tensor, p_B1E: Tensor, short: ShortConv, direct_D: Tensor, state: KeysAndValues, **how: Any
) -> Tensor:
    """`step` of heads; `how` are the last arguments of the core's `heads_step`."""
    assert state.filters is not None
    weights = (short.weight_KE, short.bias_E, state.filters.reversed(state.length + 1), direct_D.detach().float())
    histories = _buffers(state.inputs, state.keys, state.values, position=state.length)
    inputs = (x_B1D.contiguous(), histories, state.length)
    return cast(Tensor, torch.ops.layerswap.heads_step(p_B1E, _recent(state, p_B1E), *weights, *inputs, **how))


def step_modal_heads(
    x_B1D: Tensor,
    p_B1E: Tensor,
    short: ShortConv,
    modes: tuple[Tensor, Tensor],
    direct_D: Tensor,
    state: HeadMemory,
    **how: Any,
) -> Tensor:
    """`step` of heads whose filters are sums of modes, of these decays and residues, (H, S) each."""
    weights = (short.weight_KE, short.bias_E, *modes, direct_D.detach().float())
    memory_BHSKV = state.memory[0] = state.memory[0].contiguous()
    inputs = (x_B1D.contiguous(), *_buffers(state.inputs, position=state.length), memory_BHSKV, state.length)
    return cast(Tensor, torch.ops.layerswap.heads_modal_step(p_B1E, _recent(state, p_B1E), *weights, *inputs, **how))


def step_window_heads(
    x_B1D: Tensor,
    p_B1E: Tensor,
    short: ShortConv,
    near: Sequence[Tensor],
    direct_D: Tensor,
    state: NearHistory,
    **how: Any,
) -> Tensor:
    """`step_heads` with near positions; `near` are frequencies, the level's key and shift, and where queries and keys
    are tied the centre."""
    assert state.filters is not None
    weights = (short.weight_KE, short.bias_E, state.filters.reversed(state.length + 1), direct_D.detach().float())
    every = (state.inputs, state.keys, state.values, state.near_keys, state.near_values)
    inputs = (x_B1D.contiguous(), _buffers(*every, position=state.length))
    parts = [part.detach().float() for part in near]
    given = (p_B1E, _recent(state, p_B1E), *weights, *inputs, parts, state.length)
    return cast(Tensor, torch.ops.layerswap.heads_window_step(*given, **how))


def step_modal_window_heads(
    x_B1D: Tensor,
    p_B1E: Tensor,
    short: ShortConv,
    modes: tuple[Tensor, Tensor],
    near: Sequence[Tensor],
    direct_D: Tensor,
    state: NearMemory,
    **how: Any,
) -> Tensor:
    """`step_window_heads` of squared features and filters that are sums of modes, of these decays and residues."""
    weights = (short.weight_KE, short.bias_E, *modes, direct_D.detach().float())
    state.memory[1:] = memory = [part.contiguous() for part in state.memory[1:]]
    inputs = (x_B1D.contiguous(), *_buffers(state.inputs, position=state.length), memory)
    given = (p_B1E, _recent(state, p_B1E), *weights, *inputs, [part.detach().float() for part in near])
    return cast(Tensor, torch.ops.layerswap.window_modal_step(*given, position=state.length, **how))


def step_window(
    x_B1D: Tensor,
    p_B1E: Tensor,
    short: ShortConv,
    frequencies_P: Tensor,
    direct_D: Tensor,
    state: WindowMemory,
    heads: int,
) -> Tensor:
    """`step` of a window alone."""
    weights = (short.weight_KE, short.bias_E, direct_D.detach().float())
    state.memory[1:5] = memory = [part.contiguous() for part in state.memory[1:5]]
    inputs = (x_B1D.contiguous(), *_buffers(state.inputs, position=state.length), memory)
    given = (p_B1E, _recent(state, p_B1E), *weights, *inputs, frequencies_P.detach().float(), heads, state.length)
    return cast(Tensor, torch.ops.layerswap.window_step(*given))


def takes(state: HyenaState, x_B1D: Tensor, p_B1E: Tensor) -> bool:
    """Whether the core computes this step: it wants histories in float32, which keys and values of heads are not that
    were seen under autocast."""
    if not (serves(p_B1E) and state.croppable and state.max_length <= LONGEST):
        return False
    keys = state.keys.buffer if isinstance(state, KeysAndValues) else None
    if isinstance(state, NearHistory) and state.padding_B is not None:
        return False
    if isinstance(state, WindowMemory):
        keys = None if state.padded or not state.memory else state.memory[1]
        if keys is None or any(part.dtype != torch.float32 for part in state.memory[1:]):
            return False
    inputs = state.inputs.buffer
    return inputs is not None and inputs.dtype == x_B1D.dtype and (keys is None or keys.dtype == torch.float32)


def _buffers(*histories: History, position: int) -> list[Tensor]:
    """Buffers that have room for this position."""
    for history in histories:
        if history.buffer is not None and history.buffer.shape[-1] <= position:
            history.reserve(position, history.buffer[..., :1])
    return [history.buffer for history in histories if history.buffer is not None]


def _recent(state: HyenaState, p_B1E: Tensor) -> tuple[Tensor, ...]:
    """The projections before `p`, which is the newest from now on."""
    assert state.recent is not None
    recent = state.recent
    state.recent = (*recent, p_B1E)[1:]
    return recent


def _tables(filters: Filters, width: int, stop: int, state: Tiled) -> CoreTables:
    """The first lags (N, NEAR, P), and room for the spectra of longer ones, which the core fills as it needs them; of
    filters that reach `stop` positions."""
    tables, h_CL = state.tables, filters.covering(stop)
    if tables is None or tables.h_CL is not h_CL:
        convolutions, blocks, lags = h_CL.shape[0] // width, -(-width // LANES), h_CL.shape[1]
        each = [filters.first_lags(slice(i * width, (i + 1) * width), NEAR) for i in range(convolutions)]
        near = torch.nn.functional.pad(torch.stack(each), (0, blocks * LANES - width))
        levels = max(0, (lags - 1).bit_length() - NEAR.bit_length() + 1)
        spectra = h_CL.new_empty(convolutions * blocks, NEAR * (2**levels - 1), 2, LANES)
        ready = torch.zeros(levels, convolutions * blocks, dtype=torch.uint8)
        tables = state.tables = CoreTables(h_CL, near, spectra, ready)
    return tables
