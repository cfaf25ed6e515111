"""Long convolutions one position at a time, exactly and at an even pace: what past inputs add is added up ahead.

Direct decoding sums over the whole history at every step. Here the sums of outputs to come are kept, and every pair of
an input and an output meets once:

- near: an input meets its own output and those up to `NEAR` - 1 positions later at once: one product of all channels.
- far: a block of U = 16, 32, .. inputs meets the outputs that are 2 U to 4 U - 1 positions later. Nobody asks for them
  before U more steps, so each step transforms a few channels.
- what was there before the first step: to windows of outputs that double, each during the window before it.

O(L log^2 L) in all, and no step is much slower than another. The tiling is that of van der Hoeven's relaxed
multiplication (see Flash Inference, Oncescu et al. 2024, and FutureFill, Agarwal et al. 2024), with blocks one further
apart, as in Gardner 1995: that is the time to spread the work over. The compiled core has the same (`native/step.h`).

Near sums have their channels last, as a step has them, far ones their positions last, as transforms have them; these
become the former a `TURN` at a time.

Shapes: B batch, D channels, d channels of a portion, T positions seen, W outputs to come, N outputs that are near.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.convolution.causal import fft_size
from operators.decoding.frozen import Filters

NEAR = 32
TURN = NEAR // 2  # the smallest block
PORTION = 2**15  # numbers transformed at once, or those of one channel
LEAST_WINDOW = 64


@dataclass
class Job:
    """Add inputs `[first, stop)` to outputs `[into, end)` that are `lags` later, from the first to before the second,
    during `steps` steps from `begun` on; `done` channels are."""

    first: int
    stop: int
    lags: tuple[int, int]
    into: int
    end: int
    begun: int
    steps: int
    recurs: bool  # so that the spectra of its lags are worth keeping
    done: int = 0


def window(seen: int, longest: int) -> int:
    """How many outputs after `seen` positions are best computed at once, in whole turns."""
    return min(max(LEAST_WINDOW, seen // (4 * TURN) * TURN), longest - seen)


class Ahead:
    """What the inputs of one long convolution add to its outputs to come.

    Args:
        filters: all long filters of the operator; the caller keeps them.
        channels: those of this convolution.
        past_BDT: its inputs so far, T >= 1.
        pending_BDW: what they add to the next W outputs, where that is known already.
    """

    def __init__(self, filters: Filters, channels: slice, past_BDT: Tensor, pending_BDW: Tensor | None = None) -> None:
        self.channels, self.longest = channels, filters.longest
        self.origin = self.position = past_BDT.shape[-1]
        length = window(self.origin, self.longest) if pending_BDW is None else pending_BDW.shape[-1]
        # Of outputs that have all that was there before the first step.
        self.window = (self.origin, self.origin + length)
        self.jobs: list[Job] = []
        self.near_BND = past_BDT.new_zeros(past_BDT.shape[0], NEAR + TURN, past_BDT.shape[1])
        self.sums_BDW = past_BDT.new_zeros(*past_BDT.shape[:2], length) if pending_BDW is None else pending_BDW
        if pending_BDW is None:
            self._add(filters, self._of_origin(), past_BDT, past_BDT.shape[1])

    def step(self, filters: Filters, z_B1D: Tensor, past_BDT: Tensor) -> Tensor:
        """The output (B, 1, D) at the position of `z`; `past` has the inputs up to it and may have room for more."""
        place = (self.position - self.origin) % TURN
        if place == 0:
            self._turn()
        if self.position == self.window[0]:
            self._plan_window()
        into_BND = self.near_BND.narrow(1, place, NEAR)
        into_BND.addcmul_(z_B1D, filters.first_lags(self.channels, NEAR))
        self.position += 1
        if place == TURN - 1:
            self._plan_far(self.position - self.origin)
        self._work(filters, past_BDT)
        return into_BND.narrow(1, 0, 1)

    def select(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Let `kept` choose among the sequences."""
        self.near_BND, self.sums_BDW = kept(self.near_BND), kept(self.sums_BDW)

    def _turn(self) -> None:
        """Let the near sums be those from this position on."""
        near_BND, stop = torch.zeros_like(self.near_BND), min(self.position + TURN, self.longest)
        near_BND[:, : NEAR - 1] = self.near_BND[:, TURN : TURN + NEAR - 1]
        near_BND[:, : stop - self.position] += self._sums(self.position, stop).transpose(1, 2)
        self.near_BND = near_BND

    def _plan_window(self) -> None:
        start, stop = self.window
        if stop < self.longest:
            self.window = (stop, min(3 * stop - 2 * start, self.longest))
            self.jobs.append(self._of_origin())

    def _of_origin(self) -> Job:
        """What was there before the first step to the window."""
        into, end = self.window
        lags, steps = (into - self.origin + 1, end), into - self.position
        return Job(0, self.origin, lags, into, end, self.position, steps, recurs=False)

    def _plan_far(self, seen: int) -> None:
        """Plan what each block that ends here has for outputs behind the next block of its size."""
        width, steps = TURN, TURN
        while seen % width == 0 and self.position + width < self.longest:
            first, into = self.position - width, self.position + width
            end = min(into + 3 * width - 1, self.longest)
            lags = (2 * width, min(4 * width, self.longest - first))
            whole = lags[1] == 4 * width
            self.jobs.append(Job(first, self.position, lags, into, end, self.position, steps, recurs=whole))
            width *= 2
            steps = width - width.bit_length() + TURN.bit_length()  # so that not all of them end in one step

    def _work(self, filters: Filters, past_BDT: Tensor) -> None:
        """Do of every job what keeps it in time, a portion of channels or more."""
        batch, width, _ = past_BDT.shape
        for job in self.jobs:
            due = width * (self.position - job.begun) // job.steps
            portion = PORTION // (batch * (job.stop - job.first + job.end - job.into))
            if due == width or due - job.done >= max(1, portion):
                self._add(filters, job, past_BDT, due)
        self.jobs = [job for job in self.jobs if job.done < width]

    def _add(self, filters: Filters, job: Job, past_BDT: Tensor, due: int) -> None:
        """Add up channels `[job.done, due)` of a job."""
        mine, count = slice(job.done, due), job.stop - job.first + job.lags[1] - job.lags[0] - 1
        channels = slice(self.channels.start + job.done, self.channels.start + due)
        offset = job.into - job.first - job.lags[0]
        size = fft_size(count - offset)  # what wraps around lies before the offset
        spectrum = torch.fft.rfft(past_BDT[:, mine, job.first : job.stop], size)
        spectrum *= filters.segment(channels, job.lags, size, keep=job.recurs)
        sums_BdW = self._sums(job.into, job.end)[:, mine]
        sums_BdW += torch.fft.irfft(spectrum, size)[..., offset : offset + job.end - job.into]
        job.done = due

    def _sums(self, start: int, stop: int) -> Tensor:
        """The sums of some positions, with room for them."""
        room, wanted = self.sums_BDW.shape[-1], stop - self.origin
        if room < wanted:
            capacity = min(self.longest - self.origin, max(2 * room, wanted))
            self.sums_BDW = torch.nn.functional.pad(self.sums_BDW, (0, capacity - room))
        return self.sums_BDW[..., start - self.origin : wanted]
