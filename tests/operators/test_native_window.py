"""Operators with a window by the compiled core: whole sequences, and that steps are the core's.

That steps agree with torch's is part of the contract (`test_native`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from operators import native
from operators.config import FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig, WindowConfig
from operators.registry import build
from tests.operators import test_contract
from tests.operators.cases import B, D, close, draw, generator, make

DIVIDED: dict[str, Any] = {
    "feature_map": "power", "normalise": True, "filter": ImplicitFilterConfig(positive=True, width=16, features=9)
}  # fmt: skip
MODAL: dict[str, Any] = {"filter": ModalFilterConfig(modes=3, positive=True)}
WINDOWS: dict[str, HyenaConfig | WindowConfig] = {
    "rows of its own": HyenaConfig(heads=2, key_dim=6, key_gate=True, window=70, sinks=3, **DIVIDED),
    "tied": HyenaConfig(heads=2, window=16, sinks=5, tied=True, degree=8, **DIVIDED),
    "few taps": HyenaConfig(
        heads=2, window=16, tied=True, **{**DIVIDED, "filter": FirFilterConfig(taps=40, positive=True)}
    ),
    "one position": HyenaConfig(heads=2, window=1, tied=True, **DIVIDED),
    "all sinks": HyenaConfig(heads=2, window=9, sinks=500, tied=True, **DIVIDED),
    "groups": HyenaConfig(heads=4, key_dim=6, key_gate=True, window=70, sinks=3, groups=2, **DIVIDED),
    "tied, groups": HyenaConfig(heads=4, window=16, sinks=5, tied=True, groups=1, degree=8, **DIVIDED),
    "squares": HyenaConfig(heads=2, degree=2, key_dim=6, key_gate=True, window=16, sinks=3, **{**DIVIDED, **MODAL}),
    "squares, wide window": HyenaConfig(heads=4, degree=2, key_dim=8, window=100, groups=2, **{**DIVIDED, **MODAL}),
    "squares, many sinks": HyenaConfig(heads=2, degree=2, key_dim=16, window=3, sinks=150, **{**DIVIDED, **MODAL}),
    "alone": WindowConfig(window=100, sinks=2, heads=2),
    "alone, no sinks": WindowConfig(window=3, sinks=0, heads=4),
    "alone, groups": WindowConfig(window=3, sinks=2, heads=4, groups=2),
}


@torch.no_grad()
def made(name: str, longest: int) -> Any:
    """A random operator of width 32 whose weights of positions differ."""
    operator: Any = build(replace(WINDOWS[name], init="random"), 32, longest)
    operator.initialise(None, generator())
    operator.in_proj.weight.mul_(3.0)
    return operator


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("length", [1, 64, 75, 601])
@torch.no_grad()
def test_whole_sequences_with_a_window_agree_with_the_definition(
    name: str, length: int, core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass under autocast: nearer than torch's products, which are rounded before they are weighed."""
    operator = made(name, 601)
    x_BLD, calls = draw(2, length, 32), []
    mix = torch.ops.layerswap.window_mix
    monkeypatch.setattr(torch.ops.layerswap, "window_mix", lambda *given: calls.append(1) or mix(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, state = operator(x_BLD), operator.init_state(2)
        again = operator.extend(x_BLD, state)[0]
    assert len(calls) == 2 and torch.equal(found, again)
    wanted = operator.reference(x_BLD)
    close(found.float(), wanted, 0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native.use(False)
        theirs = operator(x_BLD)
    assert (found - wanted).norm() <= 1.1 * (theirs - wanted).norm()


@torch.no_grad()
def test_the_core_leaves_the_smallest_numbers_of_its_thread_as_they_were(core: None) -> None:
    made("tied", 64)(draw(2, 64, 32))
    assert float(torch.tensor(1e-40) * 0.5) > 0.0


@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("window, tied", "heads_window_step"),
        ("window alone", "window_step"),
        ("window, groups", "heads_window_step"),
        ("window alone, groups", "window_step"),
        ("window, squares", "window_modal_step"),
    ],
)
@torch.no_grad()
def test_steps_with_a_window_are_the_cores(case: str, step: str, core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the contract held for torch's; and those of padded texts are torch's."""
    operator, x_BLD, calls = make(case), draw(B, 12, D), []
    core_step = getattr(torch.ops.layerswap, step)
    monkeypatch.setattr(torch.ops.layerswap, step, lambda *a, **k: calls.append(1) or core_step(*a, **k))
    test_contract.extended(operator, x_BLD, [8, 1, 1, 1, 1])
    assert len(calls) == 4
    state = operator.init_state(B)
    operator.extend(x_BLD[:, :8], state, torch.arange(8).expand(B, 8) > 2)
    operator.extend(x_BLD[:, 8:9], state)
    assert len(calls) == 4


STEPS = {"squares": "window_modal_step", "alone": "window_step", "tied": "heads_window_step"}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("length", [64, 75, 601])
@torch.no_grad()
def test_whole_sequences_in_float32_are_those_of_the_definition(
    name: str, length: int, core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = made(name, 640)
    calls, mix = [], torch.ops.layerswap.window_mix
    monkeypatch.setattr(torch.ops.layerswap, "window_mix", lambda *given: calls.append(1) or mix(*given))
    x_BLD, state = draw(2, length + 9, 32), operator.init_state(2)
    found = operator(x_BLD[:, :length])
    parts = [operator.extend(x_BLD[:, cut], state)[0] for cut in (slice(length), slice(length, None))]
    assert len(calls) == 2 and torch.equal(found, parts[0])
    close(torch.cat(parts, dim=1), operator.reference(x_BLD), 1e-4)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("length", [1, 17, 64, 601])
@torch.no_grad()
def test_steps_go_on_from_the_state_of_a_whole_prompt(
    name: str, length: int, core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in bfloat16, by blocks; what their state gives to later queries is that of the definition. The core's
    steps follow, as its states are in float32, and torch's chunks."""
    operator = made(name, 640)
    step = STEPS.get(name.split(",")[0], "heads_window_step")
    calls, real = [], getattr(torch.ops.layerswap, step)
    monkeypatch.setattr(torch.ops.layerswap, step, lambda *a, **k: calls.append(1) or real(*a, **k))
    x_BLD, state = draw(2, length + 34, 32), operator.init_state(2)
    cuts = [slice(t, t + 1) for t in range(length, length + 30)] + [slice(length + 30, length + 34)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator.extend(x_BLD[:, :length], state)
        found = torch.cat([operator.extend(x_BLD[:, cut], state)[0] for cut in cuts], dim=1)
    assert len(calls) == (28 if length == 1 and operator.config.short_taps == 3 else 30)  # taps want two more before
    close(found.float(), operator.reference(x_BLD)[:, length:], 0.03)
    if step != "window_modal_step":
        return
    memory, exact = state.memory[7], operator.init_state(2)
    native.use(False)
    operator.extend(x_BLD, exact)
    assert (memory - exact.memory[7]).norm() <= 0.01 * exact.memory[7].norm()
