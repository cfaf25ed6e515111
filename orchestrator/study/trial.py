"""A point of the search space with its path."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

from orchestrator.files import canonical_json
from orchestrator.study.path import Path
from orchestrator.study.schema import Study
from orchestrator.study.stages import Step

# What of a study decides the stages of a path, beside its teacher and its text.
DECIDES = {"seed", "operator", "schedule", "recipe", "numerics"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the search space: a path of stages from the teacher, as far as it is known."""

    name: str
    values: dict[str, Any]
    study: Study
    path: Path
    first: Path  # as it is known before anything runs

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its stages that are known."""
        return self.path.steps

    @property
    def open(self) -> bool:
        """Whether results that are not there yet decide how it goes on."""
        return self.path.waits is not None

    @property
    def ruled(self) -> bool:
        """Whether results decide its stages at all."""
        return self.first.waits is not None

    @property
    def end(self) -> Step | None:
        """Its last student so far whose layers were not given back."""
        return next((step for step in reversed(self.steps) if step.outcome != "given_back"), None)

    @functools.cached_property
    def rule(self) -> str:
        """What names a path whose stages results decide, however far it is known: sha256 in hex."""
        first = [*(step.train.key for step in self.first.steps), *(spec.key for spec in self.first.specs)]
        values = self.study.model_dump(mode="json", include=DECIDES)
        return hashlib.sha256(canonical_json([values, first, self.first.waits]).encode()).hexdigest()
