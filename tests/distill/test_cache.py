"""A cache with swapped layers offers what one of attention does, and goes on from every change as it would."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from operators.config import HyenaConfig, ModalFilterConfig, SkipConfig
from operators.decoding.state import State
from orchestrator.distill.models.cache import OperatorCacheLayer
from orchestrator.distill.models.masks import Pattern
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import decode_by
from tests.distill.students import student_of

PLACED = {
    "all": {0: HyenaConfig(heads=4), 1: HyenaConfig(order=3), 2: SkipConfig()},
    "attention first": {2: HyenaConfig()},
    "attention last": {0: HyenaConfig(filter=ModalFilterConfig(modes=4)), 1: HyenaConfig(heads=4)},
}
every_student = pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)


def filled(student: Any, ids: Tensor, cache: Any = None) -> Any:
    with torch.no_grad():
        return student(ids, past_key_values=cache, use_cache=True)


def away_and_back(cache: Any) -> None:
    for layer, held in enumerate(cache.layers):
        cache.offload(layer)
        held.prefetch()


SEQUENCES = torch.tensor([1, 0])
CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "nothing": (lambda cache: cache, lambda ids: ids),
    "copied": (copy.deepcopy, lambda ids: ids),
    "reordered": (lambda cache: cache.reorder_cache(SEQUENCES), lambda ids: ids[SEQUENCES]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), lambda ids: ids.repeat_interleave(2, 0)),
    "selected": (lambda cache: cache.batch_select_indices(SEQUENCES[:1]), lambda ids: ids[1:]),
    "selected by a mask": (lambda cache: cache.batch_select_indices(SEQUENCES == 1), lambda ids: ids[:1]),
    "cropped": (lambda cache: cache.crop(-5), lambda ids: ids[:, :-5]),
    "cropped by nothing": (lambda cache: cache.crop(0), lambda ids: ids),
    "reset": (lambda cache: cache.reset(), lambda ids: ids[:, :0]),
    "away and back": (away_and_back, lambda ids: ids),
    "recorded": (lambda cache: cache.activate_past_recording(), lambda ids: ids),
}


@every_student
@pytest.mark.parametrize(("change", "changed"), CHANGES.values(), ids=CHANGES)
def test_a_changed_cache_goes_on_as_the_changed_text_does(
    tiny_teacher: Path, ids: Tensor, placed: dict[int, Any], change: Any, changed: Any
) -> None:
    student = student_of(tiny_teacher, placed)
    cache = filled(student, ids).past_key_values
    assert isinstance(cache, DynamicCache)
    cache = change(cache) or cache
    text = changed(ids)
    assert cache.get_seq_length() == text.shape[1]
    assert cache.get_mask_sizes(3, 2) == (text.shape[1] + 3, 0)
    more = torch.randint(1, 300, (len(text), 4))
    found = torch.cat([filled(student, part, cache).logits for part in more.split([1, 2, 1], dim=1)], dim=1)
    wanted = student(torch.cat([text, more], dim=1), use_cache=False).logits[:, -4:]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@every_student
def test_a_copied_cache_and_its_original_go_on_by_themselves(
    tiny_teacher: Path, ids: Tensor, placed: dict[int, Any]
) -> None:
    student = student_of(tiny_teacher, placed)
    cache = filled(student, ids).past_key_values
    other = copy.deepcopy(cache)
    wanted = filled(student, ids[:, :6], cache).logits
    filled(student, ids[:, 6:9], other)
    other.crop(-3)
    torch.testing.assert_close(filled(student, ids[:, :6], other).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_knows_of_which_sequences_it_has_seen_padding_only() -> None:
    held = OperatorCacheLayer(State(2, 96), DynamicLayer())
    held.check(Pattern(torch.tensor([[False], [True]])))
    held.state.length = 1
    held.check(Pattern(torch.tensor([[False], [False]])))  # the second one was begun, and stays so
    held.check(Pattern(alone_B=torch.tensor([False, False]), real_BL=torch.tensor([[False], [False]])))
    with pytest.raises(ValueError, match=r"^a cache cannot go on from packed documents"):
        held.check(Pattern(alone_B=torch.tensor([False, True])))
    held.reorder_cache(SEQUENCES)
    with pytest.raises(ValueError, match=r"^a cache cannot go on from packed documents"):
        held.check(Pattern(alone_B=torch.tensor([True, False])))
    held.batch_repeat_interleave(2)
    held.check(Pattern(alone_B=torch.tensor([False, False, True, True])))
    with pytest.raises(ValueError, match=r"^a cache cannot go on from packed documents"):  # all have begun now
        held.check(Pattern(alone_B=torch.tensor([False, False, True, False])))


@pytest.mark.parametrize("kind", [DynamicLayer, StaticLayer])
def test_all_that_a_cache_asks_of_attention_is_offered(kind: type) -> None:
    mine = {"keys", "values", "dtype", "device", "max_cache_len", "cumulative_length", "is_recording_past"}
    asked = {name for name in dir(kind) if not name.startswith("_")} - mine
    assert asked >= {"offload", "prefetch", "reset", "get_mask_sizes", "get_max_length", "reorder_cache"}
    assert [name for name in sorted(asked) if not hasattr(OperatorCacheLayer, name)] == []


def test_what_a_cache_says_of_itself(tiny_teacher: Path, ids: Tensor) -> None:
    student = student_of(tiny_teacher, PLACED["all"])
    cache = filled(student, ids).past_key_values
    assert cache.is_croppable and cache.is_initialized and not cache.is_compileable
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * 3
    assert (cache.get_max_length(), cache.get_max_length(1), len(cache)) == (96, 96, 3)
    decode_by(student, None, croppable=False)
    assert not filled(student, ids).past_key_values.is_croppable
    static = StaticCache(config=student.config, max_cache_len=40)
    filled(student, ids, static)
    assert (static.get_max_length(), static.get_mask_sizes(1, 0), static.is_compileable) == (40, (40, 0), True)


@every_student
@pytest.mark.parametrize("change", [5, 20])
def test_a_crop_by_a_positive_number_is_refused_by_every_layer(
    tiny_teacher: Path, ids: Tensor, placed: dict[int, Any], change: int
) -> None:
    cache = filled(student_of(tiny_teacher, placed), ids).past_key_values
    for held in cache.layers:
        with pytest.raises(ValueError, match="negative"):
            held.crop(change)
    assert cache.get_seq_length() == 20


def test_more_than_was_seen_cannot_be_cropped(tiny_teacher: Path, ids: Tensor) -> None:
    cache = filled(student_of(tiny_teacher, PLACED["all"]), ids).past_key_values
    with pytest.raises(ValueError, match="between 0 and the 20 positions seen but is -1"):
        cache.crop(-21)


class Stream(contextlib.nullcontext[None]):
    """A stream of an accelerator, where there is none."""


def test_a_swapped_layer_calls_for_the_next_layers_keys_in_a_cache_that_is_offloaded(
    tiny_teacher: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(tiny_teacher, PLACED["all"])
    cache: Any = DynamicCache(config=student.config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, Stream()
    asked: list[int] = []
    monkeypatch.setattr(OperatorCacheLayer, "prefetch", lambda self: asked.append(cache.layers.index(self)))
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda self: asked.append(cache.layers.index(self)))
    filled(student, ids, cache)
    filled(student, ids[:, :1], cache)
    assert asked == [1, 2, 0] * 2


def test_what_was_padded_goes_along_when_sequences_are_chosen(tiny_teacher: Path) -> None:
    """Of three rows the first two begin with padding only: what they may go on with stays theirs."""
    student = student_of(tiny_teacher, {0: HyenaConfig(heads=4)})
    mask = torch.tensor([[0, 0], [0, 0], [0, 1]])
    with torch.no_grad():
        cache = student(torch.ones(3, 2, dtype=torch.long), attention_mask=mask, use_cache=True).past_key_values
    held = cache.layers[0]
    assert held.padded_B.tolist() == [True, True, False]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert held.padded_B.tolist() == [False, True, True]
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    assert held.padded_B.tolist() == [False, False, True, True]


def test_keys_of_a_single_position_are_refused_too(tiny_teacher: Path, ids: Tensor) -> None:
    cache = filled(load_teacher(tiny_teacher), ids[:, :1]).past_key_values
    student = student_of(tiny_teacher, {1: HyenaConfig(heads=4)})
    with pytest.raises(ValueError, match=r"has keys and values of layer 1, which is swapped: start a new cache$"):
        filled(student, ids[:, 1:2], cache)
