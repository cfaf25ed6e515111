"""What earlier studies of a store measured, for the estimate of the time left before this run has measures of its own.

Place in the flow: read once, when a run begins. Invariant: what cannot be read, or is of an older version of this
program, tells nothing and stops nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.record.screen.costs import Observation, models_of, observations
from orchestrator.record.screen.facts import Stage, done_stage
from orchestrator.run.store import Store
from orchestrator.study.spec import Spec, spec_from_json
from orchestrator.study.stages import stretches_of


def earlier_observations(store: Store, but: Iterable[str]) -> list[Observation]:
    """What the finished stages of a store took, `but` these."""
    specs: dict[str, Spec] = {}
    stages: dict[str, Stage] = {}
    for key in set(store.all_keys()).difference(but):
        try:
            specs[key] = spec_from_json((store.folder(key) / "spec.json").read_text(encoding="utf-8"))
            stages[key] = _stage(specs[key], store.done(key))
        except (OSError, ValueError):  # not finished, damaged, or of another version
            continue
    return list(observations(stages, specs, models_of(specs)))


def _stage(spec: Spec, manifest: dict[str, Any]) -> Stage:
    """As a look finds it; where all of its training is of one sort, the rate of the whole of it."""
    rate, stretches = manifest["result"].get("tokens_per_s"), {name for name, _ in stretches_of(spec)}
    alike = rate and len(stretches) == 1
    return done_stage(manifest, ((manifest["result"]["tokens"], rate),) if alike else (), fresh=False)
