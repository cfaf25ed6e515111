"""Optimizers and the learning-rate schedule of a stage, both pure functions of configuration and step."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from orchestrator.distill.models.sites import decoder_layers
from orchestrator.distill.training.muon import BatchedMuon
from orchestrator.study.recipe import Optimizer

MUON_MOMENTUM = 0.95


def make_optimizers(model: Any, config: Optimizer, freeze: tuple[str, ...] = ()) -> list[torch.optim.Optimizer]:
    """Optimizers over the parameters that are to train; all others are frozen.

    Muon takes weight matrices (not embeddings, output heads or filters), AdamW the rest. Parameters outside swapped
    operators get `rest_scale` times the learning rate; a scale of 0 freezes them. Those of lower layers get what
    `depth_scales` says. A parameter of several names, as an output head that is tied to the embedding, is frozen by
    each of them. Raises `ValueError` for a glob in `freeze` that matches no parameter, and where nothing is left to
    train.
    """
    choose_trained(model, config, freeze)
    tables = set(_tables(model))
    depth = depth_scales(model, config.layer_decay)
    groups: dict[tuple[bool, tuple[bool, float]], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        operator = ".operator." in name
        if parameter.requires_grad:
            plain = parameter.ndim == 2 and name not in tables and ".filter." not in name and "short_" not in name
            place = (operator, depth[parameter])
            groups.setdefault((config.method == "muon" and plain, place), []).append(parameter)
    if not groups:
        raise ValueError("recipe.freeze leaves no parameter to train: take a pattern out")
    return [
        made
        for matrices in (True, False)
        if (made := _optimizer(matrices, {at: g for (m, at), g in groups.items() if m == matrices}, config))
    ]


def depth_scales(model: Any, layer_decay: float) -> dict[nn.Parameter, float]:
    """What the learning rate of each parameter is multiplied by for its depth (Howard and Ruder 2018): `layer_decay` to
    the power of the layers above it, of which embeddings have one more than the first layer, and the rest none."""
    layers = decoder_layers(model)
    found = dict.fromkeys(model.parameters(), 1.0)
    parts = [model.get_input_embeddings(), *layers]
    for index, part in enumerate(parts):
        found |= dict.fromkeys(part.parameters(), layer_decay ** (len(layers) - index))
    return found


def choose_trained(model: nn.Module, config: Optimizer, freeze: tuple[str, ...] = ()) -> None:
    """Freeze all but the parameters that are to train. Raises `ValueError` for a glob that matches no parameter."""
    names = [name for several in _names(model).values() for name in several]
    for pattern in freeze:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"recipe.freeze: {pattern!r} matches no parameter; names look like {names[0]!r}")
    set_trainable(model, config.rest_scale > 0, freeze)


def set_trainable(model: nn.Module, rest: bool, freeze: tuple[str, ...], mixers: Collection[nn.Parameter] = ()) -> None:
    """Say which parameters get gradients: those of operators and `mixers`, with `rest` all others too.

    What a glob of `freeze` matches by any of its names gets none, nor what an operator itself holds fixed.
    """
    own = set(mixers)
    for parameter, names in _names(model).items():
        mixer = ".operator." in names[0] or parameter in own
        fixed = _fixed_in_operator(names[0]) and not parameter.requires_grad
        frozen = fixed or any(fnmatch.filter(names, pattern) for pattern in freeze)
        parameter.requires_grad_(not frozen and (mixer or rest))


def _names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all its names."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's own learning rate, kept in `initial_lr`, by `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def schedule(step: int, steps: int, config: Optimizer) -> float:
    """Warmup-stable-decay: the factor at `step` of `steps`, in (0, 1]; linear at both ends."""
    warmup, decay = config.warmup * steps, config.decay * steps
    rising = (step + 1) / warmup if warmup > 0 else 1.0
    falling = (steps - step) / decay if decay > 0 else 1.0
    return min(1.0, rising, falling)


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """How many parameters train, in the operators and in the rest, of how many."""
    operator = [p for name, p in model.named_parameters() if ".operator." in name]
    rest = [p for name, p in model.named_parameters() if ".operator." not in name]
    return {
        "operator_trainable": sum(p.numel() for p in operator if p.requires_grad),
        "operator_parameters": sum(p.numel() for p in operator),
        "rest_trainable": sum(p.numel() for p in rest if p.requires_grad),
        "rest_parameters": sum(p.numel() for p in rest),
    }


def _tables(model: Any) -> list[str]:
    """Names of embedding and output-head weights, which are look-up tables more than maps."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    found = [name for name, module in modules.items() if isinstance(module, nn.Embedding) or module is head]
    return [f"{name}.weight" for name in found]


def _fixed_in_operator(name: str) -> bool:
    """Whether an operator itself decides if this parameter trains (its positional features, say, or frequencies)."""
    return ".operator.filter." in name or ".operator.near." in name


def _optimizer(
    matrices: bool, groups: dict[tuple[bool, float], list[nn.Parameter]], config: Optimizer
) -> torch.optim.Optimizer | None:
    base = config.matrix_lr if matrices else config.lr
    settings: list[dict[str, Any]] = []
    for (operator, by_depth), parameters in sorted(groups.items(), reverse=True):
        rate = by_depth * (base if operator else base * config.rest_scale)
        settings.append({"params": parameters, "lr": rate, "initial_lr": rate})
    if not settings:
        return None
    if matrices:
        return BatchedMuon(settings, lr=base, weight_decay=config.weight_decay, momentum=MUON_MOMENTUM)
    return torch.optim.AdamW(settings, lr=base, betas=config.betas, weight_decay=config.weight_decay)
