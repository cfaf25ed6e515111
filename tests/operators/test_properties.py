"""Properties that hold for every operator whatever the lengths, the masks and what was done to the module before.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.operators.cases import CASES, D, close, draw, empty_like, make

cases = st.sampled_from(sorted(CASES))
lengths = st.integers(1, 48)
few = settings(max_examples=60, deadline=None, derandomize=True)


def outputs(operator: Any, x_BLD: Tensor, how: str, mask_BL: Tensor | None = None) -> Tensor:
    """The outputs of whole sequences with gradients or without, or of a prefill and steps after it."""
    if how == "trained":
        return operator(x_BLD, mask_BL).detach()
    with torch.no_grad():
        if how == "evaluated":
            return operator(x_BLD, mask_BL)
        state, parts, first = operator.init_state(len(x_BLD)), [], max(1, x_BLD.shape[1] // 2)
        for size in (first, *[1] * (x_BLD.shape[1] - first)):
            seen = slice(state.length, state.length + size)
            parts.append(operator.extend(x_BLD[:, seen], state, None if mask_BL is None else mask_BL[:, seen])[0])
        return torch.cat(parts, dim=1)


ways = st.sampled_from(["trained", "evaluated", "decoded"])


@few
@given(case=cases, length=lengths, how=ways, paddings=st.lists(st.integers(0, 20), min_size=2, max_size=4))
def test_rows_of_a_batch_do_not_know_each_other(case: str, length: int, how: str, paddings: list[int]) -> None:
    operator, x_BLD = make(case), draw(len(paddings), length, D)
    mask_BL = torch.arange(length) >= torch.tensor([min(padding, length - 1) for padding in paddings])[:, None]
    together_BLD = outputs(operator, x_BLD, how, mask_BL)
    for row, mask_L in enumerate(mask_BL):
        alone_1LD = outputs(operator, x_BLD[row : row + 1, mask_L], how)
        close(together_BLD[row : row + 1, mask_L], alone_1LD)


@few
@given(case=cases, longest=st.integers(2, 80), start=st.data(), how=ways)
def test_text_that_is_added_changes_no_output_before_it(case: str, longest: int, start: Any, how: str) -> None:
    """Texts are as long as the operator allows; short filters end long before that."""
    operator, before = make(case, longest), start.draw(st.integers(1, longest - 1))
    x_BLD = draw(2, longest, D)
    other_BLD = torch.cat([x_BLD[:, :before], 3 * draw(2, longest - before, D, seed=4)], dim=1)
    whole_BLD = outputs(operator, other_BLD, how)
    close(outputs(operator, x_BLD, how)[:, :before], whole_BLD[:, :before])
    close(outputs(operator, x_BLD[:, :before], how), whole_BLD[:, :before])


KINDS = ("order 3", "heads", "modal, order 2", "modal, heads", "fir, order 2", "power, full")
KINDS += ("window, power", "window, hedgehog, modal", "window alone")
STATES = [(case, mode) for case in KINDS for mode in make(case).step_modes()]
calls = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.sampled_from([1, 1, 1, 2, 5, 17, 40]), st.booleans()),
        st.tuples(st.just("crop"), st.integers(0, 20), st.just(False)),
        st.tuples(st.just("select"), st.sampled_from([[2, 0, 1], [1, 1, 0], [2, 1, 0]]), st.just(False)),
    ),
    min_size=4,
    max_size=10,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(place=st.sampled_from(STATES), calls=calls)
def test_a_state_knows_the_text_whatever_was_called(place: tuple[str, str], calls: list[tuple[str, Any, bool]]) -> None:
    """Chunks and steps with gradients and without, crops by a few positions, and beams: outputs are the text's."""
    (case, mode), calls = place, [("extend", 20, False), *calls]
    operator = make(case, 120)
    state, text_BLD = operator.init_state(3, mode), torch.zeros(3, 0, D)
    near = 2e-2 if mode == "modal" and operator.config.filter.kind == "implicit" else 1e-4  # modes that were fitted
    for number, (name, argument, differentiated) in enumerate(calls):
        length = text_BLD.shape[1]
        if name == "crop":
            state.crop(max(0, length - argument))
            text_BLD = text_BLD[:, : max(0, length - argument)]
        elif name == "select":
            state.select(torch.tensor(argument))
            text_BLD = text_BLD[argument]
        elif length + argument <= 120:
            new_BnD = draw(len(text_BLD), argument, D, seed=number)
            text_BLD = torch.cat([text_BLD, new_BnD], dim=1)
            with torch.set_grad_enabled(differentiated):
                y_BnD, _ = operator.extend(new_BnD, state)
            with torch.no_grad():
                close(y_BnD.detach(), operator(text_BLD)[:, length:], near)
    assert state.length == text_BLD.shape[1]


