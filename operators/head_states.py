"""Modal filters of heads as recurrences: bases of whole chunks, and states of constant size.

After a position t the state of a head is Y_t = sum_{s <= t} exp(log_pole (t - s)) k_s v_s^T, one K x V matrix a real
mode and two a complex one, real parts first. Y_t = exp(log_pole) Y_{t-1} + k_t v_t^T, y_t = Re sum residue Y_t^T q_t.

Shapes: as in `chunked`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from operators.chunked import CHUNK, CHUNK_BFLOAT16, Bases
from operators.mixing import mix
from operators.modes import Modes


def chunk_of(dtype: torch.dtype) -> int:
    """Positions of a chunk, for the precision of queries and keys."""
    return CHUNK_BFLOAT16 if dtype == torch.bfloat16 else CHUNK


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
    """Modal filters as they are at this moment, and what steps derive from them.

    Attributes:
        modes: the filters, (H, S).
        transition_HRR: the state one position later.
        out_HR: how a state is read at the position it ends with.
        sources: states that an input enters, the first ones.
    """

    modes: Modes
    transition_HRR: Tensor
    out_HR: Tensor
    sources: int


@torch.no_grad()
def freeze(modes: Modes) -> Recurrence:
    """What decoding needs of some modes, without gradients."""
    kept = Modes(modes.log_poles_CS.detach(), modes.residues_CS.detach())
    zero = torch.zeros(1, dtype=kept.log_poles_CS.real.dtype, device=kept.log_poles_CS.device)
    return Recurrence(kept, _transition(kept, 1), _out(kept, zero)[..., 0], kept.log_poles_CS.shape[1])


def first_state(batch: int, recurrence: Recurrence, key_width: int, value_width: int) -> Tensor:
    """The state (B, H, R, K, V) of sequences of which nothing was seen."""
    return recurrence.out_HR.new_zeros(batch, *recurrence.out_HR.shape, key_width, value_width)


def step(
    q_BHK1: Tensor, k_BHK1: Tensor, v_BHV1: Tensor, state_BHRKV: Tensor, recurrence: Recurrence
) -> tuple[Tensor, Tensor]:
    """One more position: its mixed value (B, H, V, 1) and the state after it, which is new."""
    later_BHRX = recurrence.transition_HRR @ state_BHRKV.flatten(3)
    later_BHRKV = later_BHRX.view_as(state_BHRKV)
    later_BHRKV[:, :, : recurrence.sources] += (k_BHK1 * v_BHV1.transpose(2, 3))[:, :, None]
    read_BHRK = recurrence.out_HR[:, :, None] * q_BHK1.transpose(2, 3)
    y_BH1V = read_BHRK.flatten(2)[:, :, None] @ later_BHRKV.flatten(2, 3)
    return y_BH1V.transpose(2, 3), later_BHRKV


@torch.no_grad()
def extend(
    q_BHKn: Tensor, k_BHKn: Tensor, v_BHVn: Tensor, state_BHRKV: Tensor, recurrence: Recurrence
) -> tuple[Tensor, Tensor]:
    """Any number of positions after a state: mixed values (B, H, V, n) in the inputs' dtype, and the state after."""
    dtype, rows = q_BHKn.dtype, recurrence.out_HR.shape[1]
    bases = modal_bases(recurrence.modes, chunk_of(dtype))
    chunk, outputs = bases.into_HRC.shape[-1], []
    into_HRC, out_HRC = bases.into_HRC.to(dtype), bases.out_HRC.to(dtype)
    for q, k, v in zip(q_BHKn.split(chunk, -1), k_BHKn.split(chunk, -1), v_BHVn.split(chunk, -1), strict=True):
        new = q.shape[-1]
        y = mix(q, k, v, bases.near_HW[:, :new])
        spread = (q[:, :, None] * out_HRC[:, :, None, :new]).flatten(2, 3)
        outputs.append(y + state_BHRKV.flatten(2, 3).transpose(-1, -2).to(dtype) @ spread)
        added = (k[:, :, None] * into_HRC[:, :, None, chunk - new :]).flatten(2, 3) @ v.transpose(-1, -2)
        transition = bases.carry if new == chunk else _transition(recurrence.modes, new)
        later = (transition @ state_BHRKV.flatten(3)).view_as(state_BHRKV)
        state_BHRKV = later + added.unflatten(2, (rows, -1))
    return torch.cat(outputs, dim=-1), state_BHRKV
