"""Modal filters of heads as recurrences: bases of whole chunks, and states of constant size.

After a position t the state of a head is Y_t = sum_{s <= t} exp(log_pole (t - s)) k_s v_s^T, a K x V matrix a mode, in
the modes' numbers: Y_t = exp(log_pole) Y_{t-1} + k_t v_t^T, and y_t = Re sum residue Y_t^T q_t. For whole chunks a
complex matrix counts as two real ones.

Shapes: as in `chunked`; n new positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from operators.filters.modes import Modes
from operators.mixing.chunked import CHUNK, CHUNK_BFLOAT16, Bases
from operators.mixing.masked import mix


def chunk_of(dtype: torch.dtype) -> int:
    """Positions of a chunk, for the precision of queries and keys."""
    return CHUNK_BFLOAT16 if dtype == torch.bfloat16 else CHUNK


def real_states(modes: Modes) -> int:
    """States R of a head."""
    return modes.log_poles_CS.shape[1] * (2 if modes.log_poles_CS.is_complex() else 1)


def modal_bases(modes: Modes, chunk: int) -> Bases:
    """Exact bases, R real states; differentiable."""
    lags_C = torch.arange(chunk, dtype=modes.log_poles_CS.real.dtype, device=modes.log_poles_CS.device)
    into_HRC, out_HRC = _into(modes, lags_C.flip(0)), _out(modes, lags_C + 1)
    return Bases(modes.at(lags_C), into_HRC, out_HRC, _transition(modes, chunk))


def _into(modes: Modes, lags_C: Tensor) -> Tensor:
    decay_HSC = torch.exp(modes.log_poles_CS[..., None] * lags_C)
    return torch.cat([decay_HSC.real, decay_HSC.imag], dim=1) if decay_HSC.is_complex() else decay_HSC


def _out(modes: Modes, lags_C: Tensor) -> Tensor:
    read_HSC = modes.residues_CS[..., None] * torch.exp(modes.log_poles_CS[..., None] * lags_C)
    return torch.cat([read_HSC.real, -read_HSC.imag], dim=1) if read_HSC.is_complex() else read_HSC


def _transition(modes: Modes, steps: int) -> Tensor:
    """The state after `steps` positions without input, as a matrix (H, R, R)."""
    decay_HS = torch.exp(modes.log_poles_CS * steps)
    if not decay_HS.is_complex():
        return torch.diag_embed(decay_HS)
    real, imaginary = torch.diag_embed(decay_HS.real), torch.diag_embed(decay_HS.imag)
    return torch.cat([torch.cat([real, -imaginary], dim=2), torch.cat([imaginary, real], dim=2)], dim=1)


class Recurrence(NamedTuple):
    """Modal filters as they are at this moment, without gradients, and what a step derives from them.

    Attributes:
        modes: the filters, (H, S).
        decay_HS11: of a position.
        read_HPS1: residues; where they are complex, real and imaginary parts, P = 2.
    """

    modes: Modes
    decay_HS11: Tensor
    read_HPS1: Tensor


@torch.no_grad()
def freeze(modes: Modes) -> Recurrence:
    """What decoding needs of some modes."""
    residues = modes.residues_CS
    parts = [residues.real, residues.imag] if residues.is_complex() else [residues]
    decay_HS11 = torch.exp(modes.log_poles_CS)[..., None, None]
    return Recurrence(
        Modes(modes.log_poles_CS.detach(), residues.detach()), decay_HS11, torch.stack(parts, 1)[..., None]
    )


def first_state(batch: int, recurrence: Recurrence, key_width: int, value_width: int) -> Tensor:
    """The state (B, H, S, K, V) of sequences of which nothing was seen."""
    decay = recurrence.decay_HS11
    return decay.new_zeros(batch, *decay.shape[:2], key_width, value_width)


def step(
    q_BHK1: Tensor, k_BHK1: Tensor, v_BHV1: Tensor, state_BHSKV: Tensor, recurrence: Recurrence
) -> tuple[Tensor, Tensor]:
    """One more position, in float32 or float64: its mixed values (B, H, V, 1), and the state, changed in place."""
    values_BH1V = v_BHV1.transpose(2, 3)
    new_BH1KV = (k_BHK1 * values_BH1V)[:, :, None].to(state_BHSKV.dtype)
    if state_BHSKV.is_complex():  # which torch is slow at in one operation
        state_BHSKV.mul_(recurrence.decay_HS11).add_(new_BH1KV)
    else:
        torch.addcmul(new_BH1KV, state_BHSKV, recurrence.decay_HS11, out=state_BHSKV)
    weights_BHPT = (recurrence.read_HPS1 * q_BHK1.transpose(2, 3)[:, :, None]).flatten(3)
    if not state_BHSKV.is_complex():
        return (weights_BHPT @ state_BHSKV.flatten(2, 3)).transpose(2, 3), state_BHSKV
    read_BHPV2 = (weights_BHPT @ torch.view_as_real(state_BHSKV).flatten(4).flatten(2, 3)).unflatten(3, (-1, 2))
    return (read_BHPV2[:, :, 0, :, 0] - read_BHPV2[:, :, 1, :, 1])[..., None], state_BHSKV


def extend(
    q_BHKn: Tensor, k_BHKn: Tensor, v_BHVn: Tensor, state_BHSKV: Tensor, recurrence: Recurrence
) -> tuple[Tensor, Tensor]:
    """Any number of positions after a state: mixed values (B, H, V, n) in the inputs' dtype, and the state after."""
    dtype, state_BHRX = q_BHKn.dtype, _in_real_numbers(state_BHSKV).flatten(3)
    bases = modal_bases(recurrence.modes, chunk_of(dtype))
    chunk, outputs = bases.into_HRC.shape[-1], []
    into_HRC, out_HRC = bases.into_HRC.to(dtype), bases.out_HRC.to(dtype)
    for q, k, v in zip(q_BHKn.split(chunk, -1), k_BHKn.split(chunk, -1), v_BHVn.split(chunk, -1), strict=True):
        new = q.shape[-1]
        spread = (q[:, :, None] * out_HRC[:, :, None, :new]).flatten(2, 3)
        state_BHTV = state_BHRX.unflatten(3, (q.shape[2], -1)).flatten(2, 3).to(dtype)
        outputs.append(mix(q, k, v, bases.near_HW[:, :new]) + state_BHTV.transpose(-1, -2) @ spread)
        added_BHTV = (k[:, :, None] * into_HRC[:, :, None, chunk - new :]).flatten(2, 3) @ v.transpose(-1, -2)
        transition = bases.carry if new == chunk else _transition(recurrence.modes, new)
        state_BHRX = transition @ state_BHRX + added_BHTV.view_as(state_BHRX)
    return torch.cat(outputs, dim=-1), _in_numbers_of(state_BHSKV, state_BHRX)


def _in_real_numbers(state_BHSKV: Tensor) -> Tensor:
    """(B, H, R, K, V), real parts first."""
    if not state_BHSKV.is_complex():
        return state_BHSKV
    return torch.cat([state_BHSKV.real, state_BHSKV.imag], dim=2)


def _in_numbers_of(state_BHSKV: Tensor, real_BHRX: Tensor) -> Tensor:
    """The inverse of `_in_real_numbers`."""
    numbers = torch.complex(*real_BHRX.chunk(2, dim=2)) if state_BHSKV.is_complex() else real_BHRX
    return numbers.view_as(state_BHSKV)
