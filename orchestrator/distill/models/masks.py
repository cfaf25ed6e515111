"""What an attention mask says, for a layer that has no attention: which tokens are real, and where documents begin.

An operator takes every earlier position of a text into account. So a mask can tell it two things: which positions are
padding, and which belong to another document. Whatever else a mask asks for is an error, never a guess.

Shapes: B batch, H heads, L new positions, S positions in the mask, N positions of all sequences, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCKED = -1e4  # what is added to a score that shall not count is at most this
KNOWN = (
    "a swapped layer knows masks that are causal, with padding on one side, with a sliding window, or of packed "
    "documents"
)
_READ = "_layerswap_read"


class Pattern(NamedTuple):
    """What a mask says of the new positions.

    real_BL: which are tokens and not padding; None: all.
    document_BL: a number for each, the same within a document; None: every sequence is one text.
    alone_B: whether the first new position, which follows others, is real and sees none of them; None: no.
    """

    real_BL: Tensor | None = None
    document_BL: Tensor | None = None
    alone_B: Tensor | None = None


ONE_TEXT = Pattern()


def pattern_of(mask: Any, batch: int, start: int, length: int) -> Pattern:
    """What `mask` says of the positions `start` to `start + length` - 1 of `batch` sequences.

    A mask is None (causal); (B, S) with 1 at real tokens, as for flash attention; or (B, 1, L, S), True or 0 where a
    query may look and False or at most -1e4 elsewhere. S covers all positions that a cache has, or has room for.
    Honoured are causal masks with padding on one side and packed documents, each of which sees itself only. A sliding
    window says nothing: the operator that takes the place of a windowed attention sees all of its text.

    All layers of a model get one mask, and to read it means to wait for its device. So what was read is written down on
    the tensor itself, and holds until the tensor is changed.

    Raises:
        ValueError: a mask of another shape, kind or pattern.
    """
    if mask is None:
        return ONE_TEXT
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"a swapped layer cannot read a mask of type {type(mask).__name__}: load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    found: Pattern = _once(mask, (batch, start, length), lambda: _read(mask, batch, start, length))
    return found


def packed_documents(position_ids: Tensor | None, cu_seq_lens: Tensor | None, batch: int, length: int) -> Pattern:
    """The documents that flash attention is told of without a mask.

    Args:
        position_ids: (1 or B, L); a document begins wherever they do not go on by one.
        cu_seq_lens: (documents + 1,), where documents begin in the one sequence and where the last one ends.

    Raises:
        ValueError: `cu_seq_lens` with several sequences, or that do not cover them.
    """
    found = ONE_TEXT
    if cu_seq_lens is not None:
        found = _once(cu_seq_lens, (batch, length), lambda: _from_borders(cu_seq_lens, batch, length))
    elif position_ids is not None and length > 1:
        found = _once(position_ids, (batch, length), lambda: _from_positions(position_ids, batch))
    return found


def by_document(operator: Callable[[Tensor], Tensor], x_BLD: Tensor, document_BL: Tensor) -> Tensor:
    """The outputs (B, L, D) of an operator on packed sequences, every document by itself.

    Documents of about one length go through the operator as one batch, shorter ones filled up behind their end, which a
    causal operator does not see; so it computes on less than twice as many positions as there are.
    """
    batch, length, width = x_BLD.shape
    x_ND = x_BLD.reshape(batch * length, width)
    begins_BL = document_BL != document_BL.roll(1, dims=1)
    begins_BL[:, 0] = True
    begins = begins_BL.flatten().nonzero().flatten().tolist()
    sizes = [end - begin for begin, end in zip(begins, [*begins[1:], len(x_ND)], strict=True)]
    groups: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault((size - 1).bit_length(), []).append(number)
    outputs, places = [], []
    for numbers in groups.values():
        begin_B1, size_B1 = (
            torch.tensor([values[number] for number in numbers], device=x_BLD.device)[:, None]
            for values in (begins, sizes)
        )
        step_L = torch.arange(max(sizes[number] for number in numbers), device=x_BLD.device)
        inside_BL = step_L < size_B1
        place_BL = torch.where(inside_BL, begin_B1 + step_L, begin_B1)
        outputs.append(operator(x_ND[place_BL])[inside_BL])
        places.append(place_BL[inside_BL])
    return torch.cat(outputs)[torch.cat(places).argsort()].view(batch, length, -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _once(tensor: Tensor, asked: tuple[int, ...], read: Callable[[], Pattern]) -> Pattern:
    """What `read` gives; written down on the tensor, unless torch cannot tell whether that was changed since."""
    if tensor.is_inference():
        return read()
    key = (*asked, tensor._version)
    known = getattr(tensor, _READ, None)
    if known is None or known[0] != key:
        known = (key, read())
        setattr(tensor, _READ, known)
    pattern: Pattern = known[1]
    return pattern


def _read(mask: Tensor, batch: int, start: int, length: int) -> Pattern:
    seen = start + length
    shapes = {2: ((1, batch),), 4: ((1, batch), None, (length,))}.get(mask.dim(), ((),))
    fits = all(sizes is None or size in sizes for size, sizes in zip(mask.shape, shapes, strict=False))
    if not fits or mask.shape[-1] < seen:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit {batch} sequences of {length} new positions after "
            f"{start} seen: give one of ({batch}, {seen}), or of ({batch}, 1, {length}, {seen})"
        )
    if mask.dim() == 2:
        return _from_tokens(mask.expand(batch, -1), start, seen)
    return _from_queries(mask, batch, start, length)


def _from_tokens(mask_BS: Tensor, start: int, seen: int) -> Pattern:
    """From 1 at real tokens and 0 at padding."""
    if mask_BS.is_floating_point():
        raise ValueError(f"a mask (B, S) of {mask_BS.dtype} is ambiguous: give True at real tokens, False at padding")
    real_BS = mask_BS[:, :seen] != 0
    begins = (real_BS[:, 1:] & ~real_BS[:, :-1]).sum(1) + real_BS[:, 0]
    torn, whole = torch.stack([(begins > 1).any(), real_BS[:, start:].all()]).tolist()
    if torn:
        raise ValueError(f"the mask has padding between real tokens, and {KNOWN}: pad on the left")
    return ONE_TEXT if whole else Pattern(real_BS[:, start:].clone())


def _from_queries(mask: Tensor, batch: int, start: int, length: int) -> Pattern:
    """From what every query may look at. A token is real if it may look at itself."""
    allowed_BHLS = mask if mask.dtype == torch.bool else mask == 0
    alike = allowed_BHLS.shape[1] == 1 or bool((allowed_BHLS == allowed_BHLS[:, :1]).all())
    biased = mask.dtype != torch.bool and bool((allowed_BHLS == (mask <= BLOCKED)).any())
    if biased or not alike:
        what = "adds a bias to scores" if biased else "differs between heads"
        raise ValueError(f"the mask {what}, and {KNOWN}: swap no layer of a model that needs it")
    allowed_BLS, seen = allowed_BHLS[:, 0], start + length
    real_BS = allowed_BLS[:, -1, :seen]
    if length > 1:
        new_BL = allowed_BLS.diagonal(start, 1, 2)[:, :length]
        real_BS = torch.cat([real_BS[:, :start], new_BL], dim=1) if start else new_BL
    runs_B = (real_BS[:, 1:] > real_BS[:, :-1]).sum(1) + real_BS[:, 0]
    alone_B = real_BS[:, start] & ~real_BS[:, :start].any(1)
    flags = [real_BS[:, start:].all(), alone_B.any(), (runs_B > 1).any()]
    if length > 1:
        causal_LS = torch.ones(length, seen, dtype=torch.bool, device=mask.device).tril_(start)
        flags.append((allowed_BLS[..., :seen] != (causal_LS & real_BS[:, None])).any())
    if allowed_BLS.shape[-1] > seen:
        flags.append(allowed_BLS[..., seen:].any())
    whole, alone, *unlike = torch.stack(flags).tolist()  # the one time that this waits for the device
    if any(unlike):
        return _from_beginnings(allowed_BLS, batch, start, length)
    return Pattern(
        None if whole else real_BS[:, start:].clone().expand(batch, -1),
        None,
        alone_B.expand(batch) if alone and start else None,
    )


def _from_beginnings(allowed_BLS: Tensor, batch: int, start: int, length: int) -> Pattern:
    """From where that begins which real queries see: where their document does, or a window that is as wide for all.

    It must end at the query and have no holes.
    """
    column_S = torch.arange(allowed_BLS.shape[-1], device=allowed_BLS.device)
    place_L = column_S[start : start + length]
    real_BL = allowed_BLS.diagonal(start, 1, 2)[:, :length]
    count_BL = allowed_BLS.sum(-1).masked_fill(~real_BL, 0)
    first_BL = place_L + 1 - count_BL
    whole_BLS = (column_S <= place_L[:, None]) & (column_S >= first_BL[..., None])
    torn = (real_BL & (allowed_BLS != whole_BLS).any(-1)).any()
    lost = (allowed_BLS[..., start : start + length].any(1) & ~real_BL).any()  # seen by others, but not by itself
    order_BL = real_BL.cumsum(-1)
    begins_BL = real_BL & (count_BL == 1)
    anchor_BL = torch.where(begins_BL | (real_BL & (order_BL == 1)), first_BL, 0).cummax(-1).values
    widest_B1 = count_BL.amax(-1, keepdim=True)
    odd = (real_BL & (first_BL != torch.maximum(anchor_BL, place_L + 1 - widest_B1))).any()
    several = (begins_BL & (order_BL > 1)).any()
    wrong, uneven, packed, whole, alone = torch.stack(
        [torn | lost, odd, several, real_BL.all(), begins_BL[:, 0].any()]
    ).tolist()
    if wrong:
        raise ValueError(f"the mask is not causal, or has holes, and {KNOWN}: pad on the left, and pack no padding")
    if uneven:
        raise ValueError(f"what the mask lets queries see begins at odd places, and {KNOWN}: give one of these")
    return Pattern(
        None if whole else real_BL.clone().expand(batch, -1),
        begins_BL.cumsum(-1).expand(batch, -1) if packed else None,
        begins_BL[:, 0].expand(batch) if alone and start else None,
    )


def _from_positions(position_ids: Tensor, batch: int) -> Pattern:
    begins_BL = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    document_BL = begins_BL.cumsum(-1)
    return Pattern(None, document_BL.expand(batch, -1)) if bool(begins_BL.any()) else ONE_TEXT


def _from_borders(cu_seq_lens: Tensor, batch: int, length: int) -> Pattern:
    borders = cu_seq_lens.tolist()
    if batch != 1 or borders != sorted(set(borders)) or borders[0] != 0 or borders[-1] != length:
        told = f"{borders[:4]} ..." if len(borders) > 4 else str(borders)
        raise ValueError(
            f"cu_seq_lens {told} must rise from 0 to the {length} positions of one sequence, and there are {batch} "
            "sequences: pack documents into one"
        )
    begins_L = torch.zeros(length, dtype=torch.long, device=cu_seq_lens.device)
    begins_L[cu_seq_lens[1:-1].long()] = 1
    return Pattern(None, begins_L.cumsum(0)[None]) if len(borders) > 2 else ONE_TEXT
