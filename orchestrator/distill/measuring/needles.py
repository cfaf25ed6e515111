"""Keys in real text: does a model find one of eight values again that it has read once?

Lines such as `KEY_7 = 'qzrt'` are put into text of validation, at a share of its length, and one of them is asked for
at its end. The values are random letters, so nothing but the line itself tells which is right. A model that takes the
values for equally likely whatever the key is right once in eight.

Shapes: L tokens of a text, N tokens of a value.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import string
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.distill.context import Workplace
from orchestrator.distill.data import spread_windows
from orchestrator.distill.training.loop import held
from orchestrator.study.spec import ProbesSpec

KEYS, LETTERS = 8, 4
DEPTHS = (0.1, 0.5, 0.9)
Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Needle:
    """A text that ends with a question, and the values that may answer it; `right` is the place of the right one."""

    text: Ids
    values: tuple[Ids, ...]
    right: int


def find_needles(
    model: Any, text: np.ndarray[Any, Any], begin: int | None, tokenizer: Any, spec: ProbesSpec, place: Workplace
) -> dict[str, dict[str, Any]]:
    """By length: `items`, `accuracy`, its standard error `stderr` and its `chance`, and mean `margin`, the logarithm of
    the right value's probability less that of the likeliest other (nats); by `depths` accuracy and margin.

    A length that the lines themselves fill has no entry, which is said.
    """
    found = {}
    for length in spec.lengths if spec.needles else ():
        margins = {
            depth: [margin(model, needle, spec, place.context.device) for needle in needles]
            for depth in DEPTHS
            if (needles := make_needles(text, begin, tokenizer, spec, length, depth))
        }
        if margins:
            every = _summary([one for several in margins.values() for one in several])
            depths = {str(depth): _summary(each) for depth, each in margins.items()}
            found[str(length)] = {**every, "chance": 1 / KEYS, "depths": depths}
        else:
            place.say(f"evaluation.probes: no needle in {length} tokens, which the lines with keys fill")
    return found


def _summary(margins: list[float]) -> dict[str, float]:
    count = len(margins)
    right = sum(margin > 0 for margin in margins) / count
    told = {"items": count, "accuracy": right, "margin": sum(margins) / count}
    return told | ({"stderr": math.sqrt(right * (1 - right) / (count - 1))} if count > 1 else {})


def make_needles(
    text: np.ndarray[Any, Any], begin: int | None, tokenizer: Any, spec: ProbesSpec, length: int, depth: float
) -> list[Needle]:
    """Texts that have `length` tokens with the longest value; none where the lines of one leave no other text room.

    Every text has values of its own, the same at every length: the standard error is that of as many items. Value and
    line are tokenised apart, so that what is asked for is made of the tokens that were read.
    """

    def tokens(piece: str) -> Ids:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    asked = [tokens(f"\nKEY_{key} = '") for key in range(KEYS)]
    quote, end = tokens("'"), tokens("\n")
    needles = []
    for number in range(spec.needles):
        draw = np.random.default_rng((spec.seed, number, DEPTHS.index(depth)))
        words: dict[str, Ids] = {}
        while len(words) < KEYS:
            word = "".join(draw.choice(list(string.ascii_lowercase), LETTERS))
            words[word] = tokens(word)
        values, right = tuple(words.values()), int(draw.integers(KEYS))
        lines = [token for key in range(KEYS) for token in (*asked[key], *values[key], *quote)] + end
        room = length - len(lines) - len(asked[right]) - max(map(len, values)) - (begin is not None)
        if room < 1:
            return []
        filler = _filler(text, room, number, spec.needles)
        at = round(depth * room)
        whole = [*([] if begin is None else [begin]), *filler[:at], *lines, *filler[at:], *asked[right]]
        needles.append(Needle(whole, values, right))
    return needles


def _filler(text: np.ndarray[Any, Any], room: int, number: int, count: int) -> Ids:
    """One of `count` windows of that many tokens; where the text has fewer, they come again."""
    windows = spread_windows(text, room, room * count)
    return [int(token) for token in windows[number % len(windows)]]


@torch.no_grad()
def margin(model: Any, needle: Needle, spec: ProbesSpec, device: str) -> float:
    """The logarithm of the right value's probability less that of the likeliest other one, in nats."""
    with held(spec.numerics, device):
        output = model(torch.tensor([needle.text], device=device), use_cache=True, logits_to_keep=1, return_dict=True)
        first_V = output.logits[0, -1].float().log_softmax(-1)
        chances = [
            float(first_V[value[0]].double()) + _continued(model, output.past_key_values, value)
            for value in needle.values
        ]
    others = [chance for place, chance in enumerate(chances) if place != needle.right]
    return chances[needle.right] - max(others)


def _continued(model: Any, cache: Any, value: Ids) -> float:
    """Log-probability of a value's tokens after its first one, from a copy of what was read."""
    if len(value) == 1:
        return 0.0
    cache, total = copy.deepcopy(cache), 0.0
    for token, following in itertools.pairwise(value):
        ids_BL = torch.tensor([[token]], device=model.device)
        output = model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
        scores_V: Tensor = output.logits[0, -1].float().log_softmax(-1)
        cache, total = output.past_key_values, total + float(scores_V[following].double())
    return total
