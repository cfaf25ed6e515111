"""Decoding states: what an operator must remember of the positions it has seen. One class a mode.

`State` counts positions, and has the operations that beam search, contrastive search and speculative decoding ask of a
cache. `HyenaState` adds what the projections need; the modes are in `channelwise` and `multihead`. Some have a history
(`history`); others a memory of a constant size (`MemoryState`), which cannot be cropped, but is computed again from the
inputs behind the last of a few marks. The next call does so, as it does for positions that came with gradients.

A state belongs to the weights it was made with, and owns what it derives from them; after an update of the weights
start a new one. Copies share what is derived, pickles leave it out. States hold no gradients, and each is one thread's.

Shapes: B batch, D model width, E rows of the projection, K taps, T positions remembered.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from operators.decoding.frozen import Derived, Filters
from operators.decoding.history import History

MARKS = 2

Kept = Callable[[Tensor], Tensor]  # chooses among sequences, which come first


class State:
    """Counts positions: all that an operator remembers that has no memory.

    Args:
        batch: sequences.
        max_length: positions the operator was built for.
        croppable: whether what a crop needs is kept.

    Attributes:
        mode: what the operator calls this way of going on.
        length: positions seen.
    """

    mode: ClassVar[str] = "count"

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        self.batch, self.max_length, self.croppable = batch, max_length, croppable
        self.length = 0

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises ValueError unless 0 <= length <= positions seen, and where the state is not croppable unless `length` is
        one of these two.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and the {self.length} positions seen but is {length}.")
        if not self.croppable and length not in (0, self.length):
            raise ValueError(
                f"length must be 0 or the {self.length} positions seen but is {length}: this state keeps no inputs; "
                "make it with croppable=True."
            )
        if length < self.length:
            self._crop(length)
        self.length = length

    def reorder(self, indices: Tensor) -> None:
        """Let sequence i continue what sequence indices[i] was, (B,) int64; the beam operation."""
        if indices.numel() != self.batch:
            raise ValueError(
                f"indices must hold {self.batch} entries, one a sequence, but holds {indices.numel()}: "
                "use select to change the number of sequences."
            )
        self.select(indices)

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, (b,) int64, in that order; the batch becomes b."""
        self._select(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))
        self.batch = indices.numel()

    def repeat(self, n: int) -> None:
        """Turn every sequence into n adjacent copies; the batch becomes n B. ValueError if n < 1."""
        if n < 1:
            raise ValueError(f"n must be at least 1 but is {n}.")
        self.select(torch.arange(self.batch).repeat_interleave(n))

    def check(self, batch: int, new: int) -> None:
        """Raise ValueError unless `new` >= 1 more positions of `batch` sequences can follow."""
        if batch != self.batch:
            raise ValueError(
                f"the state holds {self.batch} sequences but the input has {batch}: "
                "use select or repeat, or start a new state."
            )
        if new < 1:
            raise ValueError("extend needs at least one new position but got none.")
        if self.length + new > self.max_length:
            raise ValueError(
                f"{self.length} positions seen and {new} new ones exceed max_length {self.max_length}: "
                "build the operator with a larger max_length."
            )

    def held_bytes(self) -> int:
        """Of all that it remembers, room for positions to come included; not of what it shares with other states."""
        return sum({part.data_ptr(): part.nbytes() for part in _storages(list(vars(self).values()))}.values())

    def _crop(self, length: int) -> None:
        """Forget more than none."""

    def _select(self, kept: Kept) -> None:
        """Let `kept` choose among the sequences of all that is remembered."""


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    """Those of all tensors that a state has, but for what is derived from weights."""
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _storages(part)
    elif isinstance(value, History):
        yield from _storages(value.buffer)
    elif dataclasses.is_dataclass(value):
        yield from _storages(list(vars(value).values()))


class ShortConv(Derived):
    """The short convolution as a step wants it: bias (E,), weights (K, E), and these by tap."""

    def __init__(self, bias_E: Tensor, weight_KE: Tensor) -> None:
        self.bias_E, self.weight_KE, self.taps = bias_E, weight_KE, weight_KE.unbind()


