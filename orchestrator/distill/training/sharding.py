"""A stage's models spread over its ranks, each of which holds its rows of every parameter (FSDP2, `fully_shard`).

A layer's parameters are gathered while it runs, forward and backward, and let go. Operators are gathered on their own,
since the mixer loss calls them alone; embedding, output head and what else lies outside of layers for a whole step,
since the losses take logits in chunks. Invariant: a stage's losses are those of ranks that hold everything, but for the
order of sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from orchestrator.distill.models.sites import Replacement, decoder_layers
from orchestrator.distill.training.ranks import world_size

Loss = Callable[[int], tuple[Tensor, dict[str, Tensor]]]


class _Step(nn.Module):
    """The loss of a step as a forward pass, so that what lies outside of layers is whole from here to its gradients."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, loss: Loss, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        value, parts = loss(step)
        return value.clone(), parts  # no view, see `_apart`


def shard(device: str, model: Any, teacher: Any = None) -> Callable[[Loss], Loss]:
    """Spread a model, and the frozen teacher that it shares parameters with, over the ranks.

    What trains of the model is its own afterwards, in float32; the rest stays shared. Returns what makes a loss of the
    two models one that may be taken of them now.

    Raises ValueError where parameters are not what can be spread.
    """
    _check(model)
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    spread: Any = partial(fully_shard, mesh=mesh)
    layers = decoder_layers(model)
    for layer, frozen in zip(layers, [None] * len(layers) if teacher is None else decoder_layers(teacher), strict=True):
        shared = [] if frozen is None else list(_shared(layer, frozen))
        _widen(layer)
        for module in layer.modules():
            if isinstance(module, Replacement) and any(True for _ in module.parameters()):
                module.register_forward_hook(_apart)
                spread(module)
        spread(layer)
        if frozen is not None:
            spread(frozen)
            rows = frozen.state_dict()
            layer.load_state_dict({name: rows[name] for name in shared}, strict=False, assign=True)
    _widen(model)
    if teacher is not None:
        for name in list(_shared(model, teacher)):
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, teacher.get_parameter(name))
    step = spread(_Step(model) if teacher is None else _Step(model, teacher))
    return lambda loss: partial(step, loss)


def _apart(_: nn.Module, __: Any, output: Any) -> Any:
    """The output of an operator in memory of its own: a view that is changed in place loses the hook that gathers for
    its gradient."""
    first = output[0] if isinstance(output, tuple) else output
    own = first.clone() if first._is_view() else first
    return (own, *output[1:]) if isinstance(output, tuple) else own


def _widen(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def _shared(module: nn.Module, frozen: nn.Module) -> Iterator[str]:
    """Names of what does not train and lies where that of the same name of `frozen` does."""
    theirs = dict(frozen.named_parameters(remove_duplicate=False))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        kept = not parameter.requires_grad and not isinstance(parameter, DTensor) and name in theirs
        if kept and parameter.data_ptr() == theirs[name].data_ptr():
            yield name


def _check(model: Any) -> None:
    owners = Counter(parameter for layer in decoder_layers(model) for parameter in set(layer.parameters()))
    for name, parameter in model.named_parameters():
        told = "is one number" if parameter.ndim == 0 else "belongs to several layers" if owners[parameter] > 1 else ""
        if told:
            raise ValueError(f"{name} {told}, which cannot be spread over ranks: set numerics.sharding to none")
