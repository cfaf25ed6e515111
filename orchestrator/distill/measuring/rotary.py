"""How an attention turns queries and keys by position: of the usual ways the one that explains its weights.

Classes differ in which channels make a pair, in sign, and in how many channels are turned, and no name tells. So what
the layer is given (cosines and sines by position) is tried in each way on a text, and the logits that result are
compared with the logarithms of the attention's weights. What none explains (biases by distance) is an error.

Shapes: D model width, L positions, H heads, K width of a head's query and key, P pairs of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from operators.near import Near
from operators.transfer.attention import AttentionWeights
from operators.transfer.near import norm_kind
from operators.transfer.rotation import NO_ROTATION, Rotation

FAR = 0.05  # of the weights' logarithms, by root mean square: bfloat16 and soft caps keep within
LEAST = 1e-6  # of a weight that is compared


@torch.no_grad()
def rotation_of(attention: AttentionWeights, x_LD: Tensor, weights_HLL: Tensor, told: Any) -> Rotation:
    """The rotation, from the inputs of a text, the attention's weights on it, and the `position_embeddings` that it was
    given, or None.

    Raises ValueError where no usual one explains the weights.
    """
    errors = {}
    for rotation in _usual(told, attention.key_width):
        errors[_error(attention, rotation, x_LD, weights_HLL)] = rotation
    if min(errors) > FAR:
        raise ValueError(
            f"no usual rotation of queries and keys explains what the attention does ({min(errors):.2g} of its logits "
            "is left): use no window, or init: random"
        )
    return errors[min(errors)]


def _error(attention: AttentionWeights, rotation: Rotation, x_LD: Tensor, weights_HLL: Tensor) -> float:
    """What is left of the logarithms of weights beside their mean by row, relative to their own size."""
    heads, width, found = attention.heads, attention.key_width, []
    near = Near((heads, heads), width, norm_kind(attention), level=False).double()  # type: ignore[arg-type]
    near.initialise()
    for weight, bias in near.follow(attention, rotation):
        found.append((x_LD.double() @ weight.t() + bias).t().reshape(1, heads, width, -1))
    q_1HKL, _, k_1HKL, _ = near.products(found[0], found[1], 0)
    logits_HLL = (q_1HKL.transpose(-1, -2) @ k_1HKL)[0]
    counted = weights_HLL > LEAST
    parts = []
    for logs_HLL in (weights_HLL.double().clamp_min(LEAST).log(), logits_HLL):
        mean_HL1 = (logs_HLL * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp_min(1)
        parts.append((logs_HLL - mean_HL1) * counted)
    return float((parts[0] - parts[1]).norm() / parts[0].norm().clamp_min(1e-30))


def _usual(told: Any, width: int) -> Iterator[Rotation]:
    """None, and halves or neighbours as pairs, either way round, of the first channels."""
    yield NO_ROTATION
    for cos_LP, sin_LP in _by_pair(told):
        pairs = cos_LP.shape[1]
        if 2 * pairs > width or len(cos_LP) < 2:
            continue
        angle_P, factor = torch.atan2(sin_LP[1], cos_LP[1]), float(cos_LP[0].mean())
        place_P = torch.arange(pairs)
        for first_P, second_P in ((place_P, place_P + pairs), (2 * place_P, 2 * place_P + 1)):
            yield Rotation(angle_P, first_P, second_P, factor)
            yield Rotation(-angle_P, first_P, second_P, factor)


def _by_pair(told: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and sines (L, P), from those by pair, or by channel with those of a pair in halves or side by side."""
    if isinstance(told, Tensor) and told.is_complex():
        told = told.real, told.imag
    if not isinstance(told, tuple) or len(told) != 2:
        return
    cos, sin = (part.detach().double().cpu().reshape(-1, *part.shape[-2:])[0] for part in told)
    half = cos.shape[1] // 2
    for cut in (slice(None), slice(None, half), slice(None, None, 2)):
        yield cos[:, cut], sin[:, cut]
