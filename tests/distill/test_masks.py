"""A swapped layer does what a mask says, or says that it cannot: padding, packed documents, windows, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from operators.config import FirFilterConfig, HyenaConfig, ModalFilterConfig, SkipConfig
from orchestrator.distill.models import masks
from orchestrator.distill.models.masks import ONE_TEXT, by_document, packed_documents, pattern_of
from orchestrator.distill.models.sites import attention_of
from tests.distill.students import student_of

PLACED = {
    "hybrid": {0: HyenaConfig(heads=4), 2: HyenaConfig()},
    "all": {0: HyenaConfig(heads=4, filter=ModalFilterConfig(modes=4)), 1: HyenaConfig(order=3), 2: SkipConfig()},
    "last": {2: HyenaConfig(filter=FirFilterConfig(taps=9))},
}
SIZES = (9, 1, 7, 3)  # documents that are packed into one row of 20
LOW = torch.finfo(torch.float32).min
every_student = pytest.mark.parametrize("placed", PLACED.values(), ids=PLACED)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def documents(*sizes: int) -> Tensor:
    """The mask (1, 1, L, L) of packed documents."""
    return torch.block_diag(*(causal(size).float() for size in sizes))[None, None] == 1


def added(allowed: Tensor, low: float = LOW) -> Tensor:
    """The same as a number to add to scores."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, low)


def padded(length: int, *seen: slice) -> Tensor:
    """The causal masks (B, 1, L, L) of sequences of which each has real tokens in one slice only."""
    real_BL = torch.zeros(len(seen), length, dtype=torch.bool)
    for row_L, tokens in zip(real_BL, seen, strict=True):
        row_L[tokens] = True
    return (causal(length) & real_BL[:, None])[:, None]


def ways_to_pack() -> dict[str, dict[str, Any]]:
    positions = torch.cat([torch.arange(size) for size in SIZES])[None]
    return {
        "positions": {"position_ids": positions},
        "mask": {"attention_mask": documents(*SIZES), "position_ids": positions},
        "added mask": {"attention_mask": added(documents(*SIZES)), "position_ids": positions},
    }


@every_student
@pytest.mark.parametrize("how", ways_to_pack().values(), ids=ways_to_pack())
def test_packed_documents_have_each_its_own_logits_and_gradients(
    tiny_teacher: Path, ids: Tensor, placed: dict[int, Any], how: dict[str, Any]
) -> None:
    student = student_of(tiny_teacher, placed)
    row = ids[:1]
    alone = torch.cat([student(part, use_cache=False).logits for part in row.split(SIZES, dim=1)], dim=1)
    with torch.no_grad():
        packed = student(row, use_cache=False, **how).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    student.requires_grad_(True)
    moved = [parameter for name, parameter in student.named_parameters() if ".operator." in name or "embed" in name]
    found, wanted = (
        torch.autograd.grad(logits.square().sum(), moved)
        for logits in (
            student(row, use_cache=False, **how).logits,
            torch.cat([student(part, use_cache=False).logits for part in row.split(SIZES, dim=1)], dim=1),
        )
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    placed=st.sampled_from(list(PLACED)),
    rows=st.lists(st.lists(st.integers(1, 12), min_size=1), min_size=1, max_size=3),
)
def test_packed_documents_do_not_see_each_other(tiny_teacher: Path, placed: str, rows: list[list[int]]) -> None:
    """Rows of any documents, each row's last one as long as fills the longest row."""
    longest = min(48, max(map(sum, rows)))
    student = student_of(tiny_teacher, PLACED[placed])
    ids_BL = torch.randint(300, (len(rows), longest), generator=torch.Generator().manual_seed(0))
    sizes = [_filled(row, longest) for row in rows]
    mask_B1LL = torch.cat([documents(*row) for row in sizes])
    position_BL = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    with torch.no_grad():
        packed_BLV = student(ids_BL, attention_mask=mask_B1LL, position_ids=position_BL, use_cache=False).logits
        for ids_L, packed_LV, row in zip(ids_BL, packed_BLV, sizes, strict=True):
            alone = [student(part[None], use_cache=False).logits[0] for part in ids_L.split(row)]
            torch.testing.assert_close(packed_LV, torch.cat(alone), rtol=1e-4, atol=1e-4)


