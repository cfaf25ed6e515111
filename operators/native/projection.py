"""The projection of one position of few sequences by the core (`product.h`), where torch takes half as long again.

Shapes: B batch, D inputs, E outputs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from operators.convolution.projection import plain
from operators.native import in_use

MOST_ROWS = 8


def project_step(linear: nn.Module, x_B1D: Tensor) -> Tensor:
    """`linear` of one position, (B, 1, E), in the ambient precision; of few sequences by the core, if it is in use."""
    few = in_use() and x_B1D.is_cpu and x_B1D.shape[0] <= MOST_ROWS and x_B1D.dtype == torch.float32
    if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return cast(Tensor, linear(x_B1D))
    if not plain(linear) or linear.weight.dtype != torch.float32:
        return cast(Tensor, linear(x_B1D))
    return cast(Tensor, torch.ops.layerswap.project_few(x_B1D.contiguous(), linear.weight, linear.bias))
