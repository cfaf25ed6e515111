"""Long convolutions one position at a time, exactly and at an even pace: what past inputs add is added up ahead.

Direct decoding sums over the whole history at every step. Here the sums of outputs to come are kept, and every pair of
an input and an output meets once:

- near: after position n of a block of 32, the last U inputs, U the largest power of two that divides n, are added to
  the next U outputs, and the whole block to the next one. That is one small matrix product a step.
- far: a block of U = 32, 64, .. inputs is added to the blocks behind the next one: two of them after an even block, one
  after an odd one; all others are met by blocks of another size. Nobody asks for them before U more steps, so each
  step transforms a few channels.
- what was there before the first step: to windows of outputs that double, each during the window before it.

O(L log^2 L) in all, and no step is much slower than another. The tiling is that of van der Hoeven's relaxed
multiplication (see Flash Inference, Oncescu et al. 2024, and FutureFill, Agarwal et al. 2024), with blocks one further
apart, as in Gardner 1995: that is the time to spread the work over.

Shapes: B batch, D channels, d channels of a portion, T positions seen, W outputs to come, U positions of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from operators.convolution import fft_size
from operators.decode import Filters

BLOCK = 32
PORTION = 2**15  # numbers transformed at once, or those of one channel
FIRST_WINDOW = 64


@dataclass
class Job:
    """Add inputs `[first, stop)` to outputs `[into, end)` during the steps from `begun` on; `done` channels are."""

    first: int
    stop: int
    into: int
    end: int
    begun: int
    recurs: bool  # so that the spectra of its lags are worth keeping
    done: int = 0


class Ahead:
    """What the inputs of one long convolution add to its outputs to come.

    Args:
        filters: all long filters of the operator.
        channels: those of this convolution.
        past_BDT: its inputs so far, T >= 1.
        known_BDW: what they add to the next W outputs, where that is known already.
    """

    def __init__(self, filters: Filters, channels: slice, past_BDT: Tensor, known_BDW: Tensor | None = None) -> None:
        self.filters, self.channels, self.longest = filters, channels, filters.h_CL.shape[1]
        self.origin = self.position = past_BDT.shape[-1]
        window = min(FIRST_WINDOW, self.longest - self.origin) if known_BDW is None else known_BDW.shape[-1]
        # Of outputs that have all that was there before the first step.
        self.window = (self.origin, self.origin + window)
        self.jobs: list[Job] = []
        self.sums_BDW = past_BDT.new_zeros(*past_BDT.shape[:2], window) if known_BDW is None else known_BDW
        if known_BDW is None:
            self._add(Job(0, self.origin, *self.window, self.origin, recurs=False), past_BDT, past_BDT.shape[1])

    def step(self, z_BD1: Tensor, past_BDT: Tensor) -> Tensor:
        """The output (B, D, 1) at the position of `z`, which is the last of `past`."""
        place = self.position - self.origin
        if self.position == self.window[0]:
            self._plan_window()
        y_BD1 = torch.addcmul(self.sums_BDW.narrow(2, place, 1), z_BD1, self.filters.lag(self.channels, 0))
        self.position += 1
        if self.position < self.longest:
            self._add_near(past_BDT, place + 1)
            self._plan_far(place + 1)
            self._work(past_BDT)
        return y_BD1

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self.sums_BDW = self.sums_BDW.index_select(0, indices.to(self.sums_BDW.device))

    def _plan_window(self) -> None:
        start, stop = self.window
        if stop < self.longest:
            self.window = (stop, min(3 * stop - 2 * start, self.longest))
            self.jobs.append(Job(0, self.origin, *self.window, self.position, recurs=False))

    def _plan_far(self, seen: int) -> None:
        """Plan what each block that ends here has for outputs behind the next block of its size."""
        width = BLOCK
        while seen % width == 0 and self.position + width < self.longest:
            into, blocks = self.position + width, 2 if seen // width % 2 else 1
            end = min(into + blocks * width, self.longest)
            self.jobs.append(Job(self.position - width, self.position, into, end, self.position, recurs=True))
            width *= 2

    def _add_near(self, past_BDT: Tensor, seen: int) -> None:
        width = min(seen & -seen, BLOCK)
        into_BDU = self._sums(self.position, min(self.position + width, self.longest))
        recent_BDU = past_BDT.narrow(2, self.position - width, width)
        if width == 1:
            into_BDU.addcmul_(recent_BDU, self.filters.lag(self.channels, 1))
        else:
            added = recent_BDU.transpose(0, 1) @ self.filters.matrix(self.channels, width)
            into_BDU += added.transpose(0, 1)[..., : into_BDU.shape[-1]]

    def _work(self, past_BDT: Tensor) -> None:
        """Do of every job what keeps it in time, a portion of channels or more."""
        batch, width, _ = past_BDT.shape
        for job in self.jobs:
            due = width * (self.position - job.begun) // (job.into - job.begun)
            portion = PORTION // (batch * (job.stop - job.first + job.end - job.into))
            if due == width or due - job.done >= max(1, portion):
                self._add(job, past_BDT, due)
        self.jobs = [job for job in self.jobs if job.done < width]

    def _add(self, job: Job, past_BDT: Tensor, due: int) -> None:
        """Add up channels `[job.done, due)` of a job."""
        mine, count, outputs = slice(job.done, due), job.stop - job.first, job.end - job.into
        channels = slice(self.channels.start + job.done, self.channels.start + due)
        lags = (job.into - job.stop + 1, job.end - job.first)
        size = fft_size(lags[1] - lags[0])
        spectrum = torch.fft.rfft(past_BDT[:, mine, job.first : job.stop], size)
        spectrum *= self.filters.segment(channels, lags, keep=job.recurs)
        sums_BdW = self._sums(job.into, job.end)[:, mine]
        sums_BdW += torch.fft.irfft(spectrum, size)[..., count - 1 : count - 1 + outputs]
        job.done = due

    def _sums(self, start: int, stop: int) -> Tensor:
        """The sums of some positions, with room for them."""
        room, wanted = self.sums_BDW.shape[-1], stop - self.origin
        if room < wanted:
            capacity = min(self.longest - self.origin, max(2 * room, wanted))
            self.sums_BDW = torch.nn.functional.pad(self.sums_BDW, (0, capacity - room))
        return self.sums_BDW[..., start - self.origin : wanted]
