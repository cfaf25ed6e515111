"""What a model says after the beginnings of texts, and what the teacher makes of it.

Token by token a student soon says something else than the teacher, which need not be worse. So the teacher reads it:
how likely was each token, had the teacher spoken? Of the likeliest tokens alone that flatters text that repeats itself;
so the model is also sampled at temperature 1, with the same random numbers for every model. The teacher's perplexity of
its own samples is what there is to reach.

Shapes: B prompts, L tokens of a prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from orchestrator.distill.models.sites import longest_text
from orchestrator.distill.training.loop import held
from orchestrator.study.spec import EvaluateSpec

WAYS = ("greedy", "sampled")


@torch.no_grad()
def speak(model: Any, teacher: Any, windows_BL: Tensor, spec: EvaluateSpec, device: str) -> dict[str, Tensor]:
    """By `WAYS` what a model says after the beginnings of the first windows, (B, N), and as `*_nll` how unlikely the
    teacher finds each token, in nats; on the CPU. Nothing where nothing is asked for.
    """
    settings = spec.evaluation
    length = min(settings.prompt_tokens, spec.sequence_length)
    count = min(settings.new_tokens, longest_text(model.config) - length)
    if settings.prompts == 0 or count <= 0:
        return {}
    prompts_BL = windows_BL[: settings.prompts, :length].to(device)
    said: dict[str, Tensor] = {}
    with held(spec.numerics, device):
        for way in WAYS:
            noise = None if way == "greedy" else torch.Generator().manual_seed(settings.seed)
            new_BN = continued(model, prompts_BL, count, noise)
            nll = [_unlikelihood(teacher, *pair) for pair in zip(prompts_BL, new_BN, strict=True)]
            said |= {way: new_BN.cpu(), f"{way}_nll": torch.stack(nll).cpu()}
    return said


def compare(own: dict[str, Tensor], teachers: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of what a subject says beside what the teacher says; see `evaluate`."""
    if not own:
        return {}
    same_BN = teachers["greedy"] == own["greedy"]
    told = {
        "generation_agreement": float(same_BN.double().mean()),
        "generation_prefix": float(same_BN.cumprod(dim=1).sum(dim=1).double().mean()),
    }
    for prefix, said in (("", own), ("teacher_", teachers)):
        told |= {f"{prefix}{way}_generation_perplexity": perplexity(said[f"{way}_nll"].double()) for way in WAYS}
    return told


def perplexity(nll: Tensor) -> float:
    """The exponential of the mean of losses in nats; infinite above 709."""
    try:
        return math.exp(float(nll.mean()))
    except OverflowError:
        return math.inf


@torch.no_grad()
def continued(model: Any, prompts_BL: Tensor, new_tokens: int, noise: torch.Generator | None = None) -> Tensor:
    """The likeliest token again and again, (B, new_tokens), whatever the model's own settings of generation say.

    With `noise`, on the CPU, samples of the model's distribution instead, by the Gumbel-max trick: models that are
    nearly equal then say nearly the same. The end of text is a token like others and does not end them.
    """
    new_BN, cache, next_BL = prompts_BL.new_empty(len(prompts_BL), new_tokens), None, prompts_BL
    for at in range(new_tokens):
        output = model(next_BL, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
        cache, scores_BV = output.past_key_values, output.logits[:, -1]
        if noise is not None:
            waiting_BV = torch.empty(scores_BV.shape, dtype=torch.float64).exponential_(generator=noise)
            scores_BV = scores_BV.double() - waiting_BV.log().to(scores_BV.device)
        next_BL = scores_BV.argmax(-1, keepdim=True)
        new_BN[:, at] = next_BL[:, 0]
    return new_BN


def _unlikelihood(teacher: Any, prompt_L: Tensor, new_N: Tensor) -> Tensor:
    """What the teacher loses on each new token, (N,), nats: of one text, for all texts' logits at once may be large."""
    ids_BL = torch.cat([prompt_L, new_N])[None]
    output = teacher(ids_BL, use_cache=False, logits_to_keep=len(new_N) + 1, return_dict=True)
    chances_NV = output.logits[0, -len(new_N) - 1 : -1].float().log_softmax(-1)
    nll_N: Tensor = -chances_NV.gather(1, new_N[:, None])[:, 0]
    return nll_N
