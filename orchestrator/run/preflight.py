"""What would stop a run is told before it writes anything: an unknown device, an absent cluster, too few cores, too
little memory. And what it leaves unused.

Place in the flow: between the plan and the sweep. Invariant: no answer takes long, and nothing is created but the
store where the nodes of a cluster have to show that they see it.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Collection, Mapping
from typing import Any

import psutil

from orchestrator.distill.context import RunContext
from orchestrator.run.cluster import Cluster, ClusterError, absent, check_before_start
from orchestrator.run.limits import cores, memory_left
from orchestrator.run.temporary import TemporaryError, temporary_root
from orchestrator.study.plan import Plan, stage_memory
from orchestrator.study.recipe import Numerics
from orchestrator.study.spec import DEVICES, DistilSpec, EvaluateSpec, ScratchSpec, TeacherSpec, ThroughputSpec, short

ANSWER_SECONDS = 5.0
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of HTTP/2, which Ray's head speaks
SETTINGS = 4  # type of the frame that answers it


def check_run(plan: Plan, context: RunContext, cluster: Cluster) -> None:
    """Raise `ClusterError` where the plan cannot run so: interval, device, cluster and its cores."""
    if not (math.isfinite(context.checkpoint_seconds) and context.checkpoint_seconds > 0):
        raise ClusterError(
            f"--checkpoint-seconds {context.checkpoint_seconds:g} must be a finite number above 0, for example 15"
        )
    if context.device not in DEVICES:
        raise ClusterError(f"--device {context.device} is not known: give one of {', '.join(DEVICES)}")
    try:
        temporary_root()
    except TemporaryError as error:
        raise ClusterError(str(error)) from None
    if cluster.address is None:
        if context.device == "cuda" and not cluster.gpus:
            raise ClusterError(
                "--device cuda needs an accelerator that torch can use, and this machine has none: give --device cpu, "
                "or the --ray-address of a cluster that has one"
            )
        _check_core(plan)
    else:
        _knock(cluster.address)
    check_before_start(plan.specs.values(), context, cluster)


def cores_asked(asked: int | None, address: str | None) -> int:
    """The cores of this machine to use: so many, or all; `ClusterError` where it does not give them to this process."""
    most = cores()
    if asked is not None and address is not None:
        raise ClusterError(f"--cpus {asked} is of this machine, and --ray-address {address} of others: leave one out")
    if asked is not None and asked > most:
        raise ClusterError(f"--cpus {asked}: this process may use {most} cores: lower it, or leave it out")
    return asked or most


def check_memory(
    plan: Plan, speeds: Mapping[str, ThroughputSpec], context: RunContext, cluster: Cluster, done: Collection[str]
) -> None:
    """Raise `ClusterError` where a stage outside `done`, by its key, cannot fit the memory of this machine or its GPU.

    A cluster's nodes are not asked: their memory is not this machine's.
    """
    if cluster.address is not None:
        return
    free, what = available_bytes(context), "of the GPU " if context.device == "cuda" else ""
    for key, memory in stage_memory(plan, speeds, context.device).items():
        if key not in done and memory.bytes > free:
            raise ClusterError(
                f"stage {short(key)} ({memory.name}) needs about {memory.bytes / 1e9:.1f} GB {what}and "
                f"{free / 1e9:.1f} GB are free: {', '.join(_remedies(memory.spec))}"
            )


def available_bytes(context: RunContext) -> int:
    """The memory that one process of a stage may have: of the machine and its control group, or of a GPU's share."""
    if context.device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0] * min(1.0, context.gpus_per_stage or 1.0))
    free = psutil.virtual_memory().available
    return int(min(free, memory_left()))


def free_for_stages(context: RunContext, cluster: Cluster) -> int | None:
    """The memory that stages may take together at this moment; none where it is not counted: of the nodes of a cluster,
    and of a GPU, whose shares are."""
    return None if cluster.address is not None or context.device == "cuda" else available_bytes(context)


def _remedies(spec: Any) -> list[str]:
    """What would make a stage smaller, and is not done already."""
    alone = isinstance(spec, TeacherSpec | ScratchSpec)
    spreads = isinstance(spec, TeacherSpec | ScratchSpec | DistilSpec) and spec.world_size > 1
    found = {
        "set numerics.sharding to full": spreads and spec.numerics.sharding == "none",
        "set recipe.checkpoint_activations": not getattr(spec, "checkpoint_activations", True),
        "lower recipe.batch_size": isinstance(spec, DistilSpec | ScratchSpec) and spec.batch_size > 1,
        "lower teacher.batch_size": isinstance(spec, TeacherSpec) and spec.batch_size > 1,
        "lower evaluation.batch_size": isinstance(spec, EvaluateSpec) and spec.evaluation.batch_size > 1,
        "set numerics.dtype and teacher_dtype to bfloat16": not alone and spec.numerics.teacher_dtype == "float32",
        "set recipe.optimizer.rest_scale to 0": isinstance(spec, DistilSpec) and spec.optimizer.rest_scale > 0,
    }
    return [*(remedy for remedy, helps in found.items() if helps), "or take a machine that has as much"]


def idle_gpus(context: RunContext, cluster: Cluster) -> int:
    """How many GPUs of this machine the run was not asked to use."""
    return cluster.gpus if cluster.address is None and context.device == "cpu" else 0


def slow_products(plan: Plan, context: RunContext, cluster: Cluster) -> str | None:
    """What is told where this machine computes in a precision that its processor has no instructions for."""
    if context.device != "cpu" or cluster.address is not None or all(n.dtype != "bfloat16" for n in _numerics(plan)):
        return None
    from orchestrator.distill.training.muon import multiplies_bfloat16  # imports torch

    if multiplies_bfloat16("cpu"):
        return None
    return (
        "numerics.dtype is bfloat16, which this processor has no instructions for: products take many times as long as "
        "in float32; set numerics.dtype (and teacher_dtype) to float32, or take --device cuda or another machine"
    )


def _numerics(plan: Plan) -> list[Numerics]:
    """What the plan's stages compute in, of those that compute."""
    return [spec.numerics for spec in plan.specs.values() if hasattr(spec, "numerics")]


def _check_core(plan: Plan) -> None:
    """Raise `ClusterError` where stages ask for a compiled core and this machine has none."""
    if all(one.core != "native" for one in _numerics(plan)):
        return
    from operators.native import available  # imports torch

    if not available():
        raise ClusterError(
            "numerics.core native needs the compiled core, and this machine has none: run make build-ext, or set "
            "numerics.core to torch"
        )


def _knock(address: str) -> None:
    """Ask the address for a sign of Ray: `ray.init` would try for minutes, and end the process where it gets none."""
    given = f"--ray-address {address}"
    if address == "auto":  # Ray looks into the variable first, then for a cluster of this machine
        address = os.environ.get("RAY_ADDRESS") or "auto"
        given += f" (RAY_ADDRESS={address})"
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ClusterError(f"{given} is no address: give host:port of the cluster's head node, or auto")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)
    except (OSError, OverflowError) as error:
        raise absent(address, str(error)) from error
    answer = b""
    with contextlib.suppress(OSError), connection:
        if os.environ.get("RAY_USE_TLS", "0") == "1":
            return
        connection.sendall(HELLO)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise absent(address, "what answers there is not Ray")
