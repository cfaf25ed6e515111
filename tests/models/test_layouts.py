"""Layouts that the common families lack: read right, called right, and with a cache as without."""

from __future__ import annotations

import pytest
import torch

from operators.config import HyenaConfig
from operators.transfer.attention import AttentionStatistics
from orchestrator.distill.models.reading import read
from orchestrator.distill.models.sites import attention_of, site_of, sites
from orchestrator.distill.models.swap import swap
from orchestrator.distill.models.verify import check_reading
from tests.models.checks import AS_TEACHER, padding
from tests.models.decoding import decoding
from tests.models.models import logits, teacher_of, text
from tests.models.reading import reading
from tests.models.tiny import VARIANTS

LAYOUTS = (
    "beam", "codegen", "dbrx", "falcon", "falcon_h1", "gemma3n_text", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese",
    "gpt_oss", "gptj", "laguna", "lfm2", "mimo_v2_flash", "mpt", "nemotron_h", "olmo2", "persimmon", *VARIANTS,
)  # fmt: skip

CALLED = ("codegen", "falcon, alibi", "falcon_h1", "gpt_neo", "gpt_neox_japanese", "mpt", "nemotron_h")  # in their way


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_its_class_computes(name: str) -> None:
    reading(name)
    check_reading(teacher_of(name))


@pytest.mark.parametrize("name", CALLED)
def test_its_students_take_padding_and_a_cache(name: str) -> None:
    assert AS_TEACHER not in padding(name)
    assert AS_TEACHER not in decoding(name)


def test_a_gate_is_read_at_the_mean_input() -> None:
    """Of a text of one token over and over, all inputs are the mean, and the gate at it is the gate itself."""
    teacher = teacher_of("qwen3_next")
    site = next(iter(sites(teacher).values()))
    gates = torch.sigmoid(site.attention.q_proj.weight.view(4, 2, 8, 32)[:, 1].flatten(0, 1) @ torch.ones(32))
    seen = AttentionStatistics(torch.zeros(4, 1), torch.ones(32), torch.zeros(32, 32))
    plain = site.attention.v_proj.weight.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1)
    assert torch.allclose(read(site.attention, site.family, seen).value, gates[:, None] * plain)
    assert torch.allclose(read(site.attention, site.family).value, 0.5 * plain)


def test_in_a_hybrid_only_attention_is_swapped_and_the_error_names_where_it_is() -> None:
    model = teacher_of("lfm2_moe")
    assert list(sites(model)) == [1, 3]
    with pytest.raises(ValueError, match=r"^layer 0 cannot be swapped: it has no softmax attention .*these can: 1, 3$"):
        swap(model, [0], HyenaConfig(), torch.Generator())
    with pytest.raises(ValueError, match=r"^layer 4 cannot be swapped: the model has 4 layers, counted from 0"):
        site_of(model, 4)
    before = logits(model, text())
    swap(model, [1, 3], HyenaConfig(), torch.Generator().manual_seed(0))
    assert not torch.equal(logits(model, text()), before)
    with pytest.raises(ValueError, match=r"^layer 3 is swapped already$"):
        swap(model, [3], HyenaConfig(), torch.Generator())


def test_attention_within_chunks_is_no_site() -> None:
    model = teacher_of("llama4_text")
    assert list(sites(model)) == [1, 3]
    with pytest.raises(ValueError, match=r"^layer 0 cannot be swapped: its attention sees chunks of the text only"):
        attention_of(model, 0)
