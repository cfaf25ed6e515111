"""A stage of several processes, through Ray Train: each is a rank, and the stage function runs in all of them.

Place in the flow: `compute` holds the stage's claim and waits here without a core; the ranks have the cores and GPUs.
Invariant: only the first rank writes; the others get a place of their own that is thrown away.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from typing import Any

from orchestrator.distill.context import Workplace
from orchestrator.run.log import logged
from orchestrator.run.temporary import temporary_directory

Result = dict[str, Any]

START_TIMEOUT_S = str(7 * 24 * 3600)  # ranks wait for cores that other stages have, like any stage


class RankDied(RuntimeError):
    """A process of the stage ended without an error of its own: the stage goes on from its checkpoint."""


def run_on_ranks(spec: Any, place: Workplace) -> Result:
    """`run_stage` in `spec.world_size` processes; returns what the first one returned.

    Raises `RankDied`, or the error that a rank raised.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    # A process of its own for every start of the ranks, 3 s of a processor, that tells them of a node about to leave:
    # they ask nobody, and go on from their checkpoint.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    context = place.context
    resources = {"CPU": float(spec.threads)}
    if context.gpus_per_stage:
        resources["GPU"] = context.gpus_per_stage
    storage = place.journal / "train"  # Ray Train wants a directory that all nodes see
    on_rank: Any = _on_rank
    trainer: Any = TorchTrainer(
        on_rank,
        train_loop_config={"spec": spec, "place": place},
        torch_config=TorchConfig(backend="nccl" if context.device.startswith("cuda") else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=spec.world_size, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(storage_path=str(storage), name="ranks"),
    )
    try:
        result: Result = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(getattr(error, "worker_failures", {}), str(error)) from None
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return result


def _on_rank(given: dict[str, Any]) -> Result | None:
    from ray.train import get_context
    from ray.train.torch import get_device

    from orchestrator.distill.stage import run_stage  # torch: only where a stage is computed

    place: Workplace = given["place"]
    if place.context.device.startswith("cuda"):
        place = dataclasses.replace(place, context=dataclasses.replace(place.context, device=str(get_device())))
    rank = get_context().get_world_rank()
    with logged(place.journal, f"rank {rank} of {get_context().get_world_size()}"):
        if rank == 0:
            return run_stage(given["spec"], place)
        with temporary_directory("rank") as folder:
            silent = dataclasses.replace(place.context, checkpoint_seconds=math.inf)
            run_stage(given["spec"], dataclasses.replace(place, journal=folder, out=folder, context=silent))
    return None


def _cause(failures: dict[int, Exception], told: str) -> Exception:
    """The first rank's own error; `RankDied` where all that is known is that ranks died or missed another."""
    from orchestrator.distill.training.ranks import PeerLost

    for _, failure in sorted(failures.items()):
        if not (isinstance(failure, PeerLost) or _of_a_library(failure)):
            return failure
    return RankDied(" ".join(told.split())[:200])


def _of_a_library(failure: Exception) -> bool:
    """Whether it is of Ray, or of what carries tensors between ranks: of gloo's and nccl's own not all have a class."""
    module = type(failure).__module__
    carried = isinstance(failure, RuntimeError) and any(name in str(failure) for name in ("/gloo/", "NCCL"))
    return carried or module.split(".")[0] == "ray" or module == "torch.distributed"
