"""A study that is ready to be run or looked at: its plan, its home, and the words that started it.

Light: no package that takes long to load, so that looking is quick.
"""

from __future__ import annotations

import dataclasses
import functools

from orchestrator.record.home import Home
from orchestrator.record.remembered import Asked, Variant, variant_of
from orchestrator.run.growing import Growing
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec


@dataclasses.dataclass(frozen=True)
class Job:
    """A plan in a home, which grows with the results that decide it."""

    growing: Growing
    home: Home
    commands: dict[str, str]  # by name, with the words that belong to this study
    asked: Asked

    @classmethod
    def of(cls, asked: Asked, home: Home, commands: dict[str, str]) -> Job:
        """The job of a study as it is, or was, asked for. Raises what `Asked.plan` does."""
        return cls(asked.growing(Store(home.store, write=False)), home, commands, asked)

    @property
    def plan(self) -> Plan:
        """As it is known now."""
        return self.growing.plan

    @property
    def speeds(self) -> dict[str, ThroughputSpec]:
        """By the key of each trained stage the measurement of its speed."""
        return self.growing.speeds

    @property
    def name(self) -> str:
        """The study's name."""
        return self.plan.study.study

    @functools.cached_property
    def variant(self) -> Variant:
        """What the home remembers of it."""
        return variant_of(self.home, self.plan)

    @property
    def keys(self) -> set[str]:
        """Of all that it needs, measurements included."""
        return set(self.growing.specs)
