"""Surgery touches what it names and nothing else, reads GPT-NeoX's fused matrix right, and decodes as it prefills."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from operators.config import HyenaConfig, ModalFilterConfig, OperatorConfig, SkipConfig
from operators.transfer.attention import AttentionWeights
from orchestrator.distill.models.families import family_of
from orchestrator.distill.models.reading import read
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import SwappedAttention, decode_by, fit_errors, swap
from tests.distill.students import student_of

OPERATORS = {"order 2": HyenaConfig(), "order 3": HyenaConfig(order=3), "heads": HyenaConfig(heads=4)}
HYBRID = {"all": (0, 1, 2), "hybrid, attention first": (1, 2), "hybrid, attention last": (0,), "none": ()}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
every_hybrid = pytest.mark.parametrize("layers", HYBRID.values(), ids=HYBRID)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read_of(attention: Any) -> AttentionWeights:
    return read(attention, family_of("gpt_neox", attention))


def placed(layers: tuple[int, ...], operator: OperatorConfig | None = None) -> dict[int, OperatorConfig]:
    """One operator in all of these layers."""
    return dict.fromkeys(layers, operator or HyenaConfig(heads=4))


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


def continued(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
    found: torch.Tensor = model.generate(ids, attention_mask=mask, **settings)
    return found[:, ids.shape[1] :]


def test_swapping_nothing_leaves_logits_bitwise_equal(teacher: Any, tiny_teacher: Path, ids: torch.Tensor) -> None:
    other = load_teacher(tiny_teacher)
    assert swap(other, (), HyenaConfig(), generator()) == []
    assert torch.equal(logits(other, ids), logits(teacher, ids))


@every_operator
def test_what_is_not_swapped_is_bitwise_unchanged(teacher: Any, tiny_teacher: Path, operator: HyenaConfig) -> None:
    student = load_teacher(tiny_teacher)
    placed = swap(student, (2, 0), operator, generator())
    assert [module.layer for module in placed] == [2, 0]
    assert [isinstance(attention_of(student, i), SwappedAttention) for i in range(3)] == [True, False, True]
    before, after = teacher.state_dict(), student.state_dict()
    kept = {
        name for name in before if not name.startswith(("gpt_neox.layers.0.attention", "gpt_neox.layers.2.attention"))
    }
    assert kept == {name for name in after if ".operator." not in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_swap_is_decided_by_its_seed(tiny_teacher: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        model = load_teacher(tiny_teacher)
        swap(model, (0, 1), HyenaConfig(init="random"), generator(seed))
        states.append(torch.cat([tensor.flatten() for tensor in model.state_dict().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_one_position_attends_to_itself_so_its_output_is_value_then_output_projection(teacher: Any) -> None:
    for layer in range(3):
        attention = attention_of(teacher, layer)
        weights = read_of(attention)
        x_BLD = torch.randn(5, 1, 32)
        position = teacher.gpt_neox.rotary_emb(x_BLD, torch.zeros(1, 1, dtype=torch.long))
        with torch.no_grad():
            own = attention(x_BLD, attention_mask=None, position_embeddings=position)[0]
        value_BLD = x_BLD @ weights.value.T + weights.value_bias
        torch.testing.assert_close(value_BLD @ weights.output.T + weights.output_bias, own, rtol=1e-4, atol=1e-5)


def test_attention_computed_from_the_weights_that_are_read_is_the_modules_own(teacher: Any) -> None:
    attention = attention_of(teacher, 1)
    weights = read_of(attention)
    x_BLD = torch.randn(2, 9, 32)
    cos, sin = teacher.gpt_neox.rotary_emb(x_BLD, torch.arange(9)[None])
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        own = attention(x_BLD, attention_mask=causal[None, None], position_embeddings=(cos, sin))[0]
    parts = {
        name: (x_BLD @ getattr(weights, name).T + getattr(weights, f"{name}_bias")).view(2, 9, 4, 8).transpose(1, 2)
        for name in ("query", "key", "value")
    }
    query, key = apply_rotary_pos_emb(parts["query"], parts["key"], cos, sin)
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~causal, float("-inf"))
    mixed = (scores.softmax(-1) @ parts["value"]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed @ weights.output.T + weights.output_bias, own, rtol=1e-4, atol=1e-5)


def test_attention_without_biases_is_read_without(tiny_teacher: Path) -> None:
    config = GPTNeoXConfig.from_pretrained(tiny_teacher, attention_bias=False)
    model: Any = GPTNeoXForCausalLM(config)
    weights = read_of(attention_of(model, 1))
    biases = [weights.query_bias, weights.key_bias, weights.value_bias, weights.output_bias]
    assert biases == [None] * 4
    made: Any = swap(model, [1], HyenaConfig(heads=4), generator())[0].operator
    assert torch.equal(made.out_proj.weight, weights.output)


@every_operator
def test_transfer_puts_the_attentions_projections_into_the_operator(teacher: Any, operator: HyenaConfig) -> None:
    weights = read_of(attention_of(teacher, 1))
    made: Any = swap(teacher, [1], operator, generator())[0].operator
    copied = ["query", "key", "value"] if operator.heads else ["value"]
    for back, name in enumerate(reversed(copied), start=1):
        rows = slice((operator.order + 1 - back) * 32, (operator.order + 2 - back) * 32)
        assert torch.equal(made.in_proj.weight[rows], getattr(weights, name)), name
        assert torch.equal(made.in_proj.bias[rows], getattr(weights, f"{name}_bias")), name
    assert torch.equal(made.out_proj.weight, weights.output)
    assert torch.equal(made.out_proj.bias, weights.output_bias)


class Adapted(torch.nn.Module):
    """A linear layer with an adapter of rank 2 around it, as PEFT puts it there."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.down = torch.nn.Linear(base.in_features, 2)
        self.up = torch.nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> Any:
        return self.base_layer(x) + self.up(self.down(x))


