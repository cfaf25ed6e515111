"""Training steps of a study's teacher and students: Muon's matrices one at a time and in batches, and on a CPU
attention rounded like other products (`numerics.matmul: medium`) and in float32.

`python -m tests.benchmarks.steps studies/gpu.yaml`, or another study that makes its teacher and trains by Muon;
`--device cpu` measures the default one. Steps are those of stages, with optimizer, losses and the check of their
numbers, but the tokens are random and there before, and students start random, since speed does not depend on it.
Medians of turns, and of ratios to the first way with an interval of 95 %.
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
from orchestrator.distill.measuring.intervals import median_interval
from orchestrator.distill.models.student import new_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training import muon
from orchestrator.distill.training import optimizers as optim
from orchestrator.distill.training.attention import ATTENTIONS, SDPA
from orchestrator.distill.training.loop import Parts, Training, autocast, prepare
from orchestrator.distill.training.loop import _step as step
from orchestrator.distill.training.losses import batch_losses, next_token_loss, train_operators_only
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import make_plan
from orchestrator.study.sources import resolve
from orchestrator.study.spec import DistilSpec, TeacherSpec

# Muon, and whether attention is in float32 where other products are rounded.
WAYS = {"one at a time": (torch.optim.Muon, True), "in batches": (muon.BatchedMuon, True)}
ON_CPU = {
    "one at a time, attention rounded": (torch.optim.Muon, False),
    "in batches": (muon.BatchedMuon, False),
    "and attention in float32": (muon.BatchedMuon, True),
}
STEPS, TURNS = 4, 9


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


def compare(make: Callable[[], Training], device: str) -> dict[str, str]:
    """Milliseconds of a step by way, the ways in turn, and how long it takes of the first way's."""
    ways = ON_CPU if device == "cpu" else WAYS
    runs: dict[str, tuple[Training, Any]] = {}
    exact = ATTENTIONS[SDPA]
    for way, (kind, in_float32) in ways.items():
        setattr(optim, "BatchedMuon", kind)  # noqa: B010
        runs[way] = make(), exact if in_float32 else exact.function
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way, (training, ATTENTIONS[SDPA]) in runs.items():
            wait(device)
            began = time.perf_counter()
            for index in range(STEPS):
                step(training, index)
            wait(device)
            if turn:  # the first warms up
                taken[way].append(1e3 * (time.perf_counter() - began) / STEPS)
    ATTENTIONS[SDPA] = exact
    first, *others = taken
    told = {first: f"{statistics.median(taken[first]):.1f} ms"}
    for way in others:
        ratios = [one / before for one, before in zip(taken[way], taken[first], strict=True)]
        low, high = median_interval([ratios]) or (ratios[0], ratios[0])
        shown = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        told[way] = f"{statistics.median(taken[way]):.1f} ms, {shown}"
    return told


def wait(device: str) -> None:
    """Until the device has done what it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print a line for the teacher and for every kind of student."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.steps", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    options = parser.parse_args()
    device, document = options.device, read_document(options.study)
    study = validate(document)
    specs = make_plan(document, study, resolve(study, options.study.parent)).specs.values()
    taught = next((spec for spec in specs if isinstance(spec, TeacherSpec)), None)
    if taught is None or study.recipe.optimizer.method != "muon":
        parser.error(f"{options.study} must make its teacher and train by Muon: see studies/gpu.yaml")
    prepare(taught.numerics, taught.seed)
    teacher = new_teacher(taught.architecture, taught.seed).to(device).eval().requires_grad_(False)
    kinds: dict[str, tuple[Any, Callable[[], Training]]] = {}
    kinds["teacher"] = taught.numerics, lambda: teaching(taught, teacher, device)
    for spec in specs:
        if isinstance(spec, DistilSpec) and spec.phases and isinstance(spec.operator, HyenaConfig):
            name = f"layers {', '.join(map(str, spec.layers))}, {spec.operator}"
            kinds[name] = spec.numerics, lambda spec=spec: distilling(spec, teacher, device)  # type: ignore[misc]
    for name, (numerics, make) in kinds.items():
        if options.only in name:
            prepare(numerics)
            print(name, compare(make, device), flush=True)


if __name__ == "__main__":
    main()
