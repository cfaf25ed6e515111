"""Linear layers of operators: their weights as they are now, whoever changed them, and what is wrapped around them.

Shapes: B batch, L positions, D model width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from operators.config import HyenaConfig
from operators.convolution.projection import plain
from tests.operators.cases import B, D, attention, close, draw, empty_like, generator, hyena, make

LENGTH = 40
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
OPTIMIZERS = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
UPDATES = [*((name, {}) for name in OPTIMIZERS if name != "SparseAdam"), *((name, {"fused": True}) for name in FUSED)]
BOTH = pytest.mark.parametrize("case", ["order 2", "heads"])


def trained_output(operator: Any, x_BLD: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return operator(x_BLD)  # type: ignore[no-any-return]


def is_as_a_fresh_copy(operator: Any, x_BLD: Tensor) -> None:
    """Outputs of training, and of a prefill's projection, equal those of the same weights in a new module."""
    copy: Any = empty_like(operator)
    copy.load_state_dict(operator.state_dict())
    assert torch.equal(trained_output(operator, x_BLD), trained_output(copy, x_BLD))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x_BDL = x_BLD.transpose(1, 2)
        assert torch.equal(operator.project(operator.in_proj, x_BDL), copy.project(copy.in_proj, x_BDL))


@BOTH
@pytest.mark.parametrize(("name", "options"), UPDATES, ids=lambda value: str(value))
def test_bfloat16_training_sees_what_an_optimizer_wrote(case: str, name: str, options: dict[str, bool]) -> None:
    operator, x_BLD = make(case), draw(B, LENGTH, D)
    parameters = [p for p in operator.parameters() if name != "Muon" or p is operator.in_proj.weight]
    optimizer = OPTIMIZERS[name](parameters, lr=0.1, **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = trained_output(operator, x_BLD).float().square().mean()
        value.backward()
        return value

    for _ in range(3):
        before = operator.in_proj.weight.clone()
        loss()
        optimizer.step(loss)
        assert not torch.equal(operator.in_proj.weight, before)
        is_as_a_fresh_copy(operator, x_BLD)


@BOTH
def test_bfloat16_sees_weights_changed_behind_autograds_back(case: str) -> None:
    operator, x_BLD = make(case), draw(B, LENGTH, D)
    other = {name: value + 0.3 for name, value in operator.state_dict().items()}
    is_as_a_fresh_copy(operator, x_BLD)
    operator.in_proj.weight.data.add_(0.5)
    is_as_a_fresh_copy(operator, x_BLD)
    with torch.inference_mode():
        operator.load_state_dict(other)
    is_as_a_fresh_copy(operator, x_BLD)


class LoRA(nn.Module):
    """What adapters do: a frozen layer inside, its output and that of two small ones added."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside.requires_grad_(False)
        self.down = nn.Parameter(draw(2, inside.in_features, seed=11).to(inside.weight))
        self.up = nn.Parameter(draw(inside.out_features, 2, seed=12).to(inside.weight) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + x @ self.down.to(x.dtype).t() @ self.up.to(x.dtype).t()  # type: ignore[no-any-return]


def adapted(linear: nn.Linear) -> nn.Module:
    return LoRA(linear)


def normed(linear: nn.Linear) -> nn.Module:
    parametrizations.weight_norm(linear)
    linear.parametrizations.weight.original0.data.mul_(1.5)
    return linear


def pruned(linear: nn.Linear) -> nn.Module:
    prune.l1_unstructured(linear, "weight", 0.5)
    linear.weight_orig.data.mul_(1.5)
    return linear


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda *arguments: 1.5 * arguments[-1])
    return linear


def hooked_before(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda _, inputs: (1.5 * inputs[0],))
    return linear


def replaced(linear: nn.Linear) -> nn.Module:
    forward = linear.forward
    linear.forward = lambda x: 1.5 * forward(x)  # type: ignore[method-assign]
    return linear


WRAPPERS = {each.__name__: each for each in (adapted, normed, pruned, hooked, hooked_before, replaced)}
PLACES = ["in_proj", "out_proj", "filter.layers.0", "filter.readout"]
PARTS = [HyenaConfig(init="random"), HyenaConfig(heads=2, init="random")]


def wrapped_and_merged(config: HyenaConfig, place: str, wrap: Callable[[nn.Linear], nn.Module]) -> Iterator[Any]:
    """An operator with a wrapper at a place, and one whose layer there has the weights that the wrapper amounts to."""
    for merged in (False, True):
        operator = hyena(config, D, 64).double()
        operator.initialise(attention(), generator())
        parent, name = operator.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
        layer = wrap(getattr(parent, name))
        if merged:
            with torch.no_grad():
                eye = torch.eye(operator.get_submodule(place).in_features).double()
                bias_E = layer(torch.zeros_like(eye[0]))
                weight_EI = (layer(eye) - bias_E).t().contiguous()
            layer = nn.Linear(len(eye), len(bias_E), bias=place != "filter.readout").double()
            layer.weight.data.copy_(weight_EI)
            if place != "filter.readout":
                layer.bias.data.copy_(bias_E)
        setattr(parent, name, layer)
        yield operator


@pytest.mark.parametrize("config", PARTS, ids=["order 2", "heads"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_around_a_linear_layer_is_honoured(config: HyenaConfig, place: str, wrapper: str) -> None:
    operator, merged = wrapped_and_merged(config, place, WRAPPERS[wrapper])
    x_BLD = draw(B, LENGTH, D).double()
    expected = merged(x_BLD)
    close(operator(x_BLD), expected, 1e-12)
    operator(x_BLD).square().sum().backward()
    adapters = [operator.get_submodule(place).up] if wrapper == "adapted" else []
    assert all(adapter.grad is not None and adapter.grad.any() for adapter in adapters)
    with torch.no_grad():
        close(operator(x_BLD), expected, 1e-12)
        state, outputs = operator.init_state(B), []
        for part in x_BLD.split([20, 1, 9, *[1] * 10], dim=1):
            outputs.append(operator.extend(part, state)[0])
    close(torch.cat(outputs, dim=1), expected, 1e-11)


@pytest.mark.parametrize("config", PARTS, ids=["order 2", "heads"])
@pytest.mark.parametrize("place", PLACES)
def test_adapters_in_half_precision(config: HyenaConfig, place: str) -> None:
    operator, merged = (each.float() for each in wrapped_and_merged(config, place, adapted))
    x_BLD = draw(B, LENGTH, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(operator(x_BLD).float(), merged(x_BLD).float(), 0.03)
    close(operator.bfloat16()(x_BLD.bfloat16()).float(), merged(x_BLD), 0.1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_layer_with_anything_around_it_is_not_plain(wrapper: str) -> None:
    assert plain(nn.Linear(D, D)) and plain(nn.Linear(D, D, bias=False))
    assert not plain(WRAPPERS[wrapper](nn.Linear(D, D)))


def test_hooks_of_all_modules_and_weights_of_a_class_of_their_own_are_not_plain() -> None:
    class Quantised(Tensor):
        pass

    linear = nn.Linear(D, D)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not plain(linear)
    handle.remove()
    assert plain(linear)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    assert not plain(linear)


def test_initialising_what_is_wrapped_already_is_an_error() -> None:
    operator = make("order 2")
    operator.in_proj = LoRA(operator.in_proj)
    with pytest.raises(ValueError, match=r"must be nn.Linear but is LoRA: initialise, then wrap"):
        operator.initialise(None, generator())
