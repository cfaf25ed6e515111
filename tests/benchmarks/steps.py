"""Training steps of a study's teacher and students on a GPU, Muon's matrices one at a time and in batches.

`python -m tests.benchmarks.steps studies/gpu.yaml`, or another study that makes its teacher and trains by Muon. Steps
are those of stages, with optimizer, losses and the check of their numbers, but the tokens are random and there before,
and students start random, since speed does not depend on it. Medians of turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from operators.config import HyenaConfig
from orchestrator.distill.models.student import new_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training import muon
from orchestrator.distill.training import optimizers as optim
from orchestrator.distill.training.loop import Parts, Training, autocast, prepare
from orchestrator.distill.training.loop import _step as step
from orchestrator.distill.training.losses import batch_losses, next_token_loss, train_operators_only
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import make_plan
from orchestrator.study.sources import resolve
from orchestrator.study.spec import DistilSpec, TeacherSpec

WAYS = {"one at a time": torch.optim.Muon, "in batches": muon.BatchedMuon}
STEPS, TURNS = 4, 6


def teaching(spec: TeacherSpec, teacher: Any, device: str) -> Training:
    """Steps of a copy of the teacher."""
    model = copy.deepcopy(teacher).train().requires_grad_(True)
    size = (spec.batch_size, spec.sequence_length)
    ids_BL = torch.randint(spec.architecture.vocabulary, size, device=device)

    def loss(_: int) -> tuple[torch.Tensor, Parts]:
        with autocast(spec.numerics, device):
            entropy = next_token_loss(model, ids_BL)
        return entropy, {"loss/ce": entropy.detach()}

    made = optim.make_optimizers(model, spec.optimizer)
    return Training(model, made, spec.optimizer, 1000, ids_BL.numel(), loss)


def distilling(spec: DistilSpec, teacher: Any, device: str) -> Training:
    """Steps of a student with all layers swapped that the stage ends with, by the losses of its first phase."""
    student = copy.deepcopy(teacher).cpu()
    assert isinstance(spec.operator, HyenaConfig)
    operator = dataclasses.replace(spec.operator, init="random")
    swap(student, spec.layers, operator, torch.Generator().manual_seed(0))
    train_operators_only(student.to(device))
    size = (spec.batch_size, spec.sequence_length)
    ids_BL = torch.randint(teacher.config.vocab_size, size, device=device)

    def loss(_: int) -> tuple[torch.Tensor, Parts]:
        with autocast(spec.numerics, device):
            return batch_losses(teacher, student, ids_BL, spec.layers, spec.phases[0].losses)

    made = optim.make_optimizers(student, spec.optimizer, spec.freeze)
    return Training(student, made, spec.optimizer, 1000, ids_BL.numel(), loss)


def compare(make: Callable[[], Training]) -> dict[str, float]:
    """Milliseconds of a step by way, the ways in turn."""
    runs = {}
    for way, optim.BatchedMuon in WAYS.items():  # type: ignore[misc]
        runs[way] = make()
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(TURNS):
        for way, training in runs.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for index in range(STEPS):
                step(training, index)
            torch.cuda.synchronize()
            if turn:  # the first warms up
                taken[way].append(1e3 * (time.perf_counter() - began) / STEPS)
    return {way: statistics.median(times) for way, times in taken.items()}


def main() -> None:
    """Measure and print a line for the teacher and for every kind of student."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.steps", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if not options.device.startswith("cuda"):
        parser.error("on a CPU there is one kind of Muon: give --device cuda")
    device, document = options.device, read_document(options.study)
    study = validate(document)
    specs = make_plan(document, study, resolve(study, options.study.parent)).specs.values()
    taught = next((spec for spec in specs if isinstance(spec, TeacherSpec)), None)
    if taught is None or study.recipe.optimizer.method != "muon":
        parser.error(f"{options.study} must make its teacher and train by Muon: see studies/gpu.yaml")
    prepare(taught.numerics, taught.seed)
    teacher = new_teacher(taught.architecture, taught.seed).to(device).eval().requires_grad_(False)
    kinds: dict[str, Callable[[], Training]] = {"teacher": lambda: teaching(taught, teacher, device)}
    for spec in specs:
        if isinstance(spec, DistilSpec) and spec.phases and isinstance(spec.operator, HyenaConfig):
            kinds[str(spec.operator)] = lambda spec=spec: distilling(spec, teacher, device)  # type: ignore[misc]
    for name, make in kinds.items():
        print(name, {way: round(milliseconds, 1) for way, milliseconds in compare(make).items()}, flush=True)


if __name__ == "__main__":
    main()
