"""A mean over the weights of training's steps, which a stage may end with instead of its last weights.

Exponential (Polyak and Juditsky 1992, with a decay) or plain over the last steps (Izmailov et al. 2018). Invariant: the
mean after a step is a function of the weights after the steps so far, so a checkpoint of both goes on with its bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orchestrator.study.recipe import Average


class WeightAverage:
    """The mean of all weights that train, beside the model; `tensors` has it by the names of parameters.

    Args:
        config: which mean; None for none, whose `tensors` are empty and which leaves the weights as they are.
        steps: of the training, of which `config.last` is a share.
    """

    def __init__(self, model: nn.Module, config: Average | None, steps: int) -> None:
        self._decay, last = (None, None) if config is None else (config.ema, config.last)
        wanted = () if config is None else model.named_parameters()
        self._trained = {name: p for name, p in wanted if p.requires_grad}
        self._first = 1 if last is None else steps - math.ceil(last * steps) + 1
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        count = step - self._first + 1  # of the weights in the mean, these included
        if count < 1:
            return
        share = 1.0 / count if self._decay is None or count == 1 else 1.0 - self._decay
        for name, mean in self.tensors.items():
            mean.lerp_(self._trained[name], share)

    @torch.no_grad()
    def put(self) -> None:
        """The weights of the model become their mean."""
        for name, mean in self.tensors.items():
            self._trained[name].copy_(mean)
