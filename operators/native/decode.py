"""Decoding by the core: one call for all that lies between the projections of a position.

Channel-wise, a window of outputs to come holds what the history adds to them. It opens with the prompt, whose
convolution computes it along with the outputs, up to the next power of two that leaves room for a quarter of the text.
It opens anew where it ends or where something else than a step came between. Inside, the work of every step is bounded
(`step.h`).

Heads read their history of keys and values as in torch, or go through their memory of modes once.

Shapes: B batch, E rows of the projection, D model width, H heads, L lags, N convolutions, P channels in whole vectors,
S modes, T positions with the new one, W positions of the window.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from operators.decoding.frozen import Filters
from operators.decoding.state import CoreWindow, ShortConv, State
from operators.native import LONGEST, serves
from operators.native.channels import spectra_of, transform_size

LANES, NEAR, LEAST_ROOM = 16, 32, 64


def open_window(state: State, seen: int, channels: int, convolutions: int) -> Tensor | None:
    """Room for what `seen` positions add to those behind, (B, N, W, P), to be filled; None where none can follow."""
    room = max(LEAST_ROOM, seen // 4)
    stop = min(transform_size(min(seen + room, state.max_length)), state.max_length)
    if stop == seen:
        return None
    padded = -(-channels // LANES) * LANES
    state.core = CoreWindow(torch.empty(state.batch, convolutions, stop - seen, padded), seen, seen)
    return state.core.sums


def step(x_B1D: Tensor, p_B1E: Tensor, short: ShortConv, filters: Filters, state: State) -> Tensor:
    """Outputs (B, 1, D) before the last projection at the state's next position, in the dtype of projections `p`.

    Writes the position to the state's histories but does not move its length.
    """
    width, position = x_B1D.shape[-1], state.length
    histories = _histories(state, ["input", *(f"gated_{i}" for i in range(filters.h_CL.shape[0] // width))])
    core = state.core
    if core is None or core.position != position or position == core.first + core.sums.shape[2]:
        open_window(state, position, width, len(histories) - 1)
        assert state.core is not None
        core = state.core
        spectra = spectra_of(filters, width, position + core.sums.shape[2])
        torch.ops.layerswap.fold(histories[1:], position, spectra, core.sums)
    weights = (short.weight_KE, short.bias_E, filters.h_CL, *_tables(filters, width))
    y_B1D = torch.ops.layerswap.step(
        p_B1E, _recent(state, p_B1E), *weights, x_B1D.contiguous(), histories, core.sums, position, core.first
    )
    core.position = position + 1
    return cast(Tensor, y_B1D)


def step_heads(x_B1D: Tensor, p_B1E: Tensor, short: ShortConv, direct_D: Tensor, state: State, **how: Any) -> Tensor:
    """`step` of heads; `how` are the last arguments of the core's `heads_step`."""
    assert state.filters is not None
    weights = (short.weight_KE, short.bias_E, state.filters.reversed(state.length + 1), direct_D.float())
    inputs = (x_B1D.contiguous(), _histories(state, ["input", "key", "value"]), state.length)
    return cast(Tensor, torch.ops.layerswap.heads_step(p_B1E, _recent(state, p_B1E), *weights, *inputs, **how))


def step_modal_heads(
    x_B1D: Tensor,
    p_B1E: Tensor,
    short: ShortConv,
    modes: tuple[Tensor, Tensor],
    direct_D: Tensor,
    state: State,
    **how: Any,
) -> Tensor:
    """`step` of heads whose filters are sums of modes, of these decays and residues, (H, S) each."""
    weights = (short.weight_KE, short.bias_E, *modes, direct_D.float())
    memory_BHSKV = state.memory["heads"] = state.memory["heads"].contiguous()
    inputs = (x_B1D.contiguous(), *_histories(state, ["input"]), memory_BHSKV, state.length)
    return cast(Tensor, torch.ops.layerswap.heads_modal_step(p_B1E, _recent(state, p_B1E), *weights, *inputs, **how))


def takes(state: State, x_B1D: Tensor, p_B1E: Tensor) -> bool:
    """Whether the core computes this step: none that anybody differentiates."""
    if torch.is_grad_enabled() or not (serves(p_B1E) and state.croppable and state.max_length <= LONGEST):
        return False
    return state.histories["input"].dtype == x_B1D.dtype


def _histories(state: State, names: list[str]) -> list[Tensor]:
    """Buffers that have room for the next position."""
    for name in names:
        if state.histories[name].shape[-1] <= state.length:
            state.room(name, state.histories[name][..., :1])
    return [state.histories[name] for name in names]


def _recent(state: State, p_B1E: Tensor) -> tuple[Tensor, ...]:
    """The projections before `p`, which is the newest from now on."""
    assert state.recent_projections is not None
    recent = state.recent_projections
    state.recent_projections = (*recent, p_B1E)[1:]
    return recent


def _tables(filters: Filters, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first lags (N, NEAR, P), and room for the spectra of longer ones, which the core fills as it needs them."""
    if "step" not in filters.native:
        h_CL = filters.h_CL
        convolutions, blocks, lags = h_CL.shape[0] // width, -(-width // LANES), h_CL.shape[1]
        each = [filters.first_lags(slice(i * width, (i + 1) * width), NEAR) for i in range(convolutions)]
        near = torch.nn.functional.pad(torch.stack(each), (0, blocks * LANES - width))
        levels = max(0, (lags - 1).bit_length() - NEAR.bit_length() + 1)
        spectra = h_CL.new_empty(convolutions * blocks, NEAR * (2**levels - 1), 2, LANES)
        ready = torch.zeros(levels, convolutions * blocks, dtype=torch.uint8)
        filters.native["step"] = (near, spectra, ready)
    return cast(tuple[Tensor, Tensor, Tensor], filters.native["step"])
