"""Decoding in every mode that an operator has: exact, of a constant size where that is said, and croppable.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import FilterConfig, FirFilterConfig, HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from operators.decoding.ahead import Ahead
from operators.decoding.frozen import Derived, Filters
from operators.decoding.history import History
from operators.decoding.recurrence import PIECE
from operators.decoding.state import State
from tests.operators.cases import B, D, attention, close, draw, generator, hyena

LONG = 620
# By filter, the exact modes; the first is the usual one.
FILTERS: dict[str, tuple[FilterConfig, tuple[str, ...]]] = {
    "implicit": (ImplicitFilterConfig(), ("tiled", "direct")),
    "modal": (ModalFilterConfig(modes=5), ("modal", "tiled", "direct")),
    "modal, real": (ModalFilterConfig(positive=True), ("modal", "tiled", "direct")),
    "fir": (FirFilterConfig(taps=40), ("window", "tiled", "direct")),
    "fir, one tap": (FirFilterConfig(taps=1), ("window", "tiled", "direct")),
    "fir, many taps": (FirFilterConfig(taps=100), ("tiled", "direct")),
}
MODES = [(name, mode) for name, (_, modes) in FILTERS.items() for mode in modes]
CONSTANT = [(name, mode) for name, mode in MODES if mode in ("modal", "window")]
every_mode = pytest.mark.parametrize(("name", "mode"), MODES)
every_constant_mode = pytest.mark.parametrize(("name", "mode"), CONSTANT)


def operator_of(name: str, order: int = 3, max_length: int = LONG) -> Any:
    operator = hyena(HyenaConfig(order=order, init="random", filter=FILTERS[name][0]), D, max_length)
    operator.initialise(attention(), generator())
    return operator


def size_of(state: State) -> int:
    """Bytes of everything remembered."""
    found, seen = [], [vars(state)]
    while seen:
        part = seen.pop()
        if isinstance(part, Tensor):
            found.append(part)
        elif not isinstance(part, Derived):
            parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
            seen += [*parts, *([vars(part)] if isinstance(part, History | Ahead) else [])]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


@every_mode
@pytest.mark.parametrize(
    ("prompt", "croppable"),
    [
        (1, True),
        (PIECE, False),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in [(1, False), (PIECE, True)]),
        *(pytest.param(prompt, kept, marks=pytest.mark.slow) for prompt in (3, 300) for kept in (True, False)),
    ],
)
@torch.no_grad()
def test_hundreds_of_steps_are_exact(name: str, mode: str, prompt: int, croppable: bool) -> None:
    operator, x_BLD = operator_of(name).double(), draw(B, LONG, D).double()
    _, state = operator.extend(x_BLD[:, :prompt], operator.init_state(B, mode, croppable=croppable))
    steps = [operator.extend(x_BLD[:, t : t + 1], state)[0] for t in range(prompt, LONG)]
    close(torch.cat(steps, dim=1), operator(x_BLD)[:, prompt:], 1e-12)


@every_mode
@torch.no_grad()
def test_masks_chunks_and_crops_between_steps_are_exact(name: str, mode: str) -> None:
    operator, x_BLD = operator_of(name).double(), draw(B, 400, D).double()
    mask_BL = torch.ones(B, 400, dtype=torch.bool)
    mask_BL[1, :30] = mask_BL[2, :1] = False
    expected, state, t = operator(x_BLD, mask_BL), operator.init_state(B, mode), 0
    for size in [20, 1, 1, PIECE + 7, 1, 1, 1, 50, -1, 1, 3, -5, -20, 2, 1, -30, 1, -100, 1, 1, 40, -103, 1, 1]:
        if size < 0:
            t += size
            state.crop(t)
            continue
        y_BnD, _ = operator.extend(x_BLD[:, t : t + size], state, mask_BL[:, t : t + size])
        t += size
        close(
            (y_BnD * mask_BL[:, t - size : t, None]), expected[:, t - size : t] * mask_BL[:, t - size : t, None], 1e-12
        )
    assert t == state.length > 0


@every_constant_mode
@torch.no_grad()
def test_a_constant_state_does_not_grow(name: str, mode: str) -> None:
    operator, x_BLD = operator_of(name), draw(B, LONG, D)
    _, state = operator.extend(x_BLD[:, :60], operator.init_state(B, croppable=False))
    assert state.mode == mode
    before = size_of(state)
    for t in range(60, 300):
        operator.extend(x_BLD[:, t : t + 1], state)
    operator.extend(x_BLD[:, 300:500], state)
    assert size_of(state) == before
    assert state.inputs.buffer is None and not hasattr(state, "gated")
    direct = operator.extend(x_BLD[:, :500], operator.init_state(B, "direct"))[1]
    assert size_of(direct) > before


@pytest.mark.parametrize(("name", "mode"), [("implicit", "tiled"), ("modal", "modal"), ("fir", "window")])
@torch.no_grad()
def test_a_state_without_inputs_is_cropped_to_nothing_or_not_at_all(name: str, mode: str) -> None:
    operator, x_BLD = operator_of(name), draw(B, 60, D)
    _, state = operator.extend(x_BLD[:, :30], operator.init_state(B, croppable=False))
    with pytest.raises(ValueError, match=r"length must be 0 or the 30 positions seen but is 29: .* croppable=True"):
        state.crop(29)
    state.crop(30)
    close(operator.extend(x_BLD[:, 30:31], state)[0], operator(x_BLD)[:, 30:31])
    state.crop(0)
    close(operator.extend(x_BLD[:, 30:], state)[0], operator(x_BLD[:, 30:]))


@torch.no_grad()
def test_heads_keep_no_inputs_either_where_nobody_crops() -> None:
    operator = hyena(HyenaConfig(heads=2, key_gate=True, init="random"), D, 60)
    operator.initialise(attention(), generator())
    x_BLD, mask_BL = draw(B, 60, D), torch.ones(B, 60, dtype=torch.bool)
    mask_BL[1, :7] = False
    state, outputs = operator.init_state(B, croppable=False), []
    for part in (slice(0, 20), slice(20, 21), slice(21, 50), slice(50, 51), slice(51, 60)):
        outputs.append(operator.extend(x_BLD[:, part], state, mask_BL[:, part] if part.start < 50 else None)[0])
    close(torch.cat(outputs, dim=1)[:, 7:], operator(x_BLD, mask_BL)[:, 7:])
    assert state.inputs.buffer is None and state.mask is None


@every_constant_mode
@torch.no_grad()
def test_a_short_crop_computes_little_again(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in speculative decoding: a few positions on, most of them back."""
    operator, x_BLD = operator_of(name), draw(B, 500, D)
    _, state = operator.extend(x_BLD[:, :300], operator.init_state(B))
    extend, seen = operator.extend, []
    monkeypatch.setattr(operator, "extend", lambda x, *rest: (seen.append(x.shape[1]), extend(x, *rest))[1])
    for t in range(300, 400, 2):
        y_BnD, _ = operator.extend(x_BLD[:, t : t + 8], state)
        close(y_BnD, operator(x_BLD)[:, t : t + 8])
        state.crop(t + 2)
    assert max(seen) == 8