def _filled(sizes: list[int], length: int) -> list[int]:
    """The sizes as far as they fit, and one more that fills the rest."""
    kept: list[int] = []
    for size in sizes:
        if sum(kept) + size <= length:
            kept.append(size)
    return [*kept, length - sum(kept)] if sum(kept) < length else kept


def test_documents_go_through_an_operator_as_batches_and_come_back_in_their_order() -> None:
    document_BL = torch.tensor([[4, 4, 4, 9, 9, 0], [1, 1, 2, 2, 2, 2], [0] * 6])
    x_BL1 = torch.arange(1.0, 19.0).view(3, 6, 1)
    shapes = []

    def sums(x_BLD: Tensor) -> Tensor:
        shapes.append(tuple(x_BLD.shape))
        return x_BLD.cumsum(1)

    found = by_document(sums, x_BL1, document_BL)[..., 0]
    assert found.tolist() == [[1, 3, 6, 4, 9, 6], [7, 15, 9, 19, 30, 42], [13, 27, 42, 58, 75, 93]]
    assert sorted(shapes) == [(1, 1, 1), (1, 6, 1), (2, 2, 1), (2, 4, 1)]


@every_student
def test_packed_documents_cannot_go_on_from_a_cache(tiny_teacher: Path, ids: Tensor, placed: dict[int, Any]) -> None:
    student = student_of(tiny_teacher, placed)
    for how in ways_to_pack().values():
        with pytest.raises(ValueError, match=r"^a cache cannot go on from packed documents: call the model with use_c"):
            student(ids[:1], use_cache=True, **how)
    cache = student(ids[:1, :9], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^a cache cannot go on from packed documents"):
        student(ids[:1, 9:], past_key_values=cache, attention_mask=documents(9, 11)[:, :, 9:])


@every_student
def test_padding_may_end_in_a_later_chunk(tiny_teacher: Path, ids: Tensor, placed: dict[int, Any]) -> None:
    student, real = student_of(tiny_teacher, placed), torch.ones_like(ids)
    real[0, :8] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    cache, found = None, []
    with torch.no_grad():
        for cut in (slice(0, 5), slice(5, 8), slice(8, 9), slice(9, 20)):
            output = student(
                ids[:, cut], attention_mask=real[:, : cut.stop], position_ids=positions[:, cut],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            found.append(output.logits)
        alone = student(ids[:1, 8:]).logits[0]
    torch.testing.assert_close(torch.cat(found, dim=1)[0, 8:], alone, rtol=1e-3, atol=1e-3)


@every_student
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(
    tiny_teacher: Path, ids: Tensor, placed: dict[int, Any], side: str
) -> None:
    student, real = student_of(tiny_teacher, placed), torch.ones_like(ids)
    kept = slice(6, 20) if side == "left" else slice(0, 14)
    real[0] = 0
    real[0, kept] = 1
    with torch.no_grad():
        alone = student(ids[:1, kept]).logits[0]
        for mask in (real, padded(20, kept, slice(0, 20)), added(padded(20, kept, slice(0, 20)))):
            beside = student(ids, attention_mask=mask, position_ids=(real.cumsum(-1) - 1).clamp(min=0)).logits
            torch.testing.assert_close(beside[0, kept], alone, rtol=1e-3, atol=1e-3)


def test_a_mask_of_flash_attention_pads_as_that_of_others_does(tiny_teacher: Path) -> None:
    layer = attention_of(student_of(tiny_teacher, PLACED["hybrid"]), 0)
    x_BLD = torch.randn(2, 8, 32)
    real = torch.ones(2, 8, dtype=torch.long)
    real[1, :3] = 0
    with torch.no_grad():
        wanted = layer(x_BLD[1:, 3:])[0]
        for mask in (real, real.bool(), padded(8, slice(0, 8), slice(3, 8))):
            torch.testing.assert_close(layer(x_BLD, attention_mask=mask)[0][1:, 3:], wanted, rtol=1e-4, atol=1e-5)


def test_flash_attention_is_told_of_documents_without_a_mask(tiny_teacher: Path) -> None:
    layer: Any = attention_of(student_of(tiny_teacher, PLACED["hybrid"]), 0)
    x_1LD, positions = torch.randn(1, 20, 32), ways_to_pack()["positions"]["position_ids"]
    borders = torch.tensor([0, *SIZES], dtype=torch.int32).cumsum(0)
    with torch.no_grad():
        wanted = torch.cat([layer(part)[0] for part in x_1LD.split(SIZES, dim=1)], dim=1)
        torch.testing.assert_close(layer(x_1LD, cu_seq_lens_q=borders)[0], wanted, rtol=1e-4, atol=1e-5)
        layer.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(layer(x_1LD, position_ids=positions)[0], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x_1LD, position_ids=torch.arange(5, 25)[None])[0], layer(x_1LD)[0])


def test_of_many_borders_the_first_are_told() -> None:
    with pytest.raises(ValueError, match=r"^cu_seq_lens \[0, 1, 2, 3\] \.\.\. must rise"):
        packed_documents(None, torch.tensor([0, 1, 2, 3, 4, 9]), 1, 8)


@pytest.mark.parametrize("borders", [[0, 4], [1, 8], [0, 5, 3, 8], [0, 0, 8]])
def test_borders_that_do_not_cover_the_sequence_are_refused(borders: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seq_lens \[.*\] must rise from 0 to the 8 positions of one sequence"):
        packed_documents(None, torch.tensor(borders), 1, 8)
    with pytest.raises(ValueError, match="there are 2 sequences: pack documents into one"):
        packed_documents(None, torch.tensor([0, 3, 8]), 2, 8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 4, 16, 64])
def test_an_operator_sees_behind_the_window_of_the_attention_it_replaces(implementation: str, window: int) -> None:
    config = MistralConfig(sliding_window=window, attn_implementation=implementation)
    real = torch.ones(2, 12, dtype=torch.long)
    real[1, :5] = 0
    told = {"config": config, "inputs_embeds": torch.zeros(2, 12, 4), "past_key_values": None}
    for attention_mask, wanted in ((None, None), (real, real.bool().tolist())):
        mask = create_sliding_window_causal_mask(attention_mask=attention_mask, **told)
        found = pattern_of(mask, 2, 0, 12)
        if window > 1:  # the window of one is what documents of one token see
            assert found.document_BL is None
        assert (None if found.real_BL is None else found.real_BL.tolist()) == wanted


def test_windows_of_packed_documents_keep_the_documents() -> None:
    config = MistralConfig(sliding_window=3, attn_implementation="sdpa")
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]])
    told = {"config": config, "inputs_embeds": torch.zeros(1, 10, 4), "past_key_values": None, "attention_mask": None}
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        found = pattern_of(make(position_ids=positions, **told), 1, 0, 10)
        assert found.real_BL is None and found.document_BL is not None
        assert found.document_BL.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 3]]


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_tokens_are_real_that_may_see_themselves(kind: str) -> None:
    mask = padded(4, slice(2, 4), slice(0, 4), slice(0, 3), slice(0, 0))
    mask = mask if kind == "bool" else added(mask)
    found = pattern_of(mask, 4, 0, 4)
    assert found.real_BL is not None and found.document_BL is None
    assert found.real_BL.tolist() == [[False, False, True, True], [True] * 4, [True, True, True, False], [False] * 4]
    assert pattern_of(mask[:2, :, 3:], 2, 3, 1) == ONE_TEXT
    after = pattern_of(mask[:2, :, 2:], 2, 2, 2)  # the first text begins there, if all before it was padding
    assert after.alone_B is not None and after.alone_B.tolist() == [True, False]
    assert after.real_BL is None and after.document_BL is None
    assert pattern_of(None, 2, 0, 4) == ONE_TEXT
    room = padded(9, slice(2, 9), slice(0, 9))[:, :, 4:5]  # a static cache has room for positions to come
    assert pattern_of(room if kind == "bool" else added(room), 2, 4, 1) == ONE_TEXT
    later = pattern_of((room if kind == "bool" else added(room)).expand(2, 3, 1, 9), 2, 4, 1)
    assert later == ONE_TEXT


