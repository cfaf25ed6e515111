"""Projections for the core: one product over all positions of a batch, channels last, as the core reads them.

Without gradients weights are cast once until they change, where autocast would cast them at every call. One position
of few sequences in float32 is the core's own product (`product.h`): torch's takes half as long again and more.

Shapes: B batch, D inputs, E outputs, L positions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from operators.convolution.projection import as_dtype
from operators.native import in_use

MOST_ROWS = 8


def project(linear: nn.Linear, x_BDL: Tensor) -> Tensor:
    """`linear` of every position, (B, E, L), in autocast's precision where that is on."""
    weight_ED: Tensor = linear.weight
    bias_E: Tensor = linear.bias
    if torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu")
        weight_ED, bias_E = as_dtype(weight_ED, dtype), as_dtype(bias_E, dtype)
    return nn.functional.linear(x_BDL.transpose(1, 2), weight_ED, bias_E).transpose(1, 2)


def project_step(linear: nn.Linear, x_B1D: Tensor) -> Tensor:
    """`linear` of one position, (B, 1, E), in the ambient precision; of few sequences by the core, if it is in use."""
    served = in_use() and x_B1D.is_cpu and x_B1D.dtype == linear.weight.dtype == torch.float32
    if not served or x_B1D.shape[0] > MOST_ROWS or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x_B1D, linear.weight, linear.bias)
    return cast(Tensor, torch.ops.layerswap.project_few(x_B1D.contiguous(), linear.weight, linear.bias))