@every_mode
@torch.no_grad()
def test_batch_operations_carry_what_is_remembered_and_the_marks(name: str, mode: str) -> None:
    operator, x_BLD = operator_of(name), draw(B, 60, D)
    _, state = operator.extend(x_BLD[:, :20], operator.init_state(B, mode))
    operator.extend(x_BLD[:, 20:30], state)
    state.reorder(torch.tensor([2, 0, 0]))
    state.repeat(2)
    state.crop(24)
    state.select(torch.tensor([0, 3, 4]))
    joined = torch.cat([x_BLD[[2, 0, 0], :24], draw(3, 10, D, seed=9)], dim=1)
    parts = [operator.extend(joined[:, t : t + 1], state)[0] for t in range(24, 34)]
    close(torch.cat(parts, dim=1), operator(joined)[:, 24:])


@pytest.mark.parametrize("name", FILTERS)
def test_a_mode_that_the_filter_does_not_have_is_an_error(name: str) -> None:
    config, modes = FILTERS[name]
    operator = operator_of(name)
    assert operator.init_state(B).mode == modes[0]
    for mode in {"tiled", "direct", "modal", "window", "exact"} - set(operator.step_modes()):
        with pytest.raises(ValueError, match=rf"mode must be one of .* with {config.kind} filters but is '{mode}'"):
            operator.init_state(B, mode)
    heads = hyena(HyenaConfig(heads=2, init="random", filter=config), D, LONG)
    with pytest.raises(ValueError, match=rf"mode must be one of .*direct with {config.kind} filters and heads but"):
        heads.init_state(B, "tiled")


@pytest.mark.parametrize("length", [1, 3, 70])
@pytest.mark.parametrize("taps", [1, 5, 16, 17, 64])
def test_the_short_path_is_the_long_one(taps: int, length: int) -> None:
    h_CL = torch.nn.functional.pad(draw(D, taps), (0, 100 - taps)).double()
    z_BDL, few, every = draw(B, D, length, seed=2).double(), slice(2, 5), slice(0, D)
    for part in (few, every):
        long, short = (Filters(lambda n: h_CL[:, :n], 100, taps=k).convolution(length) for k in (None, taps))
        close(short(z_BDL[:, part], part), long(z_BDL[:, part], part), 1e-13)
