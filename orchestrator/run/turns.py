"""Who is next: cores, GPUs and memory for stages, what judges a student before what trains one, in the plan's order.

Ray gives a core to whoever asked first, and all trainings of a study ask before the first evaluation can: results would
come when all training is over.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

GRACE = 0.02  # seconds in which those who waited for what has just ended ask for their turn, before the next is given
Needs = tuple[float, float, float]  # cores, GPUs, bytes of memory
Place = tuple[int, int]  # a class of stages, the lower the sooner, and the place in the plan


class Turns:
    """What there is, given out in one event loop. Who waits at the head is not overtaken by who needs less."""

    def __init__(self, cores: float, gpus: float, memory: float = math.inf) -> None:
        self._free = [cores, gpus, memory]
        self._waiting: list[tuple[Place, int, Needs, asyncio.Future[None]]] = []
        self._asked = 0
        self._due = False

    @asynccontextmanager
    async def turn(self, place: Place, cores: float, gpus: float, memory: float = 0.0) -> AsyncIterator[None]:
        """Hold them while the context lasts; wait for them before, behind all whose place is lower."""
        needs = (cores, gpus, memory)
        self._asked += 1
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, self._asked, needs, granted))
        self._grant_soon()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._give_back(needs)
            raise
        try:
            yield
        finally:
            self._give_back(needs)

    def _give_back(self, needs: Needs) -> None:
        self._free = [free + need for free, need in zip(self._free, needs, strict=True)]
        self._grant_soon()

    def _grant_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(GRACE, self._grant)

    def _grant(self) -> None:
        self._due = False
        while self._waiting:
            _, _, needs, granted = self._waiting[0]
            if not granted.done():
                if any(need > free + 1e-9 for need, free in zip(needs, self._free, strict=True)):
                    return
                self._free = [free - need for free, need in zip(self._free, needs, strict=True)]
                granted.set_result(None)
            heapq.heappop(self._waiting)
