"""A study that is asked to run: where its stages go, what is checked before anything is written, the run itself.

Place in the flow: between the command `run`, or the Python API, and the driver. Invariant: a run that cannot be is
refused before the store is made.
"""

from __future__ import annotations

import dataclasses
import sys
import uuid
from typing import Literal

from orchestrator.distill.context import RunContext
from orchestrator.record.driver import run_study
from orchestrator.record.job import Job
from orchestrator.run.cluster import Cluster, ClusterError
from orchestrator.run.interrupt import Interrupt
from orchestrator.run.mirror import Mirror, MirrorError
from orchestrator.run.preflight import check_memory, check_run, cores_asked, idle_gpus, slow_products
from orchestrator.run.store import Store
from orchestrator.study.sources import Resolved


@dataclasses.dataclass(frozen=True)
class Where:
    """Where stages run and how they are held; none of it changes a result.

    Attributes:
        ray_address: a Ray cluster; none: one on this machine.
        device: `cpu` or `cuda`; none: cpu, and GPUs that stay idle are told.
        gpus_per_stage: of each process of a stage; none: 1 on cuda, else 0.
        checkpoint_seconds: between checkpoints of a running stage.
        claims: `flock`, or `lease` where the kernel's locks do not reach.
        mirror: URL through which finished stages are shared.
        cpus: cores of this machine to use; none: all that it gives.
    """

    ray_address: str | None = None
    device: str | None = None
    gpus_per_stage: float | None = None
    checkpoint_seconds: float = 15.0
    claims: Literal["flock", "lease"] = "flock"
    mirror: str | None = None
    cpus: int | None = None


class CannotRunError(ValueError):
    """A run that is not possible as it was asked for; nothing was written."""


def start(job: Job, resolved: Resolved, where: Where, interrupt: Interrupt) -> int:
    """Run a study to its end and return the exit code. Raises `CannotRunError`, and `StoreError` for the home."""
    root = job.home.store.resolve()
    stop = root / f"stop-{uuid.uuid4().hex[:8]}"
    device = where.device or "cpu"
    gpus = where.gpus_per_stage if where.gpus_per_stage is not None else float(device.startswith("cuda"))
    context = RunContext(
        str(root), device, where.checkpoint_seconds, locations=resolved.locations, gpus_per_stage=gpus,
        claims=where.claims, mirror=where.mirror, stop=str(stop),
    )  # fmt: skip
    try:
        cluster = Cluster(where.ray_address, cores_asked(where.cpus, where.ray_address))
        copies = Mirror(where.mirror) if where.mirror is not None else None
        check_run(job.plan, context, cluster)
        if slow := slow_products(job.plan, context, cluster):
            print(f"note: {slow}", file=sys.stderr)
        known = Store(job.home.store, write=False)
        done = {key for key in known.all_keys() if known.finished(key)}
        check_memory(job.plan, job.speeds, context, cluster, done)
        if where.device is None and (idle := idle_gpus(context, cluster)):
            print(f"note: GPUs of this machine that stay idle: {idle}; --device cuda uses them", file=sys.stderr)
        store = Store(job.home.store)
        interrupt.stop = stop
        with job.home.in_use():
            code = run_study(job, context, cluster, interrupt)
    except (ClusterError, MirrorError) as error:
        raise CannotRunError(str(error)) from error
    unsent = copies.upload_all(store, sorted(job.keys)) if copies else []
    for line in unsent:
        print(line, file=sys.stderr)
    return code or (1 if unsent else 0)
