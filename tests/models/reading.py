"""What `reading.read` gives of an attention computes what the attention's own code computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.transfer.attention import AttentionWeights, QueryKeyNorm
from orchestrator.distill.models.families import family_of
from orchestrator.distill.models.projections import GATES, QUERY_NORMS, VALUE_NORMS, part
from orchestrator.distill.models.reading import read
from orchestrator.distill.models.sites import Site, call_of, sites
from tests.models.models import logits, near, takes, teacher_of, text


def reading(name: str) -> str:
    """From what was read, the weights and outputs of every attention as its own code computes them."""
    model = teacher_of(name, attn_implementation="eager")
    there, seen = sites(model), {}
    for site in there.values():
        site.attention.register_forward_hook(_look(site, seen), with_kwargs=True)
    ids = text(1, 6)
    more: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if takes(model, "position_ids"):
        more["position_ids"] = torch.zeros_like(ids)  # so that nothing is rotated
    logits(model, ids, **more)
    turned = getattr(getattr(model.get_decoder(), "rotary_emb", None), "attention_scaling", 1.0)
    notes = {"scaled rotations"} if turned != 1.0 else set()
    for layer, (x_BLD, weights, output) in seen.items():
        attention = there[layer].attention
        read_of = read(attention, family_of(model.config.model_type, attention))
        if weights is None:  # then what the first token does, which sees itself only
            value = F.linear(x_BLD[:, 0], read_of.value, read_of.value_bias)
            assert near(output[:, 0], F.linear(value, read_of.output, read_of.output_bias)), "outputs"
            notes.add("tells no weights")
        else:
            notes |= _same(attention, read_of, x_BLD, weights.float(), output, turned**2)
    return ", ".join(sorted(notes))


def _look(site: Site, seen: dict[int, Any]) -> Callable[..., None]:
    call = call_of(site)

    def look(_: Any, args: Any, kwargs: Any, answer: Any) -> None:
        given = call.by_name(args, kwargs)
        seen[site.layer] = given["hidden_states"], answer[1], site.family.mixed(answer, given)

    return look


def _same(
    attention: Any, read_of: AttentionWeights, x_BLD: Tensor, weights: Tensor, output: Tensor, turned: float
) -> set[str]:
    """Compare weights (B, H, L, S) and output (B, L, D) with those of the definition; what is beside it is told."""
    heads, notes = read_of.heads, set()
    norm = part(attention, QUERY_NORMS)
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), 1e-6)
    query, key = (
        _normed(
            F.linear(x_BLD, getattr(read_of, side), read_of.bias_of(side)), heads, getattr(read_of, f"{side}_norm"), eps
        )
        for side in ("query", "key")
    )
    scale = read_of.key_width**-0.5 if read_of.scale is None else read_of.scale
    scores = scale * turned * torch.einsum("bthk,bshk->bhts", query, key)
    if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    value = F.linear(x_BLD, read_of.value, read_of.value_bias).unflatten(-1, (heads, -1))
    if part(attention, VALUE_NORMS) is not None:
        value = value * value.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        notes.add("values normed")
    gathered = torch.einsum("bhts,bshv->bthv", weights, value)
    if (sinks := getattr(attention, "sinks", None)) is not None:
        notes.add("sinks")
        if float(weights.sum(-1).min()) > 1 - 1e-5:  # they scale the output, and not the weights
            seen = scores.masked_fill(weights == 0, -torch.inf).logsumexp(-1)
            gathered = gathered * torch.sigmoid(seen - sinks[:, None]).transpose(1, 2)[..., None]
    if (gates := _gates(attention, heads, x_BLD)) is not None:
        notes.add("gated")
        gathered = gathered * gates
    assert near(output, F.linear(gathered.flatten(2), read_of.output, read_of.output_bias)), "outputs"
    by_lag = _by_lag(weights, scores)
    if float(by_lag.abs().max()) > 2e-3:
        notes.add("bias by distance")
    return notes


def _by_lag(weights: Tensor, scores: Tensor) -> Tensor:
    """What logarithms of weights have beside the scores and the sums of their rows: a number by lag, or a fault."""
    told = weights > 1e-12
    apart = (weights.clamp_min(1e-12).log() - scores) * told
    apart = (apart - apart.diagonal(dim1=-2, dim2=-1)[..., None]) * told
    lags = torch.arange(apart.shape[-1])
    lag_LL = (lags[:, None] - lags).clamp_min(0)
    alike = torch.stack([told * (lag_LL == lag) for lag in lags], -3)
    by_lag = (apart[..., None, :, :] * alike).sum((-2, -1)) / alike.sum((-2, -1)).clamp_min(1)
    assert float(((apart - by_lag[..., lag_LL]) * told).abs().max()) < 2e-3, "weights"
    return by_lag


def _gates(attention: Any, heads: int, x_BLD: Tensor) -> Tensor | None:
    """(B, L, H, 1 or V), by the definition of the class, over what they are at an input of zero, which was read."""
    gate, queries = part(attention, GATES), getattr(attention, "q_proj", None)
    name = type(attention).__name__
    if gate is not None:
        logit = gate(x_BLD).unflatten(-1, (heads, -1))
        if (shift := getattr(attention, "gate_bias", None)) is not None:
            logit = logit + shift[:, None]
    elif name.startswith("Qwen3") and queries.out_features == 2 * attention.o_proj.in_features:
        logit = queries(x_BLD).unflatten(-1, (heads, 2, -1))[..., 1, :]
    else:
        return None
    opened = F.softplus if name == "LagunaAttention" else torch.sigmoid
    start = torch.zeros(1) if getattr(attention, "gate_bias", None) is None else attention.gate_bias[:, None]
    return opened(logit) / opened(start)


def _normed(rows: Tensor, heads: int, norm: QueryKeyNorm | None, eps: float) -> Tensor:
    """(B, L, H, K), by the definition of a norm."""
    each = rows.unflatten(-1, (heads, -1))
    if norm is None:
        return each
    together = norm.weight.shape == rows.shape[-1:]
    x = rows if together else each
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    x = x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * norm.weight
    if norm.bias is not None:
        x = x + norm.bias
    return x.unflatten(-1, (heads, -1)) if together else x
