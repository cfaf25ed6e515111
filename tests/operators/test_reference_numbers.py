"""Agreement with numbers that other code computed (`tests/data/README.md`).

safari's `HyenaOperator` in float64, output and every gradient, and stripedhyena's modal filter, in parallel and step by
step.

Shapes: B batch, L positions, D channels, S modes.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from operators.channels import ChannelHyena
from operators.config import HyenaConfig, ImplicitFilterConfig
from operators.convolution.causal import long_conv
from operators.decoding.recurrence import Recurrence, first_lags
from operators.filters.modes import Modes

NUMBERS = Path(__file__).parents[1] / "data" / "reference"
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


def load(name: str) -> tuple[ChannelHyena, dict[str, Tensor]]:
    """Our operator with the fixture's parameters, and the fixture."""
    with safe_open(NUMBERS / f"{name}.safetensors", "pt") as file:
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


def test_modal_filters_in_parallel_and_step_by_step() -> None:
    theirs = load_file(NUMBERS / "stripedhyena_modal_iir_D6_S4_L24.safetensors")
    poles_DS, residues_DS = (torch.view_as_complex(theirs[name].squeeze(2)) for name in ("poles", "residues"))
    modes, direct_D, length = Modes(poles_DS.log(), residues_DS), theirs["D"], theirs["h"].shape[-1]
    lags_L = torch.arange(length)
    for h_DL in (modes.at(lags_L), first_lags(modes, length)):
        close(h_DL, theirs["h"][0], 1e-5)
    x2_BDL, x1_BDL, v_BDL = theirs["z_x2x1v"].chunk(3, dim=1)
    z_BDL, whole = x1_BDL * v_BDL, slice(0, poles_DS.shape[0])
    parallel_BDL = x2_BDL * (long_conv(z_BDL, first_lags(modes, length)) + direct_D[:, None] * z_BDL)
    close(parallel_BDL.transpose(1, 2).contiguous(), theirs["y"], 1e-5)
    recurrence, state_BSD = Recurrence(modes, direct_D), torch.zeros(2, 4, 6, dtype=torch.complex64)
    steps = [recurrence.step(whole, z_BDL[..., t, None].transpose(1, 2), state_BSD) for t in range(length)]
    close(torch.cat(steps, dim=1) * x2_BDL.transpose(1, 2), theirs["y_stepwise"], 1e-5)
    final_BDS = torch.complex(theirs["final_state_real"], theirs["final_state_imag"])  # ours has the residues in it
    close(
        torch.view_as_real(state_BSD), torch.view_as_real((final_BDS * residues_DS).transpose(1, 2).contiguous()), 1e-4
    )
