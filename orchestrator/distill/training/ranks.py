"""What the processes of one stage do together when they share its batches; alone, every function changes nothing.

Gradients are averaged after backward, many small ones at once and large ones where they lie. `DistributedDataParallel`
would not see this training: it hooks the forward of the module that it wraps, and the losses call inner modules (trunk,
output head, single mixers) and leave some parameters out, phase by phase. Invariant: parameters, optimizer states and
random states are the same on every rank at every step, so a checkpoint of the first rank is everybody's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")
TOGETHER = 1 << 22  # numbers of gradients that are copied side by side to be averaged at once: 16 MB


class PeerLost(RuntimeError):
    """Another rank does not answer any more: whatever ended it, it is not this rank's error."""


def world_size() -> int:
    """Processes that share this stage."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(first: int, count: int) -> tuple[int, int]:
    """This rank's part of the sequences `first` .. `first + count - 1`, as first and count; all parts are equal."""
    ranks = world_size()
    if ranks == 1:
        return first, count
    part = count // ranks
    return first + dist.get_rank() * part, part


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every rank the mean of all ranks' gradients; what has none on one rank has none on any.

    Those of spread parameters are means already: `fully_shard` averages them as they come.
    """
    if world_size() == 1:
        return
    found = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for several in _together_at_most(found, TOGETHER):
        if len(several) == 1 and several[0].is_contiguous():
            mean(several[0])
            continue
        flat = mean(torch.cat([gradient.flatten() for gradient in several]))
        for gradient, part in zip(several, flat.split([gradient.numel() for gradient in several]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _together_at_most(tensors: list[Tensor], numbers: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, as many at a time as have at most so many numbers; a larger one is alone."""
    several: list[Tensor] = []
    for tensor in tensors:
        if several and sum(each.numel() for each in several) + tensor.numel() > numbers:
            yield several
            several = []
        several.append(tensor)
    if several:
        yield several


def mean(values: Tensor) -> Tensor:
    """The mean over the ranks; since their parts of a batch are equal, the mean over the batch."""
    if world_size() > 1:
        with _together():
            dist.all_reduce(values)
        values /= world_size()
    return values


def on_any(flag: bool) -> bool:
    """Whether a flag is set on any rank: what ends training must end it on all of them at one step."""
    if world_size() == 1:
        return flag
    flags = [False] * world_size()
    with _together():
        dist.all_gather_object(flags, flag)
    return any(flags)


def is_first() -> bool:
    """Whether this process writes what the stage keeps."""
    return world_size() == 1 or dist.get_rank() == 0


def in_turn(load: Callable[[], tuple[int, T]]) -> tuple[int, T]:
    """Let the first rank `load` a checkpoint, which may tidy up damaged ones, then the others.

    Raises `RuntimeError` where they found other steps to go on from.
    """
    if world_size() == 1:
        return load()
    steps: list[Any] = [None] * world_size()
    if dist.get_rank() != 0:
        with _together():
            dist.barrier()
    found = load()
    with _together():
        if dist.get_rank() == 0:
            dist.barrier()
        dist.all_gather_object(steps, found[0])
    if len(set(steps)) > 1:
        raise RuntimeError(f"the ranks found checkpoints of steps {steps}: the store is not the same on every node")
    return found


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of the library that carries the sums: gloo's and nccl's own have no class
        raise PeerLost(str(error).strip().split("\n")[0]) from error
