"""Muon for accelerators: torch's, with all matrices of one shape together.

torch's takes matrices one at a time, some twenty small operations each, which a GPU finishes sooner than its processor
asks for them: half of a distillation step at Pythia-70M's shape. Together they are batched products. On CPUs there is
nothing to gain. Method: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

Shapes: N matrices of R rows and C columns, R <= C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOGETHER = 1 << 26  # numbers of one batch at most: what is made on the way takes a few times its memory
BUFFER = "momentum_buffer"


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with batched steps: its arguments, errors and state, and its learning rate by shape
    (`adjust_lr_fn` "original", the only one taken here).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure`, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if BUFFER not in self.state[parameter]:
                self.state[parameter][BUFFER] = torch.zeros_like(parameter)
        momenta = [self.state[p][BUFFER] for p in parameters]
        momentum, rate = group["momentum"], float(group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        wanted = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        for chosen in _alike(parameters):
            rows, columns = parameters[chosen[0]].shape
            x_NRC = torch.stack([wanted[i].bfloat16() if rows <= columns else wanted[i].bfloat16().T for i in chosen])
            x_NRC = orthogonal(x_NRC, group["ns_coefficients"], group["ns_steps"], group["eps"])
            scale = rate * max(1.0, rows / columns) ** 0.5
            for i, x_RC in zip(chosen, x_NRC, strict=True):
                parameters[i].add_(x_RC if rows <= columns else x_RC.T, alpha=-scale)


def orthogonal(x_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrices with orthonormal rows, (N, R, C), by Newton and Schulz's iteration of fifth order."""
    a, b, c = coefficients
    norms_N = torch.stack(torch._foreach_norm(list(x_NRC))).clamp(min=eps)
    x_NRC = x_NRC / norms_N[:, None, None]
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def _alike(parameters: list[Tensor]) -> Iterator[list[int]]:
    """Positions of matrices of one shape and device, at most `TOGETHER` numbers at a time."""
    found: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        found.setdefault((parameter.shape, parameter.device), []).append(index)
    for (shape, _), chosen in found.items():
        most = max(1, TOGETHER // shape.numel())
        for start in range(0, len(chosen), most):
            yield chosen[start : start + most]
