"""What trains, how fast, and when: groups of parameters, their learning rates and the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training import muon
from orchestrator.distill.training.optimizers import make_optimizers, schedule, set_learning_rate, trainable_counts
from orchestrator.study.recipe import Optimizer

RATES = {"matrix_lr": 0.1, "lr": 0.01, "rest_scale": 0.5}
OPERATOR = ".operator."


@pytest.fixture
def student(tiny_teacher: Path) -> Any:
    model = load_teacher(tiny_teacher)
    swap(model, (1,), HyenaConfig(), torch.Generator().manual_seed(0))
    return model


def rates(model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float]]:
    """Parameter name -> optimizer and learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(optimizer).__name__, group["lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_muon_takes_the_matrices_adamw_the_rest_and_the_rest_is_slower(student: Any) -> None:
    found = rates(student, make_optimizers(student, Optimizer(**RATES)))
    layer = "gpt_neox.layers.1."
    assert found[f"{layer}attention.operator.in_proj.weight"] == ("BatchedMuon", 0.1)
    assert found[f"{layer}mlp.dense_h_to_4h.weight"] == ("BatchedMuon", 0.05)
    assert found["gpt_neox.layers.0.attention.query_key_value.weight"] == ("BatchedMuon", 0.05)
    for name in ("in_proj.bias", "short_weight", "short_bias", "direct", "filter.readout.weight"):
        assert found[f"{layer}attention.operator.{name}"] == ("AdamW", 0.01), name
    for name in ("gpt_neox.embed_in.weight", "lm_head.weight", f"{layer}input_layernorm.weight"):
        assert found[name] == ("AdamW", 0.005), name
    assert set(found) == {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def test_every_matrix_that_muon_takes_is_a_map_between_hidden_states(student: Any) -> None:
    found = rates(student, make_optimizers(student, Optimizer()))
    muon = {name for name, (optimizer, _) in found.items() if optimizer == "BatchedMuon"}
    assert muon and all(student.get_parameter(name).ndim == 2 for name in muon)
    assert not [name for name in muon if ".filter." in name or "embed" in name or "short" in name]


def test_adamw_alone_takes_everything_at_its_own_rate(student: Any) -> None:
    found = rates(student, make_optimizers(student, Optimizer(method="adamw", **RATES)))
    assert {optimizer for optimizer, _ in found.values()} == {"AdamW"}
    assert {rate for name, (_, rate) in found.items() if OPERATOR in name} == {0.01}
    assert {rate for name, (_, rate) in found.items() if OPERATOR not in name} == {0.005}


def test_a_rest_scale_of_zero_trains_the_operators_only(student: Any) -> None:
    found = rates(student, make_optimizers(student, Optimizer(rest_scale=0.0)))
    assert all(OPERATOR in name for name in found)
    assert all(parameter.requires_grad == (OPERATOR in name) for name, parameter in found_in(student))
    counts = trainable_counts(student)
    assert counts["rest_trainable"] == 0
    assert counts["operator_trainable"] == sum(p.numel() for name, p in found_in(student) if OPERATOR in name)


@pytest.mark.parametrize("method", ["muon", "adamw"])
def test_rates_fall_with_every_layer_above(student: Any, method: Any) -> None:
    """Three layers: the embedding has all of them above it, the last layer and what follows it none."""
    flat = rates(student, make_optimizers(student, Optimizer(method=method, **RATES)))
    found = rates(student, make_optimizers(student, Optimizer(method=method, layer_decay=0.5, **RATES)))
    for name, (optimizer, rate) in flat.items():
        above = 2 - int(name.split(".")[2]) if ".layers." in name else 3 * ("embed_in" in name)
        assert found[name] == (optimizer, pytest.approx(rate * 0.5**above)), name
    assert {name.split(".")[2] for name in flat if ".layers." in name} == {"0", "1", "2"}


def found_in(student: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Named parameters, those left out that an operator itself holds fixed."""
    return [(name, p) for name, p in student.named_parameters() if not name.endswith("filter.features")]


@pytest.mark.parametrize(
    ("globs", "frozen"),
    [
        (("*embed*",), {"gpt_neox.embed_in.weight"}),
        (("lm_head.*", "gpt_neox.embed_in.weight"), {"gpt_neox.embed_in.weight", "lm_head.weight"}),
        (("*.layers.0.mlp.dense_h_to_4h.?ias",), {"gpt_neox.layers.0.mlp.dense_h_to_4h.bias"}),
        (("*operator.direct",), {"gpt_neox.layers.1.attention.operator.direct"}),
    ],
)
def test_freeze_takes_parameters_out_by_glob(student: Any, globs: tuple[str, ...], frozen: set[str]) -> None:
    every = set(rates(student, make_optimizers(student, Optimizer())))
    assert every - set(rates(student, make_optimizers(student, Optimizer(), globs))) == frozen
    assert not any(student.get_parameter(name).requires_grad for name in frozen)


@pytest.mark.parametrize("glob", ["lm_head.*", "gpt_neox.embed_in.weight"])
def test_a_tied_head_is_frozen_by_either_name(tied_teacher: Path, glob: str) -> None:
    model = load_teacher(tied_teacher)
    every = set(rates(model, make_optimizers(model, Optimizer())))
    assert every - set(rates(model, make_optimizers(model, Optimizer(), (glob,)))) == {"gpt_neox.embed_in.weight"}
    assert not model.lm_head.weight.requires_grad


def test_a_frozen_parameter_trains_again_in_a_stage_that_does_not_freeze_it(student: Any) -> None:
    make_optimizers(student, Optimizer(rest_scale=0.0), ("*operator.direct",))
    found = rates(student, make_optimizers(student, Optimizer()))
    assert {"gpt_neox.layers.1.attention.operator.direct", "lm_head.weight"} <= set(found)


def test_what_an_operator_holds_fixed_stays_fixed(tiny_teacher: Path) -> None:
    names = {}
    for trained in (True, False):
        model = load_teacher(tiny_teacher)
        config = HyenaConfig(filter=ImplicitFilterConfig(train_frequency=trained))
        swap(model, (1,), config, torch.Generator().manual_seed(0))
        names[trained] = set(rates(model, make_optimizers(model, Optimizer())))
    assert {name.rsplit(".", 1)[1] for name in names[True] - names[False]} == {"frequency"}


def test_a_glob_without_a_match_is_told_with_an_example(student: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^recipe\.freeze: '\*embedd\*' matches no parameter; names look like 'gpt_neox"
    ):
        make_optimizers(student, Optimizer(), ("*embedd*",))


def test_nothing_left_to_train_is_an_error(student: Any) -> None:
    with pytest.raises(ValueError, match=r"^recipe\.freeze leaves no parameter to train: take a pattern out"):
        make_optimizers(student, Optimizer(), ("*",))


def test_the_schedule_rises_stays_and_falls() -> None:
    config = Optimizer(warmup=0.1, decay=0.4)
    factors = [schedule(step, 100, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:60] == [1.0] * 50
    assert factors[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.05, 0.4)])
def test_every_step_learns_something_and_none_too_much(steps: int, warmup: float, decay: float) -> None:
    config = Optimizer(warmup=warmup, decay=decay)
    assert all(0 < schedule(step, steps, config) <= 1 for step in range(steps))


def test_a_factor_scales_each_groups_own_rate_and_is_not_remembered(student: Any) -> None:
    optimizers = make_optimizers(student, Optimizer(**RATES))
    before = rates(student, optimizers)
    set_learning_rate(optimizers, 0.1)
    set_learning_rate(optimizers, 0.5)
    after = rates(student, optimizers)
    assert after == {name: (kind, rate * 0.5) for name, (kind, rate) in before.items()}


@pytest.mark.parametrize(("decay", "nesterov"), [(0.1, True), (0.0, False)])
def test_muon_of_many_matrices_is_torchs(decay: float, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide, tall, square, one of its kind, one without a gradient; batches that are cut."""
    monkeypatch.setattr(muon, "ON_CPU", 2 * 24 * 40)
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda _: True)  # as torch's do, however slowly
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (24, 24), (24, 40), (1, 7), (40, 24), (24, 40)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": decay, "nesterov": nesterov}
    optimizers = muon.BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(shapes[index], generator=generator)
            for parameter in pair:
                parameter.grad = None if index == 4 else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = [(wanted - x).norm() for wanted, x in zip(theirs, start, strict=True)]
    for found, wanted, far in zip(ours, theirs, moved, strict=True):
        assert (found - wanted).norm() <= 0.01 * far  # products are rounded to bfloat16
    assert torch.equal(ours[4], start[4]) and not torch.equal(ours[0], start[0])
    names = [list(optimizer.state_dict()["state"][0]) for optimizer in optimizers]
    assert names[0] == names[1] == [muon.BUFFER]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_multiplies_in_float32_where_bfloat16_would_be_slow(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: device != "cpu")
    start, gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(start.clone())
    parameter.grad = gradient
    muon.BatchedMuon([parameter], lr=0.1, weight_decay=0.0, nesterov=False).step()
    x = (0.05 * gradient).bfloat16().double()
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    rate = 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(parameter.detach(), start - rate * x.float(), rtol=0, atol=1e-6)


def test_bfloat16_is_multiplied_where_torch_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert muon.multiplies_bfloat16("cuda")
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert muon.multiplies_bfloat16("cpu") == has
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not muon.multiplies_bfloat16("cpu")


def test_muon_in_batches_knows_one_rule_for_learning_rates() -> None:
    with pytest.raises(ValueError, match="adjust_lr_fn must be original here but is 'match_rms_adamw'"):
        muon.BatchedMuon([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="match_rms_adamw")


def test_muon_in_batches_tells_what_its_closure_told() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = muon.BatchedMuon([parameter], lr=0.1, adjust_lr_fn="original")

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step() is None
    assert torch.equal(parameter, torch.ones(2, 3))
    assert optimizer.step(closure).item() == 6.0
    assert not torch.equal(parameter, torch.ones(2, 3))


def test_muons_batches_have_at_most_so_many_numbers_or_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "ON_CPU", 6)
    many = [torch.empty(shape) for shape in ((1, 2), (2, 2), (1, 2), (3, 3), (1, 2), (3, 3), (1, 2), (2, 2))]
    found = [[tuple(x.shape) for x in batch] for batch in muon._alike(many)]
    assert found == [[(1, 2)] * 3, [(1, 2)], [(2, 2)], [(2, 2)], [(3, 3)], [(3, 3)]]
