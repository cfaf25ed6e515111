"""Modes fitted to filters: exact for sums of modes, near for smooth filters, honest about rough ones.

Shapes: C filters, L lags.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from operators.filters.fit import fit_modes
from operators.filters.implicit import ImplicitFilter
from operators.filters.modal import ModalFilter
from tests.operators.cases import B, D, attention, close, draw, generator, hyena

LONG = 700


def implicit(**options: Any) -> Tensor:
    filters = ImplicitFilter(ImplicitFilterConfig(**options), 16, LONG)
    filters.initialise(generator())
    return filters(LONG).detach()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("length", [LONG, 4000])
def test_sums_of_modes_are_found_again(positive: bool, length: int) -> None:
    filters = ModalFilter(ModalFilterConfig(modes=4, positive=positive), 6, length).double()
    filters.initialise(generator())
    h_CL = filters(length).detach()
    modes, error_C = fit_modes(h_CL, 4)
    assert error_C.max() < 1e-6
    close(modes.at(torch.arange(length, dtype=torch.float64)), h_CL, 1e-7)


@pytest.mark.parametrize(
    ("options", "modes", "median", "worst"),
    [
        ({}, 8, 1e-6, 0.05),
        ({"window": "linear", "offset": 0.0, "sine_frequency": 1.0}, 8, 1e-4, 1e-2),
        ({"positive": True, "width": 64, "features": 9}, 16, 1e-3, 0.05),
    ],
)
def test_smooth_filters_are_near(options: dict[str, Any], modes: int, median: float, worst: float) -> None:
    error_C = fit_modes(implicit(**options), modes)[1]
    assert error_C.median() < median
    assert error_C.max() < worst


def test_the_error_is_what_it_says_and_large_for_rough_filters() -> None:
    h_CL = implicit(offset=0.0, sine_frequency=14.0)
    modes, error_C = fit_modes(h_CL, 8)
    found_CL = modes.at(torch.arange(LONG, dtype=torch.float32))
    torch.testing.assert_close((found_CL - h_CL).norm(dim=1) / h_CL.norm(dim=1), error_C.float(), rtol=0, atol=1e-4)
    assert error_C.max() > 0.1


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("modes", [1, 9])
def test_any_length_and_number_of_modes_gives_finite_decaying_modes(length: int, modes: int) -> None:
    for h_CL in (draw(3, length), torch.zeros(3, length)):
        found, error_C = fit_modes(h_CL, modes)
        assert found.log_poles_CS.shape == found.residues_CS.shape == (3, modes)
        assert found.log_poles_CS.isfinite().all() and found.residues_CS.isfinite().all()
        assert (found.log_poles_CS.real < 0).all() and (error_C < 1.0 + 1e-6).all()


@pytest.mark.parametrize("order", [2, 3])
@torch.no_grad()
def test_implicit_filters_decode_from_modes_as_near_as_those_are(order: int) -> None:
    operator = hyena(HyenaConfig(order=order, init="random"), D, LONG)
    operator.initialise(attention(), generator())
    x_BLD = draw(B, 400, D)
    _, state = operator.extend(x_BLD[:, :100], operator.init_state(B, "modal", croppable=False))
    steps = [operator.extend(x_BLD[:, t : t + 1], state)[0] for t in range(100, 300)]
    steps.append(operator.extend(x_BLD[:, 300:], state)[0])
    error_C = state.filters.fitted[1]
    assert error_C.shape == ((order - 1) * D,)
    assert error_C.median() < 1e-6
    assert state.inputs.buffer is None and not hasattr(state, "gated")
    close(torch.cat(steps, dim=1), operator(x_BLD)[:, 100:], 5 * error_C.max().item() + 1e-5)
