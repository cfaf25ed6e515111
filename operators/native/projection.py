"""Projections for the core: one product over all positions of a batch, channels last, as the core reads them.

Without gradients weights are cast once until they change, where autocast would cast them at every call.

Shapes: B batch, D inputs, E outputs, L positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_casts: Any = WeakIdKeyDictionary()  # parameter to what it was and its value in another dtype


def project(linear: nn.Linear, x_BDL: Tensor) -> Tensor:
    """`linear` of every position, (B, E, L), in autocast's precision where that is on."""
    weight_ED: Tensor = linear.weight
    bias_E: Tensor = linear.bias
    if torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu")
        weight_ED, bias_E = _as(weight_ED, dtype), _as(bias_E, dtype)
    return nn.functional.linear(x_BDL.transpose(1, 2), weight_ED, bias_E).transpose(1, 2)


def _as(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter's value in another dtype, cast again when it has changed."""
    stamp = (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, parameter.dtype, dtype)
    if parameter not in _casts or _casts[parameter][0] != stamp:
        with torch.inference_mode(False):
            _casts[parameter] = (stamp, parameter.detach().to(dtype))
    return cast(Tensor, _casts[parameter][1])
