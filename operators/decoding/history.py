"""One entry per position, in a preallocated buffer that at least doubles when it is full.

So a step writes its own entry and copies nothing (amortised). Entries behind the positions seen are left over and never
read, which makes a crop exact and free.

Shapes: B batch, n new positions, T positions in all.
"""

from collections.abc import Callable

from torch import Tensor

MIN_CAPACITY = 64
PADDING = 16  # rows a power of two apart would share few places of a cache, and a step writes to every row


class History:
    """Tensors (B, ..., T), batch first and positions last, T up to `longest`.

    Args:
        longest: positions that may come.
        channels_touch: lay (B, D, T) out with the channels of a position side by side, as a step has them.
    """

    def __init__(self, longest: int, *, channels_touch: bool = False) -> None:
        self.longest, self.channels_touch = longest, channels_touch
        self.buffer: Tensor | None = None

    def reserve(self, start: int, like: Tensor) -> Tensor:
        """The place for positions from `start` on, (B, ..., n) as `like`; those before it stay."""
        stop, buffer = start + like.shape[-1], self.buffer
        if buffer is None or buffer.shape[-1] < stop:
            grown = self._empty(like, min(self.longest, max(2 * stop, MIN_CAPACITY)) + PADDING)
            if buffer is not None:
                grown[..., :start] = buffer[..., :start]
            self.buffer = buffer = grown
        return buffer.narrow(-1, start, stop - start)

    def write(self, start: int, new: Tensor) -> Tensor:
        """Put `new` (B, ..., n) behind `start` positions; returns the buffer, which means nothing behind them."""
        self.reserve(start, new).copy_(new.detach() if new.requires_grad else new)
        assert self.buffer is not None
        return self.buffer

    def append(self, start: int, new: Tensor) -> Tensor:
        """`write`, but returns the history (B, ..., start + n): `new` itself where nothing was before it."""
        buffer = self.write(start, new)
        return new if start == 0 else buffer.narrow(-1, 0, start + new.shape[-1])

    def first(self, length: int) -> Tensor:
        """What the first `length` positions have, (B, ..., length)."""
        assert self.buffer is not None
        return self.buffer[..., :length]

    def select(self, kept: Callable[[Tensor], Tensor], length: int) -> None:
        """Let `kept` choose among the sequences; `length` positions were seen."""
        if self.buffer is not None:
            buffer, first = self.buffer, kept(self.buffer[..., :length])
            self.buffer = self._empty(first, buffer.shape[-1])
            self.buffer[..., :length] = first

    def _empty(self, like: Tensor, capacity: int) -> Tensor:
        if self.channels_touch:
            return like.new_empty(like.shape[0], capacity, like.shape[1]).transpose(1, 2)
        return like.new_empty(*like.shape[:-1], capacity)
