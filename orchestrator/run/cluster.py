"""The Ray cluster of a run: connecting to it, what its nodes have, and whether the plan fits.

Place in the flow: `run_plan` connects, checks and only then starts anything. Invariant: what would wait for ever for
cores or GPUs that no node has, or would look for files where they are not, is an error before the first stage.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext
from orchestrator.run.environment import own_instance, paths_of_workers
from orchestrator.run.guard import guarded, watched
from orchestrator.run.hardware import accelerators
from orchestrator.run.limits import cores
from orchestrator.run.store import Store
from orchestrator.run.temporary import temporary_directory
from orchestrator.study.spec import Spec

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": "15",  # of a stage that is ended for memory; without end by itself
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
OBJECT_STORE_BYTES = 100 * 1024 * 1024
READS_FILES = ("tokens", "import", "choice", "draw")  # kinds that compute with no model, on the driver's machine


class ClusterError(ValueError):
    """A cluster that cannot be reached, or cannot hold a stage of the plan."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What to run on: an address of a Ray cluster, or none to start one on this machine."""

    address: str | None = None
    cpus: int = dataclasses.field(default_factory=cores)
    gpus: int = dataclasses.field(default_factory=accelerators)


@dataclasses.dataclass(frozen=True)
class Node:
    """A machine of the cluster and all that it has, in use or not."""

    id: str
    cpus: float
    gpus: float
    tag: str  # a resource that this machine alone has plenty of


