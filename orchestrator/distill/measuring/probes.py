"""What a student lost that perplexity hides: loss by position, by distance of what could be copied, and by length.

Perplexity is a mean over positions, most of which need nothing from far away. Each number here is of positions that do:
late ones, tokens that stand in the window already, windows longer than those of training, keys that have to be found
(`needles`). The same text and the same keys for every model, so a student is told beside its teacher.

Shapes: B windows, L positions, P = L - 1 predicted positions, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.decoding.kept import frozen_filters
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import load_tokenizer, load_tokens, spread_windows
from orchestrator.distill.hits import trigram_gaps
from orchestrator.distill.measuring.needles import find_needles
from orchestrator.distill.models.student import load_student, sharing
from orchestrator.distill.training.frozen import frozen_teacher
from orchestrator.distill.training.head import final_hidden, wide_heads
from orchestrator.distill.training.loop import DIVERGED, autocast, prepare
from orchestrator.distill.training.losses import chunk_size
from orchestrator.files import read_json
from orchestrator.study.documents import DataError
from orchestrator.study.spec import ProbesSpec

GAPS = (1, 16, 64, 128)  # the least distances of the classes of hits
PASSED = 4096  # tokens whose hidden states are made together, or one window


def probe(spec: ProbesSpec, place: Workplace) -> dict[str, Any]:
    """Measure a model.

    Returns:
        Of the longest windows `loss`, mean nats per token by the first position of bins [2^i, 2^(i+1)); `hit_nll` and
        `hit_tokens`, loss and number of the tokens that complete a trigram already in the window, by the least distance
        of `GAPS` to where it stands last; `bits_per_byte` of the predicted tokens' text. By length: `nll`, mean nats
        per token, and `needle`, see `find_needles`.

    Raises:
        DataError: the text has no window of a length.
        ArithmeticError: a number is not finite, since the model has diverged.
    """
    prepare(spec.numerics)
    device = place.context.device
    teacher = frozen_teacher(spec, place)
    subject = load_student(place.inputs["subject"], sharing(teacher)).eval()
    text, begin = validation_text(spec, place)
    tokenizer = load_tokenizer(place.inputs["tokens"])
    *others, longest = spec.lengths
    with frozen_filters(subject):
        windows_BL = windows_of(text, begin, longest, spec.windows * longest)
        nll_BP = token_losses(subject, windows_BL, spec, device)
        result: dict[str, Any] = {"loss": by_position(nll_BP), **by_gap(nll_BP, windows_BL)}
        result["bits_per_byte"] = bits_per_byte(nll_BP, windows_BL, tokenizer)
        result["nll"] = {
            str(length): float(
                token_losses(subject, windows_of(text, begin, length, windows_BL.numel()), spec, device).mean()
            )
            for length in others
        }
        result["nll"][str(longest)] = float(nll_BP.mean())
        result["needle"] = find_needles(subject, text, begin, tokenizer, spec, place)
    _check_finite(result, "teacher" if spec.subject == spec.teacher else "student")
    return result


def _check_finite(result: dict[str, Any], role: str, path: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            _check_finite(value, role, f"{path}{name} ")
        elif not math.isfinite(value):
            raise ArithmeticError(f"probes gave no finite {path}{name}: {DIVERGED[role]}")


def validation_text(spec: ProbesSpec, place: Workplace) -> tuple[np.ndarray[Any, Any], int | None]:
    """The tokens of validation, and the beginning of text, which every window of another length has to get anew."""
    folder = place.inputs["tokens"]
    tokens, begin = load_tokens(folder, "valid"), read_json(folder / "tokens.json").get("begin_of_text")
    return (tokens if begin is None else np.delete(tokens, np.s_[:: spec.sequence_length])), begin


def windows_of(text: np.ndarray[Any, Any], begin: int | None, length: int, budget: int) -> Tensor:
    """Windows of `budget` tokens in all, spread over the text, (B, L) int64, each with the beginning of text before it.

    Raises DataError where the text is shorter than one.
    """
    own = length if begin is None else length - 1
    if len(text) < own:
        raise DataError(
            f"evaluation.probes.lengths: {length} exceeds the {len(text)} tokens of validation text: lower it, or give "
            "more text (data.validation or data.validation_share)"
        )
    windows_BL = spread_windows(text, own, budget // length * own)
    return windows_BL if begin is None else F.pad(windows_BL, (1, 0), value=begin)


@torch.no_grad()
def token_losses(model: Any, windows_BL: Tensor, spec: ProbesSpec, device: str) -> Tensor:
    """Nats of every predicted token, (B, P) float64 on the CPU; logits are made chunk by chunk."""
    count, length = windows_BL.shape
    nll_N, done = torch.empty(count * (length - 1), dtype=torch.float64, device=device), 0
    [head] = wide_heads(model)
    size = chunk_size(head, torch.device(device))
    for ids_BL in windows_BL.split(max(1, PASSED // length)):
        ids_BL = ids_BL.to(device)
        with autocast(spec.numerics, device):
            hidden_BLD = final_hidden(model, ids_BL)
        for ids_L, hidden_LD in zip(ids_BL, hidden_BLD, strict=True):
            for rows_PD, target_P in zip(hidden_LD[:-1].float().split(size), ids_L[1:].split(size), strict=True):
                nll_P = F.cross_entropy(head(rows_PD).float(), target_P, reduction="none")
                nll_N[done : done + len(target_P)] = nll_P
                done += len(target_P)
    return nll_N.cpu().view(count, length - 1)


def by_position(nll_BP: Tensor) -> dict[str, float]:
    """Mean loss by the first position of each bin [2^i, 2^(i+1)); the first predicted token stands at position 1."""
    found, first = {}, 1
    while first <= nll_BP.shape[1]:
        found[str(first)] = float(nll_BP[:, first - 1 : 2 * first - 1].mean())
        first *= 2
    return found


def by_gap(nll_BP: Tensor, windows_BL: Tensor) -> dict[str, dict[str, float]]:
    """Mean loss and number of hits by their distance; a class without tokens has no entry, for no number is true."""
    gaps_BP = trigram_gaps(windows_BL)
    losses: dict[str, float] = {}
    counts: dict[str, float] = {}
    for least, above in zip(GAPS, (*GAPS[1:], windows_BL.shape[1]), strict=True):
        chosen_BP = (gaps_BP >= least) & (gaps_BP < above)
        if count := int(chosen_BP.sum()):
            losses[str(least)], counts[str(least)] = float(nll_BP[chosen_BP].mean()), count
    return {"hit_nll": losses, "hit_tokens": counts}


def bits_per_byte(nll_BP: Tensor, windows_BL: Tensor, tokenizer: Any) -> float:
    """Bits of the predicted tokens over the bytes of their text; the ends of documents cost bits and have no bytes."""
    texts = [
        tokenizer.decode(window[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for window in windows_BL.tolist()
    ]
    return float(nll_BP.sum()) / math.log(2) / sum(len(text.encode()) for text in texts)
