"""A study computed in this process, for tests of what is done with its results."""

from __future__ import annotations

from pathlib import Path

from orchestrator.distill.context import RunContext
from orchestrator.run.compute import compute
from orchestrator.run.hardware import hardware
from orchestrator.run.store import Store
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan, throughput_specs
from orchestrator.study.sources import resolve


def computed(file: Path, home: Path, *overrides: str, speeds: bool = True) -> Plan:
    """The plan of a study, all of whose stages, and measurements of speed, are computed into the home.

    `layerswap run` of it has then nothing to start and only tells.
    """
    document = read_document(file, overrides)
    study = validate(document)
    resolved = resolve(study, file.parent)
    plan = make_plan(document, study, resolved)
    Store(home / "store")
    context = RunContext(str(home / "store"), locations=resolved.locations)
    measured = throughput_specs(plan, hardware()).values() if speeds else ()
    for spec in [*plan.specs.values(), *measured]:
        compute(spec.model_dump_json(), context)
    return plan
