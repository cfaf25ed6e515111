"""What an attention does on real text, seen before it is replaced: statistics that an operator can start from.

Place in the flow: `distil` asks for them on the first sequences of its own text, `swap` hands them to the operators.
Invariant: looking changes nothing; the model is the same bits afterwards.

Shapes: B sequences, L positions, H heads, T lags.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from operators.transfer.attention import AttentionStatistics
from operators.transfer.rotation import Rotation
from orchestrator.distill.measuring.rotary import rotation_of
from orchestrator.distill.models.reading import on_processor, read
from orchestrator.distill.models.sites import Site, call_of, site_of, trunk_of
from orchestrator.distill.training.loop import DIVERGED

SEQUENCES = 16
EXAMPLES = 4  # of them, whose inputs are kept
NUMBERS = 1 << 24  # of attention's weights that are looked at together: 128 MB as float64
SMALLEST = 1e-9  # of a weight, so that one that underflowed to 0 has a logarithm


class _AllSeen(Exception):
    """Every layer that is looked at has computed: what comes after it in the model is not needed."""


@torch.no_grad()
def attention_statistics(
    model: Any, layers: tuple[int, ...], ids_BL: Tensor, *, near: bool = False
) -> dict[int, AttentionStatistics]:
    """By layer: the mean logarithm of the attention's weights by lag, (H, T = L), and mean and covariance of its
    inputs, (D,) and (D, D), all float64.

    Lags that the second half of the positions can all look back to are averaged over that half only: at the start of a
    text few positions share all the weight. Computed on the model's device, given on the CPU. With `near` what a window
    starts from too: the inputs of the first texts, in float32, and the rotation.
    Raises ArithmeticError where a number is not finite, since the model has diverged; ValueError for a class of
    attention that does not tell its weights, or with `near` one whose rotation is none of the usual.
    """
    examples: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    rotations: dict[int, Rotation] = {}
    sums: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    left: set[int] = set()  # layers that this text has not reached yet

    def look(site: Site) -> Any:
        layer, call = site.layer, call_of(site)

        def keep(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            weights = output[1] if len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise ValueError(
                    f"{type(attention).__name__} of layer {layer} does not tell its weights, which init: transfer of "
                    "this operator needs: use init: random"
                )
            heads = max(1, NUMBERS // weights[:, 0].numel())
            seen_HT = torch.cat([_profile(weights_BhLL) for weights_BhLL in weights.split(heads, dim=1)])
            given = call.by_name(args, kwargs)
            x_ND = given["hidden_states"].double().flatten(0, 1)
            if near and len(examples[layer]) < EXAMPLES:
                examples[layer].append(given["hidden_states"].float().cpu())
            if near and layer not in rotations:
                seen = x_ND.cpu(), weights[0].cpu(), given.get("position_embeddings")
                rotations[layer] = _rotation(site, *seen)
            found = [seen_HT, x_ND.mean(0), x_ND.t() @ x_ND / len(x_ND)]
            before = sums[layer] or [torch.zeros_like(one) for one in found]
            sums[layer] = [a + b for a, b in zip(before, found, strict=True)]
            left.discard(layer)
            if not left:
                raise _AllSeen

        return keep

    found = [site_of(model, layer) for layer in layers]
    handles = [site.attention.register_forward_hook(look(site), with_kwargs=True) for site in found]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that makes the weights
    model.config._attn_implementation = "eager"  # of classes that cannot be told by that, too
    try:
        for ids_L in ids_BL:
            left.update(layers)
            with contextlib.suppress(_AllSeen):
                trunk_of(model)(input_ids=ids_L[None], use_cache=False)
    finally:
        model.set_attn_implementation(implementation)
        model.config._attn_implementation = implementation
        for handle in handles:
            handle.remove()
    for layer, total in sums.items():
        if not all(bool(torch.isfinite(one).all()) for one in total):
            raise ArithmeticError(f"the attention of layer {layer} gives no finite numbers: {DIVERGED['student']}")
    found_by_layer = {layer: [(one / len(ids_BL)).cpu() for one in total] for layer, total in sums.items()}
    return {
        layer: _statistics(parts, torch.cat(examples[layer]) if near else None, rotations.get(layer))
        for layer, parts in found_by_layer.items()
    }


def _statistics(parts: list[Tensor], examples: Tensor | None, rotation: Rotation | None) -> AttentionStatistics:
    profile_HT, mean_D, moment_DD = parts
    return AttentionStatistics(profile_HT, mean_D, moment_DD - torch.outer(mean_D, mean_D), examples, rotation)


def _rotation(site: Site, x_LD: Tensor, weights_HLL: Tensor, told: Any) -> Rotation:
    try:
        return rotation_of(on_processor(read(site.attention, site.family)), x_LD, weights_HLL, told)
    except ValueError as error:
        raise ValueError(f"layer {site.layer}: {error}") from None


def _profile(weights_BhLL: Tensor) -> Tensor:
    """Mean logarithm of some heads' weights by lag, (h, T)."""
    logs_BhLL = weights_BhLL.to(torch.float64, copy=True).clamp_min_(SMALLEST).log_()
    return torch.stack([_mean_at_lag(logs_BhLL, lag) for lag in range(logs_BhLL.shape[-1])], dim=-1)


def _mean_at_lag(logs_BHLL: Tensor, lag: int) -> Tensor:
    """Mean over the sequences and the positions that look back `lag`, (H,)."""
    length = logs_BHLL.shape[-1]
    first = max(0, length // 2 - lag)
    return logs_BHLL.diagonal(-lag, dim1=-2, dim2=-1)[..., first:].mean((0, -1))
