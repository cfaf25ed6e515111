"""Modal and short filters: how they start, what they can follow, what longer operators make of them.

Shapes: C filters, L lags.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import FilterConfig, FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from operators.decoding.recurrence import PIECE
from operators.filters.modal import ModalFilter
from tests.operators.cases import MAX, PROFILE, B, D, attention, close, draw, generator, hyena

MODAL, REAL, FIR = ModalFilterConfig(modes=6), ModalFilterConfig(modes=6, positive=True), FirFilterConfig(taps=12)
LONG = 500


def modal(config: ModalFilterConfig, filters: int = 5, max_length: int = LONG) -> ModalFilter:
    made = ModalFilter(config, filters, max_length)
    made.initialise(generator())
    return made


def started(config: FilterConfig, **options: Any) -> Any:
    operator = hyena(HyenaConfig(filter=config, **options), D, MAX)
    operator.initialise(attention(), generator())
    return operator


@pytest.mark.parametrize("config", [MODAL, REAL, FIR, FirFilterConfig(taps=12, positive=True)])
@pytest.mark.parametrize("options", [{}, {"order": 3}, {"heads": 1, "init": "random"}])
def test_filters_start_with_sum_one_from_sharp_to_wide(config: FilterConfig, options: dict[str, Any]) -> None:
    h_CL = started(config, **options).filter(MAX).detach()
    assert ((h_CL.sum(1) > 0.6) & (h_CL.sum(1) < 1.4)).all()
    if "heads" not in options:
        assert h_CL[0, 0] > 2 * h_CL[D - 1, 0]
    if config.positive:
        assert (h_CL >= 0).all()


@pytest.mark.parametrize("config", [MODAL, REAL])
def test_whatever_is_trained_every_mode_decays(config: ModalFilterConfig) -> None:
    filters = modal(config)
    for parameter in filters.parameters():
        torch.nn.init.normal_(parameter, std=5.0, generator=generator(1))
    assert (filters.modes().log_poles_CS.real < 0).all()
    assert filters(LONG).isfinite().all()
    if config.positive:
        assert (filters(LONG) >= 0).all()


@pytest.mark.parametrize("config", [MODAL, REAL])
def test_modes_are_the_recurrence_of_the_filter(config: ModalFilterConfig) -> None:
    filters = modal(config).double()
    poles_CS, residues_CS = filters.modes().log_poles_CS.exp(), filters.modes().residues_CS
    values, state_CS = [], residues_CS
    for _ in range(40):
        values.append(state_CS.sum(1).real)
        state_CS = state_CS * poles_CS
    close(torch.stack(values, dim=1), filters(40), 1e-13)


@pytest.mark.parametrize("length", [1, PIECE, PIECE + 1, LONG])
@pytest.mark.parametrize("config", [MODAL, REAL])
def test_the_filter_is_the_sum_of_its_modes_at_every_lag(config: ModalFilterConfig, length: int) -> None:
    filters = modal(config).double()
    close(filters(length), filters.modes().at(torch.arange(length, dtype=torch.float64)), 1e-13)


def mixture(*modes: tuple[float, float]) -> Tensor:
    """Logarithms (1, L) of a sum of exponentials, by weight and decay time."""
    lags_L = torch.arange(LONG, dtype=torch.float64)
    return sum(weight * torch.exp(-lags_L / tau) for weight, tau in modes).log()[None]  # type: ignore[union-attr]


def test_a_positive_modal_filter_follows_a_profile_that_is_such_a_mixture() -> None:
    filters = modal(REAL, filters=2)
    times_S = (-filters.log_rate[0]).exp().tolist()
    profile_CT = torch.cat([mixture((1.0, times_S[1]), (0.02, times_S[4])), mixture((1.0, times_S[2]))])
    filters.follow(profile_CT)
    close(filters(LONG), profile_CT.softmax(1).float(), 2e-3)


@pytest.mark.parametrize(("power", "error"), [(0.5, 0.05), (1.0, 0.05), (2.0, 0.1)])
def test_a_positive_modal_filter_is_near_a_profile_that_falls_as_a_power(power: float, error: float) -> None:
    filters = modal(ModalFilterConfig(modes=8, positive=True), filters=1)
    profile_1T = -power * torch.arange(1.0, LONG + 1).log()[None]
    filters.follow(profile_1T)
    assert (filters(LONG) - profile_1T.softmax(1)).abs().sum() < error


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_positive_filters_of_heads_start_at_the_attentions_profile(heads: int) -> None:
    rows = {1: PROFILE.mean(0, keepdim=True), 2: PROFILE, 4: PROFILE.repeat_interleave(2, dim=0)}[heads]
    h_HL = started(FirFilterConfig(taps=30, positive=True), heads=heads).filter(MAX).detach()
    assert not h_HL[:, 30:].any()
    torch.testing.assert_close(h_HL[:, :26], rows[:, :26].softmax(1) * (h_HL[:, :1] / rows[:, :26].softmax(1)[:, :1]))
    far_L = started(REAL, heads=heads).filter(MAX)[-1]
    close(far_L.sum(), torch.tensor(1.0), 0.05)
    assert (far_L[1:] < far_L[:-1]).all()


@pytest.mark.parametrize("config", [MODAL, REAL, FIR])
def test_an_operator_built_for_more_takes_the_parameters_and_goes_on(config: FilterConfig) -> None:
    short, long = started(config, order=3), hyena(HyenaConfig(order=3, filter=config), D, 2 * MAX)
    long.load_state_dict(short.state_dict())
    x_BLD = draw(B, 2 * MAX, D)
    close(long(x_BLD)[:, :MAX], short(x_BLD[:, :MAX]))
    close(long(x_BLD), long.reference(x_BLD))
    with pytest.raises(ValueError, match=f"length must not exceed max_length {MAX} .*: build the operator with a"):
        short.filter(MAX + 1)


def test_more_taps_than_positions_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"taps must not exceed max_length 80 but is 81: lower it, or build"):
        hyena(HyenaConfig(filter=FirFilterConfig(taps=81)), D, MAX)
    hyena(HyenaConfig(filter=FirFilterConfig(taps=80)), D, MAX)


def test_only_positive_filters_ask_for_the_attentions_profile() -> None:
    kinds: list[FilterConfig] = [ImplicitFilterConfig(), MODAL, FIR]
    assert not any(HyenaConfig(heads=2, filter=config).needs_statistics for config in kinds)


ROUGH = ImplicitFilterConfig(offset=0.0, sine_frequency=14.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [ROUGH, ImplicitFilterConfig(positive=True), MODAL, FIR])
def test_a_model_in_half_precision_keeps_its_filters(config: FilterConfig, dtype: torch.dtype) -> None:
    operator = started(config, heads=2, init="random")
    wanted = operator.filter(MAX).detach()
    assert operator.to(dtype).in_proj.weight.dtype == dtype
    assert torch.equal(operator.filter(MAX), wanted)
    assert operator.double().filter(MAX).dtype == torch.float64
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does where it loads a model in half precision
    try:
        other = hyena(HyenaConfig(filter=config, heads=2, init="random"), D, MAX)
    finally:
        torch.set_default_dtype(before)
    halves = {name: value.to(dtype) for name, value in operator.state_dict().items()}  # an export in half precision
    other.load_state_dict(halves)
    assert other.out_proj.weight.dtype == dtype
    assert {parameter.dtype for parameter in other.filter.parameters()} == {torch.float32}
    assert other(draw(B, MAX, D).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "options", [{"feature_map": "power", "key_dim": 8, "key_gate": True}, {"feature_map": "hedgehog"}]
)
@pytest.mark.parametrize("length", [256, 512])
def test_timescales_of_normalised_heads_learn_under_bfloat16(options: dict[str, Any], length: int) -> None:
    """The scale of a filter is of no effect there; its gradient, were it computed, would be all rounding."""
    width, found = 64, []
    config = HyenaConfig(
        heads=2, normalise=True, filter=ImplicitFilterConfig(positive=True, width=64, features=9), **options
    )
    for narrow in (False, True):
        operator = hyena(config, width, length)
        operator.initialise(attention(width), generator())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y_BLD = operator(draw(4, length, width))
        y_BLD.backward(draw(*y_BLD.shape, seed=3).to(y_BLD.dtype))
        found.append(operator.filter.log_timescale.grad)
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()