HOLE = causal(6).clone()
HOLE[4:, 1] = False
BLIND = causal(6) & ~torch.eye(6, dtype=torch.bool)
NARROW = causal(6).clone()
NARROW[3, :2] = False
PREFIX = causal(6).clone()
PREFIX[:3, :3] = True
HEADS = torch.stack([causal(6), documents(3, 3)[0, 0]])[None]
TORN = torch.tensor([[1, 1, 0, 0, 1, 1]])
UNKNOWN: dict[str, tuple[Any, str]] = {
    "everything": (torch.ones(1, 1, 6, 6, dtype=torch.bool), "is not causal, or has holes"),
    "prefix": (PREFIX[None, None], "is not causal, or has holes"),
    "keys only": (padded(6, slice(2, 6))[:, :, -1:], r"shape \(1, 1, 1, 6\) does not fit 1 sequences of 6 new positio"),
    "room that is seen": (torch.cat([causal(6), torch.ones(6, 2) == 1], 1)[None, None], "is not causal, or has holes"),
    "hole": (HOLE[None, None], "is not causal, or has holes"),
    "padding inside": (padded(6, slice(0, 6)) & (TORN[:, None, None] == 1), "is not causal, or has holes"),
    "padding inside, flash": (TORN, "^the mask has padding between real tokens, .*: pad on the left"),
    "padding after the first": (torch.tensor([[1, 0, 1, 1, 1, 1]]), "^the mask has padding between real tokens"),
    "not itself": (BLIND[None, None], "is not causal, or has holes"),
    "one narrow query": (NARROW[None, None], "what the mask lets queries see begins at odd places"),
    "bias": (-torch.arange(6.0).expand(1, 1, 6, 6), "adds a bias to scores, .*: swap no layer of a model that needs"),
    "positive bias": (added(causal(6)[None, None]).clamp(max=0) + 1, "adds a bias to scores"),
    "heads": (HEADS, "differs between heads"),
    "short": (causal(5)[None, None], r"of shape \(1, 1, 5, 5\) does not fit 1 sequences of 6 new positions after 0 se"),
    "three axes": (causal(6)[None], r"of shape \(1, 6, 6\) does not fit .* give one of \(1, 6\), or of \(1, 1, 6, 6\)"),
    "other batch": (torch.ones(3, 6, dtype=torch.long), r"of shape \(3, 6\) does not fit"),
    "fractions": (torch.ones(1, 6), r"of torch.float32 is ambiguous"),
    "no tensor": ("causal", "cannot read a mask of type str: load the model with attn_implementation='sdpa'"),
}