def _saved(operator: Any) -> Any:
    stream = io.BytesIO()
    torch.save(operator.state_dict(), stream)
    stream.seek(0)
    return _fresh(operator, torch.load(stream))


def _fresh(operator: Any, weights: dict[str, Tensor]) -> Any:
    other = empty_like(operator)
    other.to(next(iter(weights.values())).dtype if weights else torch.float32)
    other.load_state_dict(weights)
    return other.train(operator.training)


def _through_meta(operator: Any) -> Any:
    with torch.device("meta"):
        other = empty_like(operator)
    weights = {name: value.clone() for name, value in operator.state_dict().items()}
    other.to_empty(device="cpu").to(next(iter(weights.values())).dtype if weights else torch.float32)
    other.load_state_dict(weights)
    return other.train(operator.training)


def _trained(operator: Any) -> Any:
    """Moved by an optimizer that moves no version counter."""
    parameters = [p for p in operator.parameters() if p.requires_grad]
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        operator(_inputs(operator, 12, 11)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return operator


@torch.no_grad()
def _nudged(operator: Any) -> Any:
    for parameter in operator.parameters():
        parameter.data.add_(0.01)
    return operator


def _loaded_for_inference(operator: Any) -> Any:
    with torch.inference_mode():
        operator.load_state_dict({name: 0.9 * value for name, value in operator.state_dict().items()})
    return operator


def _inputs(operator: Any, length: int, seed: int) -> Tensor:
    return draw(2, length, D, seed=seed).to(next((p.dtype for p in operator.parameters()), torch.float32))


def _looked_at(operator: Any) -> Any:
    for how in ("evaluated", "decoded"):
        outputs(operator, _inputs(operator, 10, 5), how)
    return operator


def _under_autocast(operator: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for how in ("trained", "evaluated"):
            outputs(operator, _inputs(operator, 10, 6), how)
    return operator


MOVES: dict[str, Callable[[Any], Any]] = {
    "saved and loaded": _saved,
    "copied": copy.deepcopy,
    "pickled": lambda operator: pickle.loads(pickle.dumps(operator)),
    "through the meta device": _through_meta,
    "float64": lambda operator: operator.double(),
    "float32": lambda operator: operator.float(),
    "to the processor": lambda operator: operator.to("cpu"),
    "eval": lambda operator: operator.eval(),
    "train": lambda operator: operator.train(),
    "trained": _trained,
    "nudged": _nudged,
    "loaded for inference": _loaded_for_inference,
    "looked at": _looked_at,
    "under autocast": _under_autocast,
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases, moves=st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=8))
def test_a_module_computes_what_its_weights_say_whatever_was_done_to_it(case: str, moves: list[str]) -> None:
    operator = _looked_at(make(case, 32))
    for move in moves:
        operator = MOVES[move](operator)
    weights = {name: value.clone() for name, value in operator.state_dict().items()}
    fresh = _fresh(operator, weights)
    x_BLD = _inputs(operator, 20, 8)
    for how in ("evaluated", "decoded", "trained"):
        close(outputs(operator, x_BLD, how), outputs(fresh, x_BLD, how), 1e-6)
    if weights:
        close(outputs(operator, x_BLD, "evaluated"), operator.reference(x_BLD).detach(), 1e-4)