@every_operator
def test_adapters_around_all_linear_layers_take_part(
    tiny_teacher: Path, ids: torch.Tensor, operator: HyenaConfig
) -> None:
    student = student_of(tiny_teacher, placed((0, 2), operator))
    before = logits(student, ids)
    linear = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linear:
        student.set_submodule(name, Adapted(student.get_submodule(name)))
    student(ids, use_cache=False).logits.square().sum().backward()
    adapters = {name: parameter for name, parameter in student.named_parameters() if ".up." in name}
    assert len(adapters) == 2 * len(linear)
    assert [name for name, parameter in adapters.items() if parameter.grad is None] == []
    assert (logits(student, ids) - before).abs().max() > 0.1
    assert torch.equal(continued(student, ids, use_cache=True), continued(student, ids, use_cache=False))


@every_operator
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_operator_has_the_precision_of_the_attention_it_replaces(
    tiny_teacher: Path, ids: torch.Tensor, operator: HyenaConfig, kind: torch.dtype
) -> None:
    single, model = load_teacher(tiny_teacher), load_teacher(tiny_teacher).to(kind)
    if kind != torch.float64:
        single.to(kind).float()
    output = read_of(attention_of(model, 1)).output
    made: Any = swap(model, [1], operator, generator())[0].operator
    wide = torch.float64 if kind == torch.float64 else torch.float32  # of filters, which half precision would change
    for name, parameter in made.named_parameters():
        assert parameter.dtype == (wide if name.startswith("filter.") else kind), name
    assert torch.equal(made.out_proj.weight, output)
    swap(single, [1], operator, generator())
    for name, parameter in single.named_parameters():  # set from the same weights, and rounded at the end
        given = model.get_parameter(name)
        torch.testing.assert_close(given, parameter.to(given.dtype), msg=name, rtol=1e-6, atol=1e-6)
    found = continued(model, ids[:1]), continued(model, ids[:1], use_cache=False)
    assert logits(model, ids).dtype == kind and found[0].shape == found[1].shape == (1, 12)


def test_an_operator_is_where_its_layer_is(teacher: Any) -> None:
    teacher.gpt_neox.layers[1].to("meta")
    made = swap(teacher, [0, 1], HyenaConfig(), generator(), initialise=False)
    assert [{parameter.device.type for parameter in placed.parameters()} for placed in made] == [{"cpu"}, {"meta"}]