class HyenaState(State):
    """What every mode of Hyena remembers.

    Attributes:
        filters: the long filters, from the first call on.
        short: the short convolution, once a step has needed it.
        inputs: (B, D, T), where the state is croppable; only crops and gradients read it.
        mask: of the positions seen, (B, T), where the state is croppable and any was given.
        recent: the projections that the short convolution still sees, (B, 1, E) of each of the last taps - 1 positions,
            the newest last; None after a crop.
        behind: the newest positions, of which the state has the inputs alone: those of calls with gradients, and what a
            memory of constant size has lost by a crop.
    """

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.filters: Filters | None = None
        self.short: ShortConv | None = None
        self.inputs = History(max_length, channels_touch=True)
        self.mask: History | None = None
        self.recent: tuple[Tensor, ...] | None = None
        self.behind = 0

    def keep_input(self, new_BDn: Tensor) -> Tensor:
        """The inputs (B, D, T) with the new ones; these alone where the state is not croppable."""
        return self.inputs.append(self.length, new_BDn) if self.croppable else new_BDn

    def keep_mask(self, mask_Bn: Tensor | None, x_BnD: Tensor) -> Tensor | None:
        """The mask (B, T) of all positions, of the new ones if the state is not croppable; None while none was given.

        `x` are the new inputs."""
        if not self.croppable or (mask_Bn is None and self.mask is None):
            return mask_Bn
        if self.mask is None:
            self.mask = History(self.max_length)
            self.mask.write(0, torch.ones(self.batch, self.length, dtype=torch.bool, device=x_BnD.device))
        new_Bn = torch.ones(x_BnD.shape[:2], dtype=torch.bool, device=x_BnD.device) if mask_Bn is None else mask_Bn
        return self.mask.append(self.length, new_Bn.bool())

    def mark(self) -> None:
        """Remember what a crop cannot restore, for crops to positions behind it."""

    def _crop(self, length: int) -> None:
        self.recent, self.behind = None, max(0, length - (self.length - self.behind))
        if length == 0:
            self.filters = self.short = None  # a new text may come with new weights

    def _select(self, kept: Kept) -> None:
        for history in (self.inputs, self.mask):
            if history is not None:
                history.select(kept, self.length)
        self.recent = _all_kept(self.recent, kept)


class Mark(NamedTuple):
    """What is remembered in a constant size after `length` positions."""

    length: int
    memory: tuple[Tensor, ...]
    recent: tuple[Tensor, ...] | None


class MemoryState(HyenaState):
    """A state of constant size, but for the inputs.

    Attributes:
        memory: by convolution, batch first.
        marks: earlier memories, the newest last.
    """

    def __init__(self, batch: int, max_length: int, croppable: bool = True) -> None:
        super().__init__(batch, max_length, croppable)
        self.memory: list[Tensor] = []
        self.marks: list[Mark] = []

    def mark(self) -> None:
        """Remember the memory as it is now."""
        if self.croppable:
            now = Mark(self.length, tuple(part.clone() for part in self.memory), self.recent)
            self.marks = [*self.marks, now][-MARKS:]

    def _crop(self, length: int) -> None:
        super()._crop(length)
        self.marks = [mark for mark in self.marks if mark.length <= length]
        mark = self.marks[-1] if self.marks else Mark(0, (), None)
        self.memory = [part.clone() for part in mark.memory]
        self.recent, self.behind = mark.recent, length - mark.length

    def _select(self, kept: Kept) -> None:
        super()._select(kept)
        self.memory = [kept(part) for part in self.memory]
        self.marks = [Mark(m.length, _all_kept(m.memory, kept) or (), _all_kept(m.recent, kept)) for m in self.marks]


def _all_kept(tensors: tuple[Tensor, ...] | None, kept: Kept) -> tuple[Tensor, ...] | None:
    return None if tensors is None else tuple(kept(tensor) for tensor in tensors)
