"""What an attention does by lag, looked at without changing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill import stage, start
from orchestrator.distill.measuring import statistics
from orchestrator.distill.measuring.statistics import attention_statistics
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training import frozen
from orchestrator.distill.training.losses import recorded
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import DistilSpec
from tests.texts import write_tokens


def test_profiles_are_the_mean_logarithm_by_lag(teacher: Any, ids: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    logits = teacher(ids).logits
    found = attention_statistics(teacher, (0, 2), ids)
    assert torch.equal(teacher(ids).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert set(found) == {0, 2} and found[0].profile.shape == (4, 20)
    teacher.set_attn_implementation("eager")
    weights_BHLL = teacher(ids, output_attentions=True).attentions[2].double()
    for lag in (0, 3, 15):
        wanted_H = sum(weights_BHLL[:, :, t, t - lag].log().mean(0) for t in range(max(10, lag), 20))
        torch.testing.assert_close(found[2].profile[:, lag], wanted_H / (20 - max(10, lag)))


def test_heads_that_are_looked_at_in_parts_say_the_same(
    teacher: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, seen = attention_statistics(teacher, (1,), ids)[1], []
    usual = statistics._profile
    monkeypatch.setattr(statistics, "_profile", lambda part: (seen.append(part.shape[1]), usual(part))[1])
    monkeypatch.setattr(statistics, "NUMBERS", 3 * 20 * 20)  # four heads of texts of 20 positions
    found = attention_statistics(teacher, (1,), ids)[1]
    assert seen == [3, 1] * len(ids)
    torch.testing.assert_close(found.profile, wanted.profile, rtol=1e-12, atol=0.0)


def test_what_comes_after_the_last_layer_that_is_looked_at_is_not_computed(teacher: Any, ids: Tensor) -> None:
    called: list[int] = []
    for layer in range(3):
        attention_of(teacher, layer).register_forward_hook(lambda *_, layer=layer: called.append(layer))
    found = attention_statistics(teacher, (1, 0), ids)
    assert called == [0, 1] * len(ids)
    for layer, one in attention_statistics(teacher, (0, 1, 2), ids).items():
        assert layer == 2 or torch.equal(found[layer].profile, one.profile)
    assert called == [0, 1] * len(ids) + [0, 1, 2] * len(ids)


def test_inputs_have_the_mean_and_covariance_of_all_positions(teacher: Any, ids: Tensor) -> None:
    inputs: list[Tensor] = []
    keep = attention_of(teacher, 1).register_forward_pre_hook(
        lambda _, args, given: inputs.append(args[0] if args else given["hidden_states"]), with_kwargs=True
    )
    teacher(ids)
    keep.remove()
    seen = attention_statistics(teacher, (1,), ids)[1]
    x_ND = inputs[0].flatten(0, 1).double()
    torch.testing.assert_close(seen.input_mean, x_ND.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.input_covariance, x_ND.t().cov(correction=0), rtol=1e-4, atol=1e-6)


def test_a_student_that_is_swapped_in_part_can_be_looked_at(teacher: Any, ids: Tensor) -> None:
    config = HyenaConfig(heads=4, filter=ImplicitFilterConfig(positive=True, width=64, features=9))
    swap(teacher, [0], config, torch.Generator(), statistics=attention_statistics(teacher, (0,), ids))
    statistics = attention_statistics(teacher, (1,), ids)
    [placed] = swap(teacher, [1], config, torch.Generator(), statistics=statistics)
    filter_HT = placed.operator.filter(20).double()
    wanted_HT = statistics[1].profile.softmax(-1)
    assert ((filter_HT / filter_HT.sum(-1, keepdim=True) - wanted_HT).abs().sum(-1) < 0.2).all()
    assert attention_of(teacher, 1) is placed


def test_a_model_that_has_diverged_is_told_so(teacher: Any, ids: Tensor) -> None:
    with torch.no_grad():
        teacher.gpt_neox.layers[1].attention.query_key_value.bias.fill_(float("nan"))
    with pytest.raises(
        ArithmeticError, match=r"layer 1 gives no finite numbers: the student has diverged; lower recipe"
    ):
        attention_statistics(teacher, (0, 1), ids)


def test_a_stage_takes_them_on_its_device_where_the_student_stays_and_tells_them_on_the_processor(
    place: Any, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has no numbers, only places; what it would have found is taken from the teacher."""
    seen: list[tuple[str, str]] = []

    def found(model: Any, layers: tuple[int, ...], ids_BL: Tensor, near: bool) -> Any:
        seen.append((next(model.parameters()).device.type, ids_BL.device.type))
        return attention_statistics(load_teacher(tiny_teacher), layers, torch.ones(1, 16, dtype=torch.int64))

    def swapping(model: Any, layers: Any, *more: Any, **named: Any) -> None:
        seen.append((next(model.parameters()).device.type, named["statistics"][layers[0]].profile.device.type))
        raise KeyboardInterrupt

    for name, fake in {"attention_statistics": found, "swap": swapping}.items():
        monkeypatch.setattr(start, name, fake)
    monkeypatch.setattr(frozen, "check_output_head", lambda _: None)
    write_tokens(tmp_path, train=range(1, 289))
    power = HyenaConfig(
        heads=4, feature_map="power", normalise=True, key_gate=True, filter=ImplicitFilterConfig(positive=True)
    )
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(1,), new_layers=(1,), operator=power, phases=(), batch_size=1,
        sequence_length=16, first_sequence=0, freeze=(), optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    inputs = {"tokens": tmp_path, "teacher": tiny_teacher, "parent": tiny_teacher}
    with pytest.raises(KeyboardInterrupt):
        stage.distil(spec, place("device", inputs, device="meta"))
    assert seen == [("meta", "meta"), ("meta", "cpu")]


@pytest.mark.parametrize("by_name", [False, True])
def test_attention_may_be_called_by_position_or_by_name(teacher: Any, ids: Tensor, by_name: bool) -> None:
    """Model families, and versions of transformers, differ in how a layer hands its attention the input."""
    wanted = attention_statistics(teacher, (1,), ids)[1]

    def hand_over(_: Any, args: Any, given: dict[str, Any]) -> Any:
        x_BLD = args[0] if args else given.pop("hidden_states")
        return ((), {**given, "hidden_states": x_BLD}) if by_name else ((x_BLD,), given)

    attention_of(teacher, 1).register_forward_pre_hook(hand_over, with_kwargs=True)
    found = attention_statistics(teacher, (1,), ids)[1]
    assert torch.equal(found.input_mean, wanted.input_mean) and torch.equal(found.profile, wanted.profile)
    with recorded(teacher, (1,), ()) as seen:
        teacher(ids)
    x_ND = seen.mixer_in[1].flatten(0, 1).double()
    torch.testing.assert_close(x_ND.mean(0), wanted.input_mean, rtol=1e-5, atol=1e-6)
