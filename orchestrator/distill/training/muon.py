"""Muon: torch's, with all matrices of one shape together.

torch's takes matrices one at a time, some twenty small operations each, which a GPU finishes sooner than its processor
asks for them: a quarter of a student's step at Pythia-70M's shape, nearly half of its teacher's. Together they are
batched products. On CPUs too, where matrices are small: the default study's take half of the time on two threads.
Products are in bfloat16 as torch's, but for CPUs that have no instructions for it: there torch multiplies number by
number, and a step of the default study's teacher would take four times as long.
Method: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

Shapes: N matrices of R rows and C columns, R <= C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orchestrator.distill.models.shards import spread_as, whole

TOGETHER = 1 << 26  # numbers of one batch at most: what is made on the way takes a few times its memory
ON_CPU = 1 << 22  # large matrices gain nothing there
BUFFER = "momentum_buffer"


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with batched steps, the same arguments and state.

    Raises ValueError for an `adjust_lr_fn` other than "original".
    """

    def __init__(self, *arguments: Any, adjust_lr_fn: str | None = None, **more: Any) -> None:
        if adjust_lr_fn not in (None, "original"):
            raise ValueError(f"adjust_lr_fn must be original here but is {adjust_lr_fn!r}: use torch.optim.Muon.")
        super().__init__(*arguments, **more)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure`, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for alike in _alike([p for p in group["params"] if p.grad is not None]):
                self._update(alike, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """A step of matrices of one shape."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if BUFFER not in self.state[parameter]:
                self.state[parameter][BUFFER] = torch.zeros_like(parameter)
        momenta = [self.state[p][BUFFER] for p in parameters]
        momentum, rate = group["momentum"], float(group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        wanted = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        rows, columns = parameters[0].shape
        narrow = [whole(x.bfloat16()) for x in wanted]
        x_NRC = torch.stack([x if rows <= columns else x.T for x in narrow])
        x_NRC = x_NRC if multiplies_bfloat16(x_NRC.device.type) else x_NRC.float()
        x_NRC = orthogonal(x_NRC, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        scale = rate * max(1.0, rows / columns) ** 0.5
        for parameter, x_RC in zip(parameters, x_NRC, strict=True):
            parameter.add_(spread_as(parameter, x_RC if rows <= columns else x_RC.T), alpha=-scale)


def orthogonal(x_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrices with orthonormal rows, (N, R, C), by Newton and Schulz's iteration of fifth order."""
    a, b, c = coefficients
    norms_N = torch.stack(torch._foreach_norm(list(x_NRC))).clamp(min=eps)
    x_NRC = x_NRC / norms_N[:, None, None]
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def multiplies_bfloat16(device: str) -> bool:
    """Whether torch has products of bfloat16 matrices there that are no slower than those of float32."""
    if device != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices by shape and device, some of them at a time."""
    found: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault((parameter.shape, parameter.device), []).append(parameter)
    for (shape, device), alike in found.items():
        most = max(1, (ON_CPU if device.type == "cpu" else TOGETHER) // shape.numel())
        for start in range(0, len(alike), most):
            yield alike[start : start + most]
