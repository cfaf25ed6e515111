"""Near positions by softmax: with a window as long as the text the operator is the attention it replaces."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig, WindowConfig
from operators.mixing.near import near, whole
from orchestrator.distill.measuring.statistics import EXAMPLES, attention_statistics
from orchestrator.distill.models.auto import AutoModelForCausalLM
from orchestrator.distill.models.export import exported
from orchestrator.distill.models.exported_model import operator_config
from orchestrator.distill.models.sites import sites
from orchestrator.distill.models.student import load_student, load_teacher, save_student
from orchestrator.distill.models.swap import swap
from orchestrator.distill.stage import run_stage
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.spec import DistilSpec, PhaseSpec
from tests.distill.students import llama
from tests.models.models import logits, teacher_of, text
from tests.texts import write_tokens

POSITIVE = ImplicitFilterConfig(positive=True, width=16, features=9)
POWER: dict[str, Any] = {"feature_map": "power", "key_dim": 4, "normalise": True, "key_gate": True, "filter": POSITIVE}
TIED: dict[str, Any] = {"feature_map": "power", "degree": 8, "normalise": True, "tied": True, "filter": POSITIVE}


def windowed(model: Any, config: HyenaConfig | WindowConfig, ids: Tensor) -> list[Any]:
    """All layers of a model swapped in place, one after the other's statistics."""
    layers = tuple(sites(model))
    return swap(model, layers, config, torch.Generator().manual_seed(0), statistics=seen(model, ids))


def seen(model: Any, ids: Tensor) -> Any:
    return attention_statistics(model, tuple(sites(model)), ids, near=True)