@pytest.mark.parametrize(("mask", "told"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_no_known_pattern_is_refused(mask: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pattern_of(mask, 1, 0, 6)


def test_a_mask_is_read_once_for_all_layers_and_again_when_it_was_changed(
    tiny_teacher: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(tiny_teacher, PLACED["all"])
    read, times = masks._read, []
    monkeypatch.setattr(masks, "_read", lambda *given: (times.append(1), read(*given))[1])
    mask = padded(20, slice(6, 20), slice(0, 20))
    first = student(ids, attention_mask=mask).logits
    assert len(times) == 1
    mask.copy_(padded(20, slice(0, 20), slice(0, 20)))
    torch.testing.assert_close(student(ids, attention_mask=mask).logits, student(ids).logits)
    assert len(times) == 2 and not torch.equal(first, student(ids).logits)
    with torch.inference_mode():
        student(ids, attention_mask=torch.ones(2, 20, dtype=torch.long))
        told = padded(20, slice(6, 20), slice(0, 20))
        torch.testing.assert_close(student(ids, attention_mask=told).logits, first)
        told.fill_(False)
        told |= causal(20)
        torch.testing.assert_close(student(ids, attention_mask=told).logits, student(ids).logits)


def test_a_cache_of_attention_is_refused(teacher: Any, tiny_teacher: Path, ids: Tensor) -> None:
    student = student_of(tiny_teacher, PLACED["hybrid"])
    with pytest.raises(ValueError, match=r"^the cache has keys and values of layer 0, which is swapped: start a new"):
        student(ids, past_key_values=teacher(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match=r"^this cache was filled by a model whose layer is swapped: start a new one"):
        teacher(ids, past_key_values=student(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("sizes", [(1, 7), (1, 1, 6), (7, 1), (2, 6)])
def test_documents_of_one_token_are_documents(sizes: tuple[int, ...]) -> None:
    wanted = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    for mask in (documents(*sizes), added(documents(*sizes))):
        found = pattern_of(mask, 1, 0, 8)
        assert found.real_BL is None and found.document_BL is not None
        starts = [int(document_B.nonzero()[0]) for document_B in wanted[None] == wanted.unique()[:, None]]
        changes = (found.document_BL[0].diff() != 0).nonzero().flatten() + 1
        assert [0, *changes.tolist()] == starts