def test_weights_that_are_no_usual_numbers_are_refused(teacher: Any) -> None:
    attention_of(teacher, 1).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^the attention of layer 1 has weights of torch\.float8_e4m3fn: load"):
        swap(teacher, [1], HyenaConfig(), generator())


def test_a_layer_without_attention_is_refused(teacher: Any) -> None:
    teacher.gpt_neox.layers[1].attention = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^layer 1 cannot be swapped: it has no softmax attention .*these can: 0, 2$"):
        swap(teacher, [1], HyenaConfig(), generator())


@every_hybrid
def test_attention_weights_stand_at_their_layers_place(
    tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]
) -> None:
    model = load_teacher(tiny_teacher)
    model.set_attn_implementation("eager")
    whole = model(ids, output_attentions=True).attentions
    for layer in layers:
        swap(model, [layer], SkipConfig(), generator())
    for student in (model, copy.deepcopy(model)):
        output = student(ids, output_attentions=True, output_hidden_states=True)
        assert [found is None for found in output.attentions] == [layer in layers for layer in range(3)]
        assert len(output.hidden_states) == 4
        first = next((layer for layer in range(3) if layer not in layers), None)
        if first == 0:
            assert torch.equal(output.attentions[0], whole[0])
        assert student(ids).attentions is None


def test_skip_leaves_attention_out(teacher: Any) -> None:
    swap(teacher, [1], SkipConfig(), generator())
    assert torch.equal(attention_of(teacher, 1)(torch.randn(2, 4, 32))[0], torch.zeros(2, 4, 32))


@every_hybrid
@every_operator
def test_generation_with_a_cache_is_generation_without(
    tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...], operator: HyenaConfig
) -> None:
    student = student_of(tiny_teacher, placed(layers, operator))
    assert torch.equal(continued(student, ids, use_cache=True), continued(student, ids, use_cache=False))


@every_hybrid
def test_stepwise_logits_are_those_of_the_whole_sequence(
    tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]
) -> None:
    student = student_of(tiny_teacher, placed(layers))
    whole = logits(student, ids)
    with torch.no_grad():
        output = student(input_ids=ids[:, :5], use_cache=True)
        found = [output.logits]
        for cut in (slice(5, 6), slice(6, 9), slice(9, 10), slice(10, 20)):
            output = student(input_ids=ids[:, cut], past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-3, atol=1e-3)


@every_hybrid
def test_beam_search_reorders_states_with_their_sequences(
    tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]
) -> None:
    student = student_of(tiny_teacher, placed(layers))
    found = [continued(student, ids, num_beams=3, num_return_sequences=2, use_cache=cache) for cache in (True, False)]
    assert found[0].shape == (4, 12)
    assert torch.equal(found[0], found[1])


@every_hybrid
@pytest.mark.parametrize("padding", [0, 6])
def test_a_static_cache_generates_the_same(
    tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...], padding: int
) -> None:
    student, mask = student_of(tiny_teacher, placed(layers)), torch.ones_like(ids)
    mask[0, :padding] = 0
    wanted = continued(student, ids, attention_mask=mask, use_cache=False)
    for _ in range(2):  # the second uses the first one's cache again
        found = continued(student, ids, attention_mask=mask, cache_implementation="static")
        assert torch.equal(found, wanted)


@every_hybrid
def test_stepwise_logits_with_a_static_cache(tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]) -> None:
    student = student_of(tiny_teacher, placed(layers))
    cache = StaticCache(config=student.config, max_cache_len=40)
    with torch.no_grad():
        found = [
            student(input_ids=ids[:, cut], past_key_values=cache, use_cache=True).logits
            for cut in (slice(0, 5), slice(5, 6), slice(6, 9), slice(9, 10), slice(10, 20))
        ]
    torch.testing.assert_close(torch.cat(found, dim=1), logits(student, ids), rtol=1e-3, atol=1e-3)


