"""`layerswap measure`: the speed of every finished architecture once more, told together with what was measured before.

Place in the flow: a round of measurements is asked of the broker as `run` asks for the first, then the report is made
anew. Invariant: nothing is trained, and no earlier measurement is replaced.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import typer

from orchestrator.record.given import bad_input, look_at, store_of
from orchestrator.record.options import HomeDirectory, Overrides, RayAddress, StudyName, TrackingUri
from orchestrator.run.hardware import hardware


def measure(
    command: typer.Context,
    study: StudyName,
    overrides: Overrides = None,
    home: HomeDirectory = None,
    ray_address: RayAddress = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Measure the speed of finished students once more: intervals then hold what measurements differ by, too."""
    from orchestrator.distill.context import RunContext
    from orchestrator.record.driver import report
    from orchestrator.record.job import Job
    from orchestrator.record.tracking.recorder import Recorder
    from orchestrator.run.cluster import Cluster, ClusterError
    from orchestrator.run.interrupt import Interrupt
    from orchestrator.run.preflight import check_run

    with Interrupt():
        job = look_at(command, study, overrides, home, tracking_uri)
        on = job.asked.device
        job = Job.of(dataclasses.replace(job.asked, hardware=hardware(on)), job.home, job.commands)
        store_of(study, home, must_exist=True)
        context = RunContext(
            str(job.home.store.resolve()),
            on,
            locations=job.asked.resolved.locations,
            gpus_per_stage=float(on == "cuda"),
        )
        cluster = Cluster(ray_address)
        try:
            check_run(job.plan, context, cluster)
            store = store_of(study, home, write=True)
            with job.home.in_use():
                failures = measure_again(job, store, context, cluster)
        except ClusterError as error:
            bad_input(error)
        print(f"\n{report(job, Recorder(job.home, job.plan, job.speeds, live=False))[1]}", flush=True)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


def measure_again(job: Any, store: Any, context: Any, cluster: Any) -> dict[str, str]:
    """Compute the next round of measurements; returns the reasons of those that failed."""
    from orchestrator.record.speeds import next_round
    from orchestrator.run.growing import Growing, Remeasured
    from orchestrator.run.sweep import run_plan

    speeds = next_round(store, job.speeds)
    if not speeds:
        bad_input(f"{job.name} has no finished student to measure: run the study first")
    number = max(spec.again for spec in speeds.values()) + 1
    print(f"measurement {number} of {len({spec.key for spec in speeds.values()})} architectures", flush=True)
    known = job.growing.planner
    given = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    return dict(run_plan(Growing(Remeasured(**given, measured=speeds), store), context, cluster).failures)