NAMES = [
    "llama",
    "gpt_neox",
    "qwen3",
    "cohere",
    "nanochat",
    "stablelm, normed",
    "opt",
    "granite",
    "gpt2, scaled by layer",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("far", [None, POWER, TIED], ids=["alone", "with a far part", "tied"])
def test_a_window_as_long_as_the_text_is_the_attention(name: str, far: Any) -> None:
    """Grouped heads, rotations of some channels, of neighbours, the other way round, or none, norms, scales."""
    model, ids = teacher_of(name), text()
    wanted = logits(model, ids)
    operator = HyenaConfig(heads=4, window=14, **far) if far else WindowConfig(window=3, sinks=14)
    windowed(model, operator, ids)
    near_enough = 5e-5 if "normed" in name else 1e-5  # the norm's own epsilon is not read
    assert (logits(model, ids) - wanted).abs().max() <= near_enough * wanted.abs().max()


def test_a_rotation_that_scales_is_taken_over() -> None:
    """YaRN turns slowly and multiplies what it turns."""
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    config = llama().config
    config.rope_parameters = yarn
    model, ids = type(llama())(config).eval(), text()
    wanted = logits(model, ids)
    found = seen(model, ids)[0].rotation
    assert found.factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    windowed(model, WindowConfig(window=14), ids)
    assert (logits(model, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_a_rotation_that_is_not_seen_is_an_error(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^layer 0: no usual rotation of queries and keys explains what the attention"
    ):
        seen(teacher_of(name), text())


def test_statistics_have_the_inputs_of_the_first_texts(teacher: Any) -> None:
    ids = torch.randint(1, 300, (EXAMPLES + 2, 12), generator=torch.Generator().manual_seed(3))
    found = seen(teacher, ids)[0].examples
    assert torch.equal(found, teacher.gpt_neox.layers[0].input_layernorm(teacher.gpt_neox.embed_in(ids[:EXAMPLES])))


@pytest.mark.parametrize("far", [POWER, TIED], ids=["rows of its own", "tied"])
@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_near_positions_start_with_the_share_of_the_weight_that_they_have_in_the_attention(
    teacher: Any, sinks: int, far: Any
) -> None:
    ids, window = torch.randint(1, 300, (3, 40), generator=torch.Generator().manual_seed(2)), 8
    for layer in teacher.gpt_neox.layers:
        layer.attention.query_key_value.weight.mul_(8.0)  # so that weights differ
    statistics = seen(teacher, ids)
    teacher.set_attn_implementation("eager")
    weights_BHLL = teacher(ids, output_attentions=True).attentions[1]
    lag_LL = torch.arange(40)[:, None] - torch.arange(40)
    near_LL = (lag_LL < window) | (torch.arange(40) < sinks)
    wanted_BHL = (weights_BHLL * near_LL).sum(-1)
    config = HyenaConfig(heads=4, window=window, sinks=sinks, **far)
    [placed] = swap(teacher, [1], config, torch.Generator().manual_seed(0), statistics=statistics)
    found_BHL = share_of(placed.operator, statistics[1].examples)
    later = slice(window + sinks, None)
    difference_H = (found_BHL - wanted_BHL)[..., later].mean((0, 2))
    assert difference_H.abs().max() < 1e-3
    assert (wanted_BHL[..., later].mean((0, 2)) < 0.9).all(), "or there was nothing to find"
    assert torch.equal(found_BHL[..., :window], torch.ones(3, 4, window))


@pytest.mark.parametrize("config", [HyenaConfig(heads=4, window=5, **POWER), WindowConfig(window=5)])
def test_a_stage_starts_and_trains_them_but_for_the_frequencies(
    place: Any, tiny_teacher: Path, tmp_path: Path, config: Any
) -> None:
    write_tokens(tmp_path, train=range(1, 289))
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(1,), new_layers=(1,), operator=config, batch_size=2,
        phases=(PhaseSpec(losses=Losses(kl=1.0), steps=2),), sequence_length=16, first_sequence=0, freeze=(),
        optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    there = place("stage", {"tokens": tmp_path, "teacher": tiny_teacher, "parent": tiny_teacher})
    run_stage(spec, there)
    near = load_student(there.out, load_teacher(tiny_teacher)).gpt_neox.layers[1].attention.operator.near
    turned = torch.tensor([1.0, 0.0, 0.0, 0.0])  # of 8 channels 2
    torch.testing.assert_close(near.frequencies, turned, rtol=0.0, atol=1e-6)
    assert all(bool(parameter.any()) for parameter in near.parameters())


def share_of(operator: Any, x_BLD: Tensor) -> Tensor:
    """The near share (B, H, L): what comes out of values that are 1 where a position is near and 0 where it is far."""
    length, width = x_BLD.shape[1], operator.inner // operator.heads
    p_BEL = operator.in_proj(x_BLD).transpose(1, 2)
    rows = p_BEL[:, : 2 * operator.inner] if operator.config.tied else p_BEL[:, -2 * operator.inner :]
    q_BHKL, k_BHKL = (part.unflatten(1, (operator.heads, width)) for part in rows.chunk(2, 1))
    turned_BHKL, still_BHKL, k_BHKL, still_k_BHKL = operator.near.products(q_BHKL, k_BHKL, 0)
    lse = near(turned_BHKL, whole(k_BHKL, k_BHKL, operator.sinks, None), operator.window)[1][:, :, 0]
    logs_BHL = lse - operator.near.level(still_BHKL)[:, :, 0]
    if operator.config.tied:
        q, k, gate = still_BHKL, still_k_BHKL - operator.near.centre.view(operator.heads, width, 1), torch.zeros(())
    else:
        q, k, _, gate = operator.layout.parts(p_BEL[:, : -2 * operator.inner])
    powers_BHLL = (1 + q.transpose(2, 3) @ k / operator.degree) ** operator.degree * gate.clamp(max=10.0).exp()
    lag_LL = torch.arange(length)[:, None] - torch.arange(length)
    h_HLL = operator.filter(length)[:, lag_LL.clamp_min(0)]
    far_LL = (lag_LL >= operator.window) & (torch.arange(length) >= operator.sinks)
    far_BHL = (powers_BHLL * h_HLL * far_LL).sum(-1)
    return (logs_BHL - far_BHL.log()).sigmoid()


@pytest.mark.parametrize("config", [HyenaConfig(heads=2, window=5, sinks=2, **POWER), WindowConfig(window=5, sinks=2)])
def test_a_window_wants_the_attentions_heads(teacher: Any, ids: Tensor, config: Any) -> None:
    if isinstance(config, HyenaConfig):
        with pytest.raises(
            ValueError, match=r"attention's 4 heads of 8 channels .* heads are 2 of 16: set heads: 4, or"
        ):
            windowed(teacher, config, ids)
    else:
        assert windowed(teacher, config, ids)[0].operator.config.heads == 4
    with pytest.raises(ValueError, match="init: transfer of a window needs the attention's inputs and rotation"):
        swap(teacher if isinstance(config, HyenaConfig) else teacher_of("gpt_neox"), [1], WindowConfig(),
             torch.Generator(), statistics=attention_statistics(teacher_of("gpt_neox"), (1,), text()))  # fmt: skip


@pytest.mark.parametrize("config", [WindowConfig(window=5), HyenaConfig(heads=4, window=5, **TIED)])
def test_random_weights_have_the_form_of_others(config: Any) -> None:
    """As many rows and the same norms, so that their speed is that of students and a control from scratch is fair."""
    for name in ("llama", "qwen3"):
        model, ids = teacher_of(name), text()
        [started] = swap(model, [0], config, torch.Generator().manual_seed(0), statistics=seen(model, ids))
        [drawn] = swap(model, [1], dataclasses.replace(config, init="random"), torch.Generator().manual_seed(0))
        found = drawn.operator
        assert dataclasses.replace(found.config, init="transfer") == started.operator.config
        assert (found.config.groups, found.config.near_norm) == ((2, "none") if name == "llama" else (2, "rms"))
        shapes = {key: part.shape for key, part in found.state_dict().items()}
        assert shapes == {key: part.shape for key, part in started.operator.state_dict().items()}


def test_configurations_from_before_windows_are_what_they_were() -> None:
    before = HyenaConfig(heads=4, **POWER)
    values = {**dataclasses.asdict(before), "filter": dataclasses.asdict(POSITIVE)}
    for name in ("window", "sinks", "near_norm", "tied"):
        del values[name]
    assert operator_config(values) == before


@pytest.mark.parametrize(
    "config",
    [*(HyenaConfig(heads=4, window=5, sinks=2, **far) for far in (POWER, TIED)), WindowConfig(window=5, sinks=2)],
)
@torch.no_grad()
def test_students_are_saved_exported_and_decode_as_they_read(tiny_teacher: Path, tmp_path: Path, config: Any) -> None:
    teacher = load_teacher(tiny_teacher)
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    windowed(teacher, config, ids)
    save_student(teacher, load_teacher(tiny_teacher).state_dict(), tmp_path)
    loaded = load_student(tmp_path, load_teacher(tiny_teacher))
    assert torch.equal(loaded(ids).logits, teacher(ids).logits)
    model = exported(loaded, torch.float32).eval()
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, teacher(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    new = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    cached, plain = (again.generate(ids, use_cache=cache, **new) for cache in (True, False))
    assert torch.equal(cached, plain)
    alone = again.generate(ids[1:, 7:], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(cached[1:, 7:], alone)
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]
    packed = again(ids.view(1, 40), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed.view(2, 20, -1), again(ids).logits, rtol=1e-4, atol=1e-4)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    operator = half.gpt_neox.layers[0].attention.operator
    assert operator.near.frequencies.dtype == torch.float32 and operator.in_proj.weight.dtype == torch.bfloat16
