"""`python -m tests.distill.two_ranks RANK FOLDER`: the stages that FOLDER/jobs.json names, as one of two gloo ranks.

All of a test file's stages share two processes, one of them the test's own: that a process imports torch and
transformers takes longer than the stages.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from orchestrator.distill import stage
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.stage import run_stage
from orchestrator.distill.training import loop
from orchestrator.distill.training.loop import Training
from orchestrator.files import write_json
from orchestrator.study.spec import spec_from_json
from tests.held import held_bytes

LAST = 3  # the step that is looked at


class Killed(BaseException):
    """Stands for a process that ends without a chance to tidy up."""


class Watch:
    """Looks at the training of a stage: what is whole when a loss was taken, what is held beside its gradients."""

    def __init__(self, killed_at: int | None, weighed: bool) -> None:
        self.killed_at = killed_at
        self.whole: list[str] = []
        self.held = 0
        self.before = held_bytes() if weighed else None

    def train(self, training: Training, place: Workplace) -> dict[str, Any]:
        usual, average = training.loss, loop.average_gradients

        def loss(step: int) -> Any:
            if step == self.killed_at:
                self.killed_at = None
                raise Killed
            found = usual(step)
            if step == LAST:
                self.whole = _whole(training.model)
                loop.average_gradients = look
            return found

        def look(parameters: Any) -> None:
            average(parameters)
            self.held = 0 if self.before is None else held_bytes() - self.before

        object.__setattr__(training, "loss", loss)
        try:
            return loop.train(training, place)
        finally:
            loop.average_gradients = average


def _whole(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def run_job(job: dict[str, Any], folder: Path, rank: int) -> None:
    """Compute a stage, killed once at the step `killed_at`, and write down what was seen of it."""
    spec, out = spec_from_json(json.dumps(job["spec"])), folder / str(rank)
    seconds = 0.0 if job["killed_at"] and rank == 0 else math.inf  # the first rank says when
    context = RunContext(str(folder), checkpoint_seconds=seconds, log_every=1)
    place = Workplace(
        {role: Path(path) for role, path in job["inputs"].items()}, folder / "work", out, out, context, print
    )
    out.mkdir(parents=True)
    watch = Watch(job["killed_at"], job["weighed"])
    stage.train = watch.train
    try:
        result = run_stage(spec, place)
    except Killed:
        result = run_stage(spec, place)
    finally:
        stage.train = loop.train
    write_json(out / "told.json", {"whole": watch.whole, "held": watch.held, "result": result})


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    gc.freeze()  # what is imported, from here on: looking through it for tensors takes longer than a stage
    try:
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            run_job(job, folder / name, rank)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
