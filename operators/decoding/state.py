"""The decoding state of an operator: what it must remember of the positions it has seen.

A history has one entry per position, in a preallocated buffer that at least doubles when it is full, so that a step
writes its own entry and copies nothing (amortised). Entries behind `length` are left over and never read, which makes
`crop` exact and free. A memory has a constant size; it cannot be cropped, but is computed again from the inputs behind
the last of a few marks, which the next call does. The batch operations are those that beam search, contrastive search
and speculative decoding ask of a cache.

A state belongs to the weights it was made with; after an update of the weights start a new one. Gradients do
not flow into earlier calls.

Shapes: B batch, T positions remembered.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from operators.decoding.ahead import Ahead
from operators.decoding.frozen import Filters

MIN_CAPACITY = 64
PADDING = 16  # rows a power of two apart would share few places of a cache, and a step writes to every row
MARKS = 2


class Mark(NamedTuple):
    """What is remembered in a constant size after `length` positions."""

    length: int
    memory: dict[str, Tensor]
    recent_projections: tuple[Tensor, ...] | None


class ShortConv(NamedTuple):
    """The short convolution as a step wants it, without gradients: bias (E,), weights (K, E), and these by tap."""

    bias_E: Tensor
    weight_KE: Tensor
    taps: tuple[Tensor, ...]


@dataclass
class CoreWindow:
    """Sums of the outputs from `first` on, batch first, that hold all of the past when `position` is next."""

    sums: Tensor
    first: int
    position: int


@dataclass
class State:
    """Histories of the positions seen so far.

    Attributes:
        batch: sequences.
        max_length: positions the operator was built for.
        mode: how channel-wise operators go on from it, see `steps`.
        croppable: whether the inputs are kept that a crop needs.
        length: positions seen.
        histories: buffers, batch first and positions last; only the first `length` positions are meaningful.
        filters: the long filters, once a step has needed them.
        ahead: by convolution, what the positions seen add to outputs to come; of use only at the position it is at.
        core: the same of the compiled core, for all convolutions.
        memory: what is remembered in a constant size, batch first.
        behind: positions of those seen that `memory` has lost by a crop.
        marks: earlier memories, the newest last.
        recent_projections: what the short convolution still sees, (B, 1, E) of each of the last taps - 1 positions, the
            newest last; None after a crop.
        short: the short convolution, once a step has needed it.
    """

    batch: int
    max_length: int
    mode: str = "direct"
    croppable: bool = True
    length: int = 0
    histories: dict[str, Tensor] = field(default_factory=dict)
    filters: Filters | None = None
    ahead: dict[str, Ahead] = field(default_factory=dict)
    core: CoreWindow | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    behind: int = 0
    marks: list[Mark] = field(default_factory=list)
    recent_projections: tuple[Tensor, ...] | None = None
    short: ShortConv | None = None

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write `new` (B, ..., n) behind the positions seen; returns the history (B, ..., length + n).

        `length` does not move: the operator moves it once, when all of its histories are written. With no
        position seen yet the result is `new` itself, and where `new` is differentiated it is part of a copy.
        """
        self.write(name, new)
        if self.length == 0:
            return new
        if torch.is_grad_enabled() and new.requires_grad:
            return torch.cat([self.histories[name][..., : self.length], new], dim=-1)
        return self.histories[name][..., : self.length + new.shape[-1]]

    def write(self, name: str, new: Tensor) -> Tensor:
        """`append`, but returns the whole buffer, of which positions behind the new ones mean nothing."""
        self.room(name, new).copy_(new.detach() if new.requires_grad else new)
        return self.histories[name]

    def keep_input(self, name: str, new: Tensor) -> Tensor:
        """`append` to what only crops need: `new` itself where the state is not croppable.

        The channels of a position touch in the buffer, as a step has them: nothing else reads it often.
        """
        if not self.croppable:
            return new
        if name not in self.histories:
            self.histories[name] = new.new_empty(new.shape[0], 0, new.shape[1]).transpose(1, 2)
        return self.append(name, new)

    def mark(self) -> None:
        """Remember the memory as it is now, for crops to positions behind it."""
        if self.croppable and self.memory:
            memory = {name: value.clone() for name, value in self.memory.items()}
            self.marks = [*self.marks, Mark(self.length, memory, self.recent_projections)][-MARKS:]

    def room(self, name: str, like: Tensor) -> Tensor:
        """The place behind the positions seen for new ones, (B, ..., n) as `like`: what `append` fills."""
        start, stop = self.length, self.length + like.shape[-1]
        buffer = self.histories.get(name)
        if buffer is None or buffer.shape[-1] < stop:
            capacity = min(self.max_length, max(2 * stop, MIN_CAPACITY))
            grown = _empty(like, capacity + PADDING, buffer)
            if buffer is not None and start > 0:
                grown[..., :start] = buffer[..., :start]
            self.histories[name] = buffer = grown
        return buffer.narrow(-1, start, stop - start)

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
            self.recent_projections = self.core = None
            self.ahead.clear()
            self._return_to_mark(length)
        if length == 0:
            self.filters = self.short = None  # a new text may come with new weights
        self.length = length

    def _return_to_mark(self, length: int) -> None:
        if not self.memory and self.behind == 0:
            return
        self.marks = [mark for mark in self.marks if mark.length <= length]
        mark = self.marks[-1] if self.marks else Mark(0, {}, None)
        self.memory = {name: value.clone() for name, value in mark.memory.items()}
        self.recent_projections, self.behind = mark.recent_projections, length - mark.length

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

        def kept(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, indices.to(tensor.device))

        def all_kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: kept(tensor) for name, tensor in tensors.items()}

        def maybe_kept(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(kept(tensor) for tensor in tensors)

        for name, buffer in self.histories.items():
            self.histories[name] = _empty(kept(buffer[..., :1]), buffer.shape[-1], buffer)
            self.histories[name][..., : self.length] = kept(buffer[..., : self.length])
        for ahead in self.ahead.values():
            ahead.select(indices)
        if self.core is not None:
            self.core.sums = kept(self.core.sums)
        self.memory = all_kept(self.memory)
        self.recent_projections = maybe_kept(self.recent_projections)
        self.marks = [Mark(m.length, all_kept(m.memory), maybe_kept(m.recent_projections)) for m in self.marks]
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


def _empty(like: Tensor, capacity: int, laid_out_as: Tensor | None) -> Tensor:
    """A buffer (..., capacity) of the shape of `like` but for its positions."""
    if laid_out_as is not None and laid_out_as.dim() == 3 and laid_out_as.stride(1) == 1:
        return like.new_empty(like.shape[0], capacity, like.shape[1]).transpose(1, 2)
    return like.new_empty(*like.shape[:-1], capacity)
