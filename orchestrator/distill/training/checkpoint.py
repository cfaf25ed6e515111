"""Mid-stage checkpoints: safetensors and JSON, checked by digest, the newest two kept.

Invariant: a checkpoint is used only if its manifest and its tensors have the digests that the manifest states, so a
torn or flipped one leads back to the one before it.

Writing takes at most `SHARE` of the time: a large state is written more rarely than the run asks for.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator.distill.context import checkpoint_folders
from orchestrator.distill.models.shards import spread_as, whole
from orchestrator.distill.training.ranks import is_first
from orchestrator.files import published_directory, read_json, sealed, sha256_file, unsealed, write_json

KEEP = 2
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
SHARE = 0.03  # of the time may be spent on writing
BYTES_PER_SECOND = 5e8  # digested, written and synced, until the first was timed: about what a local SSD does


@dataclasses.dataclass
class Pace:
    """When the next checkpoint is due.

    Attributes:
        every: seconds between two of them where they are cheap; 0 is every time, whatever they cost.
        last: when the last one was written, or training began.
        cost: seconds that writing one takes, as the last one did.
    """

    every: float
    last: float
    cost: float

    def due(self, now: float) -> bool:
        """Whether writing one now leaves training its share of the time."""
        return self.every == 0 or now - self.last >= max(self.every, self.cost * (1 / SHARE - 1))

    def written(self, began: float, ended: float) -> None:
        """Take note of one."""
        self.last, self.cost = ended, ended - began


def expected_seconds(model: nn.Module) -> float:
    """What writing a checkpoint may take, before one was written: of each trained parameter two moments as well."""
    return 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad) / BYTES_PER_SECOND


def save_checkpoint(
    work: Path,
    step: int,
    seconds: float,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Mapping[str, torch.Tensor],
) -> None:
    """Publish the trainable parameters, their average by name where there is one, optimizer states and random state of
    `step`; drop all but the newest two.

    Where ranks share the stage, all call it and the first writes, whole what is spread over them.
    """
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"average/{name}": mean for name, mean in average.items()}
    numbers: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for position, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                where = f"optimizer/{index}/{position}/{name}"
                if isinstance(value, torch.Tensor):
                    tensors[where] = value
                else:
                    numbers[where] = value
    tensors |= {name: generator.get_state() for name, generator in _generators(model).items()}
    kept = {}
    for name, value in tensors.items():
        together = whole(value)
        if is_first():
            kept[name] = together.cpu().contiguous()
    if not is_first():
        return
    with published_directory(work / f"step-{step:06d}") as folder:
        save_file(kept, folder / TENSORS)
        digest = sha256_file(folder / TENSORS)
        manifest = {"step": step, "seconds": seconds, "numbers": numbers, "tensors": digest}
        write_json(folder / MANIFEST, sealed(manifest))
    for old in checkpoint_folders(work)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    work: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Mapping[str, torch.Tensor],
    say: Callable[[str], object],
) -> tuple[int, float]:
    """Restore the newest whole checkpoint in place; one that is found damaged is said, then removed.

    Returns:
        The step to go on from (0 where there is no checkpoint), and the seconds spent so far.
    """
    for folder in reversed(checkpoint_folders(work)):
        try:
            manifest = unsealed(read_json(folder / MANIFEST))
            if sha256_file(folder / TENSORS) != manifest["tensors"]:
                raise ValueError("its tensors do not have the digest of its manifest")
            tensors = load_file(folder / TENSORS)
        except (OSError, ValueError, KeyError) as error:
            say(f"checkpoint {folder.name} is damaged ({error}); going back to the one before it")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        _restore(tensors, manifest["numbers"], model, optimizers, average)
        return int(manifest["step"]), float(manifest["seconds"])
    return 0, 0.0


def _restore(
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Mapping[str, torch.Tensor],
) -> None:
    trained = {f"model/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name for name in tensors if name.startswith("model/")}
    if saved != set(trained):
        raise ValueError(
            f"the checkpoint holds other parameters than the stage trains: {sorted(saved ^ set(trained))[:3]}"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread_as(parameter, tensors[name]))
        for name, mean in average.items():
            mean.copy_(spread_as(mean, tensors[f"average/{name}"]))
    for index, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for where, value in [*tensors.items(), *numbers.items()]:
            if where.startswith(f"optimizer/{index}/"):
                _, _, position, name = where.split("/", 3)
                if isinstance(value, torch.Tensor) and value.shape == parameters[int(position)].shape:
                    value = spread_as(parameters[int(position)], value)
                state.setdefault(int(position), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for name, generator in _generators(model).items():
        if name in tensors:  # the attempt before may have had another device
            generator.set_state(tensors[name])


def _generators(model: nn.Module) -> dict[str, torch.Generator]:
    """By name, what random numbers are drawn from: the processor's, and that of the GPU the model is on."""
    found = {"random": torch.default_generator}
    device = next(model.parameters()).device
    if device.type == "cuda":
        found["random/device"] = torch.cuda.default_generators[device.index]
    return found
