"""Projections for the core: one product over all positions of a batch, channels last, as the core reads them.

Without gradients weights are cast once until they change, where autocast would cast them at every call.

Shapes: B batch, D inputs, E outputs, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from operators.projection import as_dtype


def project(linear: nn.Linear, x_BDL: Tensor) -> Tensor:
    """`linear` of every position, (B, E, L), in autocast's precision where that is on."""
    weight_ED: Tensor = linear.weight
    bias_E: Tensor = linear.bias
    if torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu")
        weight_ED, bias_E = as_dtype(weight_ED, dtype), as_dtype(bias_E, dtype)
    return nn.functional.linear(x_BDL.transpose(1, 2), weight_ED, bias_E).transpose(1, 2)
