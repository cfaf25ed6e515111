"""A student generates with a cache what it generates without one, however the cache came about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.models.models import logits, near, student_of, teacher_of, text

AS_TEACHER = "as its teacher"
PROMPT, NEW = 5, 12  # tokens: together more than a tiny window holds


def _models(name: str) -> Iterator[tuple[str, Any]]:
    """All sites swapped, then every second one, which leaves the others a cache of their own."""
    yield "all", student_of(name)
    yield "half", student_of(name, every=2)


def _if_the_teacher_does(name: str, right: Callable[[Any], bool]) -> str:
    """Whether students do `right`; where one does not, its teacher must not either, or be unable to."""
    for which, student in _models(name):
        if not _does(student, right):
            assert not _does(teacher_of(name), right), which
            return AS_TEACHER
    return ""


def _does(model: Any, right: Callable[[Any], bool]) -> bool:
    try:
        return right(model)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


@torch.no_grad()
def _continued(model: Any, ids: Tensor, cache: Any, lengths: list[int]) -> Tensor:
    """Logits of a text that comes in chunks."""
    found = []
    for part in ids.split(lengths, dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[:, -part.shape[1] :])
    return torch.cat(found, dim=1)


def decoding(name: str) -> str:
    """Step by step with a cache the logits of the whole text."""
    return _in_parts(name, [PROMPT, *[1] * NEW])


def chunks(name: str) -> str:
    """In chunks of several tokens the logits of the whole text."""
    return _in_parts(name, [PROMPT, 4, 1, 7])


def _in_parts(name: str, lengths: list[int]) -> str:
    ids = text(2, PROMPT + NEW)
    return _if_the_teacher_does(name, lambda model: near(_continued(model, ids, None, lengths), logits(model, ids)))


def beams(name: str) -> str:
    """With beams, and padding on the left of a row: the same tokens with a cache as without."""
    ids = text(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def right(model: Any) -> bool:
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3}
        made = [model.generate(ids, attention_mask=mask, use_cache=cache, **settings) for cache in (True, False)]
        whole = text(2, PROMPT + NEW)
        steps = _continued(model, whole, None, [PROMPT, *[1] * NEW])
        return torch.equal(made[0], made[1]) and near(steps, logits(model, whole))

    return _if_the_teacher_does(name, right)


def static(name: str) -> str:
    """The same through a cache of a fixed size."""
    ids = text(2, PROMPT + NEW)

    def right(model: Any) -> bool:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW + 3)
        return near(_continued(model, ids, cache, [PROMPT, *[1] * NEW]), logits(model, ids))

    return _if_the_teacher_does(name, right)


def prefix(name: str) -> str:
    """A cache that is cropped, and one that is filled before, go on as the text that is left."""
    ids, more = text(2, 7), text(2, 4, seed=2)

    def right(model: Any) -> bool:
        cache = DynamicCache(config=model.config)
        _continued(model, ids, cache, [7])
        cache.crop(-3)
        wanted = logits(model, torch.cat([ids[:, :4], more], dim=1))[:, 4:]
        return near(_continued(model, more, cache, [3, 1]), wanted)

    return _if_the_teacher_does(name, right)