@every_hybrid
def test_prompt_lookup_crops_states(tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]) -> None:
    student = student_of(tiny_teacher, placed(layers))
    repeated = torch.cat([ids[:1, :8], ids[:1, :8]], dim=1)
    looked = continued(student, repeated, prompt_lookup_num_tokens=3)
    assert torch.equal(looked, continued(student, repeated, use_cache=False))


@pytest.mark.parametrize("croppable", [True, False])
@pytest.mark.parametrize("mode", ["tiled", "direct", "modal"])
def test_layers_decode_by_the_mode_that_is_chosen(
    tiny_teacher: Path, ids: torch.Tensor, mode: str, croppable: bool
) -> None:
    modal = HyenaConfig(filter=ModalFilterConfig(modes=4))
    student = student_of(tiny_teacher, placed((0, 2), modal))
    wanted = continued(student, ids, use_cache=False)
    decode_by(student, mode, croppable=croppable)
    assert torch.equal(continued(student, ids), wanted)
    cache = student(ids).past_key_values
    assert [cache.layers[layer].state.mode for layer in (0, 2)] == [mode, mode]
    assert cache.is_croppable == croppable
    assert fit_errors(student) == {}


def test_fitted_modes_decode_within_their_reported_error(tiny_teacher: Path, ids: torch.Tensor) -> None:
    student = load_teacher(tiny_teacher).eval()
    swap(student, (0, 1), HyenaConfig(), generator())
    swap(student, (2,), SkipConfig(), generator())
    whole = logits(student, ids)
    decode_by(student, "modal", croppable=False)
    errors = fit_errors(student)
    assert {layer: tuple(error_C.shape) for layer, error_C in errors.items()} == {0: (32,), 1: (32,)}
    assert 0 < max(error_C.max().item() for error_C in errors.values()) < 0.01
    with torch.no_grad():
        output = student(input_ids=ids[:, :5])
        stepped = [student(ids[:, i : i + 1], past_key_values=output.past_key_values).logits for i in range(5, 20)]
    difference = (torch.cat(stepped, dim=1) - whole[:, 5:]).norm() / whole.norm()
    assert 0 < difference < 0.01


def test_a_mode_that_a_layer_lacks_is_refused_by_layer_and_nothing_changes(tiny_teacher: Path) -> None:
    student = load_teacher(tiny_teacher)
    swap(student, (0,), HyenaConfig(), generator())
    first, *_ = swap(student, (1,), HyenaConfig(heads=4), generator())
    with pytest.raises(ValueError, match="layer 1: mode must be one of direct with implicit filters and heads but is"):
        decode_by(student, "modal")
    assert first.step_mode is None


@every_hybrid
def test_left_padding_changes_nothing(tiny_teacher: Path, ids: torch.Tensor, layers: tuple[int, ...]) -> None:
    student = student_of(tiny_teacher, placed(layers))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :6], mask[0, :6] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    beside = logits(student, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(beside[0, 6:], logits(student, ids[:1, 6:])[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(beside[1], logits(student, ids[1:])[0], rtol=1e-3, atol=1e-3)
    alone = torch.cat([continued(student, ids[:1, 6:]), continued(student, ids[1:])])
    assert torch.equal(continued(student, padded, attention_mask=mask), alone)


def test_a_layer_is_swapped_once(teacher: Any) -> None:
    swap(teacher, [1], HyenaConfig(), generator())
    with pytest.raises(ValueError, match=r"^layer 1 is swapped already"):
        swap(teacher, [1], HyenaConfig(), generator())


def test_heads_that_do_not_divide_the_width_are_refused(teacher: Any) -> None:
    with pytest.raises(ValueError, match="heads must divide the model width 32 but is 5"):
        swap(teacher, [0], HyenaConfig(heads=5), generator())


def test_a_model_without_sites_is_refused_with_the_reason() -> None:
    model = BertLMHeadModel(
        BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16, is_decoder=True)
    )
    with pytest.raises(ValueError, match=r"^models of type 'bert' cannot be swapped: it is a layer of an encoder"):
        swap(model, [0], HyenaConfig(), generator())
