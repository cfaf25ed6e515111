"""A plan that grows: with every result that decides how a path goes on, it is made again, and has what comes next.

Place in the flow: the broker, the driver and whoever looks each have one over the same store, and so the same plan.
Invariant: a result is read from the store alone, so a run that was killed grows to where it was at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.run.store import Store
from orchestrator.study.path import Results
from orchestrator.study.plan import Plan, Planner
from orchestrator.study.spec import Spec, ThroughputSpec


@dataclasses.dataclass(frozen=True)
class Remeasured(Planner):
    """No stage but the teacher, and measurements of speed that are given."""

    measured: dict[str, ThroughputSpec]

    def __call__(self, results: Results) -> Plan:
        """Without trials and controls."""
        return dataclasses.replace(super().__call__(results), controls={}, trials=())

    def speeds(self, plan: Plan) -> dict[str, ThroughputSpec]:
        """Those that are given."""
        return self.measured


class Growing:
    """A plan with what the store holds of the results that decide it.

    Attributes:
        plan: as it is known.
        speeds: by the key of each trained stage the measurement of its speed.
    """

    plan: Plan
    speeds: dict[str, ThroughputSpec]

    def __init__(self, planner: Planner, store: Store) -> None:
        self.planner, self.store = planner, store
        self._make()

    def grow(self) -> bool:
        """Make the plan again where a result that it waits for is there; returns whether it was made again."""
        if not any(self.store.finished(key) for key in self.plan.waits):
            return False
        before = set(self.plan.waits)
        self._make()
        return before != set(self.plan.waits)

    @property
    def specs(self) -> dict[str, Spec]:
        """All stages that are known, measurements included, by key."""
        return {**self.plan.specs, **{spec.key: spec for spec in self.speeds.values()}}

    def _make(self) -> None:
        self.plan = self.planner(self._result)
        self.speeds = self.planner.speeds(self.plan)

    def _result(self, key: str) -> Mapping[str, Any] | None:
        if not self.store.finished(key):
            return None
        try:
            return self.store.result(key)
        except (OSError, ValueError):  # withdrawn at this moment, or damaged
            return None
