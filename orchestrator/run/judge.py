"""Which trials go on after a rung of early stopping, decided once, when every student of the rung is evaluated.

Place in the flow: the broker asks on behalf of trials. Invariant: a decision is made from results in the store, so it
is the same whatever was computed first and however often the run was interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from orchestrator.study.halving import Rung, good_enough

Want = Callable[[str], Awaitable[dict[str, Any]]]


class Judge:
    """The rungs of a plan, in the order of trained tokens. `want` gives the result of an evaluation."""

    def __init__(self, rungs: tuple[Rung, ...], reduction_factor: int, want: Want) -> None:
        self.rungs, self.reduction_factor, self.want = rungs, reduction_factor, want
        self._decided: dict[int, asyncio.Future[set[str]]] = {}

    async def goes_on(self, trial: str, evaluation: str) -> bool:
        """Whether a trial goes on after the student with this evaluation; waits for those it is compared with."""
        for place, rung in enumerate(self.rungs):
            if rung.judged.get(trial) == evaluation:
                return trial in await self._staying(place)
        return True

    async def _staying(self, place: int) -> set[str]:
        if place not in self._decided:
            self._decided[place] = asyncio.ensure_future(self._decide(place))
        return await asyncio.shield(self._decided[place])

    async def _decide(self, place: int) -> set[str]:
        """The trials that go on; a trial that was stopped before, or failed, is not compared."""
        there = {
            trial: evaluation
            for trial, evaluation in self.rungs[place].judged.items()
            if await self._reaches(trial, place)
        }
        asked = list(dict.fromkeys(there.values()))
        results = await asyncio.gather(*map(self.want, asked), return_exceptions=True)
        ratios = {
            evaluation: float(result["perplexity_ratio"])
            for evaluation, result in zip(asked, results, strict=True)
            if isinstance(result, dict)
        }
        staying = good_enough(ratios, self.reduction_factor)
        return {trial for trial, evaluation in there.items() if evaluation in staying}

    async def _reaches(self, trial: str, place: int) -> bool:
        for earlier, rung in enumerate(self.rungs[:place]):
            if trial in rung.judged and trial not in await self._staying(earlier):
                return False
        return True