@contextmanager
def connected(cluster: Cluster) -> Iterator[tuple[Node, ...]]:
    """Connect to the cluster, or start one on this machine; yields its nodes, the driver's first.

    Raises `ClusterError` where there is no cluster at the address.
    """
    os.environ.update(QUIET)

    with ExitStack() as stack:
        folder = str(stack.enter_context(temporary_directory("ray")))
        local: dict[str, Any] = {}
        if cluster.address is None:
            stack.enter_context(own_instance())
            local = {
                "num_cpus": cluster.cpus,
                "num_gpus": cluster.gpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        stack.enter_context(guarded(folder))
        stack.callback(_shut_down)
        with _own_sigterm():
            _connect(cluster.address, local)
        stack.enter_context(watched("raylet", "gcs_server"))  # of an instance started here; others are not our children
        yield _nodes()


def _shut_down() -> None:
    """`ray.shutdown`, with a first signal held back: what interrupts it half way ends the process at once, with code 1
    and without a word."""
    import ray

    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        ray.shutdown()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: `ray.init` replaces it by one that exits with the number of the signal."""
    handler = signal.getsignal(signal.SIGTERM)
    terminated = False
    try:
        yield
    except SystemExit:
        terminated = True
    finally:
        signal.signal(signal.SIGTERM, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def _connect(address: str | None, local: dict[str, Any]) -> None:
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told once, at the end
    options: dict[str, Any] = {
        "namespace": "layerswap",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "job_config": _job(),
    }
    try:
        ray.init(address=address or "local", **options, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is None:
            raise
        raise absent(address, str(error).strip().split("\n")[0]) from error


def _job() -> Any:
    """A job whose workers import this program and what is installed, not what lies in the working directory."""
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _get_proto_job_config(self) -> Any:
            self._py_driver_sys_path = paths_of_workers()  # in place of the driver's script and working directory
            return super()._get_proto_job_config()  # type: ignore[no-untyped-call]

    return Job()


def absent(address: str, reason: str) -> ClusterError:
    """The error of an address where no cluster answers."""
    return ClusterError(
        f"--ray-address {address}: no Ray cluster answers ({reason}): start one with `ray start --head`, or leave "
        "--ray-address out to run on this machine"
    )


def _nodes() -> tuple[Node, ...]:
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = []
    for told in ray.nodes():
        has = told["Resources"]
        if told["Alive"]:
            tag = next(name for name in has if name.startswith("node:") and "internal" not in name)
            found.append(Node(told["NodeID"], has.get("CPU", 0.0), has.get("GPU", 0.0), tag))
    return tuple(sorted(found, key=lambda node: node.id != here))


def check_before_start(specs: Iterable[Spec], context: RunContext, cluster: Cluster) -> None:
    """Raise `ClusterError` where the plan does not fit the cluster; starts no Ray on this machine."""
    if cluster.address is None:
        check_resources(specs, context, (Node("here", cluster.cpus, cluster.gpus, ""),))
        return
    with connected(cluster) as nodes:
        check_resources(specs, context, nodes)
        check_store(context, nodes)


def check_resources(specs: Iterable[Spec], context: RunContext, nodes: tuple[Node, ...]) -> None:
    """Raise `ClusterError` for a stage that would wait for ever: what it asks for, what there is, what to do."""
    gpus = context.gpus_per_stage
    if gpus > 1 and gpus != int(gpus):
        raise ClusterError(f"--gpus-per-stage {gpus:g}: more than one GPU must be a whole number of them")
    for spec in specs:
        kind = str(getattr(spec, "kind", "unknown"))
        asked = gpus if uses_device(spec) else 0.0
        if spec.world_size > 1 and 0 < asked < 1 and context.device.startswith("cuda"):
            raise ClusterError(
                f"--gpus-per-stage {gpus:g}: the {spec.world_size} ranks of a {kind} stage cannot share a GPU (nccl): "
                "give them one each, or set numerics.world_size to 1"
            )
        largest = max((node.cpus for node in nodes), default=0)
        if spec.threads > largest:
            raise ClusterError(
                f"a {kind} stage asks for {spec.threads} threads and the largest node has {largest:g} cores: lower "
                "threads (numerics.threads, teacher.threads)"
            )
        most = max((node.gpus for node in nodes), default=0)
        if asked > most:
            raise ClusterError(
                f"a {kind} stage asks for {asked:g} GPUs and the largest node has {most:g}: lower --gpus-per-stage, or "
                "use --device cpu"
            )
        places = sum(_ranks_that_fit(node, spec.threads, asked) for node in nodes)
        if spec.world_size > places:
            raise ClusterError(
                f"a {kind} stage asks for {spec.world_size} ranks of {spec.threads} threads and {asked:g} GPUs each "
                f"and the cluster holds {places} of them (its largest node has {largest:g} cores and {most:g} GPUs): "
                "lower numerics.world_size or threads"
            )


def _ranks_that_fit(node: Node, threads: int, gpus: float) -> int:
    by_gpus = math.floor(node.gpus / gpus + 1e-9) if gpus else math.inf
    return int(min(node.cpus // threads, by_gpus))


def uses_device(spec: Spec) -> bool:
    """Whether a stage computes on the run's device."""
    return getattr(spec, "kind", "") not in READS_FILES


def check_store(context: RunContext, nodes: tuple[Node, ...]) -> None:
    """Raise `ClusterError` for a node that does not see the driver's store, or not this program."""
    import ray

    marker = Store(Path(context.store)).root / f".seen-{os.getpid()}"
    marker.write_text("")
    try:
        looks = [ray.remote(_sees).options(num_cpus=0, **pinned(node)).remote(str(marker)) for node in nodes]
        for node, look in zip(nodes, looks, strict=True):
            try:
                seen = ray.get(look)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().split("\n")[-1]
                raise ClusterError(f"node {node.id[:8]} ({node.tag}) cannot run layerswap: {reason}") from error
            if not seen:
                raise ClusterError(
                    f"node {node.id[:8]} ({node.tag}) does not see the store {context.store}: give a --home on a file "
                    "system that all nodes share, at the same path"
                )
    finally:
        marker.unlink()


def _sees(marker: str) -> bool:
    return Path(marker).exists()


def pinned(node: Node) -> dict[str, Any]:
    """Ray options of a task or actor that must be on this node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
