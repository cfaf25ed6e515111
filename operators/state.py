"""The decoding state of an operator: what it must remember of the positions it has seen.

Everything remembered is a history with one entry per position, kept in a preallocated buffer that at least
doubles when it is full, so that a step writes its own entry and copies nothing (amortised). Entries behind
`length` are left over and never read, which makes `crop` exact and free. The batch operations are those that
beam search, contrastive search and speculative decoding ask of a cache.

A state belongs to the weights it was made with; after an update of the weights start a new one. Gradients do
not flow into earlier calls.

Shapes: B batch, T positions remembered.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from operators.decode import FIRST_WINDOW, Filters

MIN_CAPACITY = 64


@dataclass
class State:
    """Histories of the positions seen so far.

    Attributes:
        batch: sequences.
        max_length: positions the operator was built for.
        mode: how heads go on from it: "direct" from a history, "modal" from a memory.
        length: positions seen.
        histories: buffers, batch first and positions last; only the first `length` positions are meaningful.
        filters: the long filters, once a step has needed them.
        ahead: by convolution, what the history adds to the outputs of a window, batch first and positions last.
        window: the first position of that window and the first behind it.
        memory: what is remembered in a constant size, batch first; it cannot be cropped but to nothing.
        recent_projections: what the short convolution still sees, (B, E, taps - 1); None after a crop.
    """

    batch: int
    max_length: int
    mode: str = "direct"
    length: int = 0
    histories: dict[str, Tensor] = field(default_factory=dict)
    filters: Filters | None = None
    ahead: dict[str, Tensor] = field(default_factory=dict)
    window: tuple[int, int] = (0, 0)
    memory: dict[str, Tensor] = field(default_factory=dict)
    recent_projections: Tensor | None = None

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write `new` (B, ..., n) behind the positions seen; returns the history (B, ..., length + n).

        `length` does not move: the operator moves it once, when all of its histories are written. With no
        position seen yet the result is `new` itself, so a prefill is differentiable.
        """
        self.room(name, new).copy_(new.detach())
        return new if self.length == 0 else self.histories[name][..., : self.length + new.shape[-1]]

    def room(self, name: str, like: Tensor) -> Tensor:
        """The place behind the positions seen for new ones, (B, ..., n) as `like`: what `append` fills."""
        start, stop = self.length, self.length + like.shape[-1]
        buffer = self.histories.get(name)
        if buffer is None or buffer.shape[-1] < stop:
            capacity = min(self.max_length, max(2 * start, stop + MIN_CAPACITY))
            grown = like.new_zeros(*like.shape[:-1], capacity)
            if buffer is not None and start > 0:
                grown[..., :start] = buffer[..., :start]
            self.histories[name] = buffer = grown
        return buffer[..., start:stop]

    def open_window(self) -> bool:
        """Whether the next position begins a new window, which is then twice as wide as the one before it."""
        start, stop = self.window
        if start <= self.length < stop:
            return False
        width = 2 * (stop - start) if self.length == stop > start else FIRST_WINDOW
        self.window = (self.length, min(self.length + width, self.max_length))
        return True

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on. ValueError unless 0 <= length <= positions seen."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and the {self.length} positions seen but is {length}.")
        if length < self.length:
            self.recent_projections, self.window = None, (0, 0)
            assert length == 0 or not self.memory
            self.memory = {}
        if length == 0:
            self.filters = None  # a new text may come with new weights
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
        self.histories = {k: v.index_select(0, indices.to(v.device)) for k, v in self.histories.items()}
        self.ahead = {k: v.index_select(0, indices.to(v.device)) for k, v in self.ahead.items()}
        self.memory = {k: v.index_select(0, indices.to(v.device)) for k, v in self.memory.items()}
        if self.recent_projections is not None:
            kept = self.recent_projections
            self.recent_projections = kept.index_select(0, indices.to(kept.device))
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
