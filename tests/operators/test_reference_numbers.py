"""Agreement with safari's `HyenaOperator` in float64: output, input gradient, every parameter's gradient."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from operators.channels import ChannelHyena
from operators.config import HyenaConfig, ImplicitFilterConfig

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "fixtures"
NAMES = [
    "safari_hyena_order2_L20_lmax32_emb5",
    "safari_hyena_order2_L32_lmax32_emb5",
    "safari_hyena_order3_L32_lmax32_emb5",
]
RENAMED = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "out_proj.weight": "out_proj.weight",
    "out_proj.bias": "out_proj.bias",
    "short_weight": "short_filter.weight",
    "short_bias": "short_filter.bias",
    "direct": "filter_fn.bias",
    "filter.features": "filter_fn.pos_emb.z",
    "filter.frequency": "filter_fn.implicit_filter.1.freq",
    "filter.layers.0.weight": "filter_fn.implicit_filter.0.weight",
    "filter.layers.0.bias": "filter_fn.implicit_filter.0.bias",
    "filter.layers.1.weight": "filter_fn.implicit_filter.2.weight",
    "filter.layers.1.bias": "filter_fn.implicit_filter.2.bias",
    "filter.layers.2.weight": "filter_fn.implicit_filter.4.weight",
    "filter.layers.2.bias": "filter_fn.implicit_filter.4.bias",
    "filter.readout.weight": "filter_fn.implicit_filter.6.weight",
}

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"reference numbers are absent: {FIXTURES}")


def load(name: str) -> tuple[ChannelHyena, dict[str, Tensor]]:
    """Our operator with the fixture's parameters, and the fixture."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        numbers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        built = json.loads(file.metadata()["config"])
    filters = ImplicitFilterConfig(
        features=built["emb_dim"],
        width=built["filter_order"],
        sine_frequency=built["w"],
        window="linear",
        offset=0.0,
        train_features=True,
    )
    config = HyenaConfig(order=built["order"], filter=filters)
    operator = ChannelHyena(config, built["d_model"], built["l_max"]).double()
    shapes = {name: parameter.shape for name, parameter in operator.named_parameters()}
    operator.load_state_dict({ours: numbers[f"param.{RENAMED[ours]}"].view(shapes[ours]) for ours in shapes})
    return operator, numbers


def close(ours: Tensor | None, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["forward", "reference"])
def test_output_and_every_gradient(name: str, path: str) -> None:
    operator, numbers = load(name)
    x_BLD = numbers["x"].clone().requires_grad_()
    y_BLD = getattr(operator, path)(x_BLD)
    y_BLD.backward(numbers["cotangent"])
    close(y_BLD, numbers["y"])
    close(x_BLD.grad, numbers["dx"])
    checked = set()
    for ours, parameter in operator.named_parameters():
        close(parameter.grad, numbers[f"grad.{RENAMED[ours]}"])
        checked.add(f"grad.{RENAMED[ours]}")
    assert checked == {key for key in numbers if key.startswith("grad.")}


@pytest.mark.parametrize("name", NAMES)
def test_filter_and_positional_features(name: str) -> None:
    """The reference computes its features in float32, so ours agree with them to that."""
    operator, numbers = load(name)
    close(operator.filter(numbers["x"].shape[1]).t(), numbers["k_L_by_(o d)"])
    loaded = operator.filter.features.detach().clone()
    operator.filter.initialise(torch.Generator().manual_seed(0))
    close(operator.filter.features, loaded, 1e-6)
