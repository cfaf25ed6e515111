"""What every operator must do, over a table of named configurations; a registered kind without a case fails.

Shapes: B batch, L positions, D model width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators.channels import ChannelHyena
from operators.decoding.state import State
from operators.heads import HeadHyena
from operators.registry import OPERATORS, Operator
from operators.skip import Skip
from operators.window import WindowAttention
from operators.windowed import WindowedHeads
from tests.operators.cases import CASES, MAX, B, D, attention, close, draw, empty_like, generator, make, rows

SWITCHING = [20, *[1] * 10, 10, *[1] * 10, 7, *[1] * 23]  # chunks between steps
every_case = pytest.mark.parametrize("case", rows())


def extended(operator: Any, x_BLD: Tensor, splits: list[int], mask_BL: Tensor | None = None) -> Tensor:
    state, start, outputs = operator.init_state(x_BLD.shape[0]), 0, []
    with torch.no_grad():
        for size in splits:
            part = slice(start, start + size)
            y_BnD, state = operator.extend(x_BLD[:, part], state, None if mask_BL is None else mask_BL[:, part])
            outputs.append(y_BnD)
            start += size
    assert state.length == start == x_BLD.shape[1]
    return torch.cat(outputs, dim=1)


def test_every_registered_kind_has_a_case_and_the_interface() -> None:
    interface: list[type[Operator]] = [
        ChannelHyena,
        HeadHyena,
        WindowedHeads,
        WindowAttention,
        Skip,
    ]  # for the type checker
    assert {kind.__name__ for kind in interface} == {type(make(case)).__name__ for case in CASES}
    assert {config.kind for config in CASES.values()} == set(OPERATORS)


@every_case
@pytest.mark.parametrize("length", [1, 2, 37, MAX])
def test_shape_and_any_length_up_to_the_longest(case: str, length: int) -> None:
    x_BLD = draw(B, length, D)
    operator = make(case)
    close(operator(x_BLD), operator.reference(x_BLD))
    assert operator(x_BLD).shape == (B, length, D)


@every_case
def test_a_short_sequence_is_the_start_of_a_long_one(case: str) -> None:
    operator, x_BLD = make(case), draw(B, MAX, D)
    close(operator(x_BLD[:, :20]), operator(x_BLD)[:, :20])


@every_case
def test_longer_than_built_for_is_an_error(case: str) -> None:
    operator, x_BLD = make(case, max_length=16), draw(B, 17, D)
    with pytest.raises(ValueError, match="max_length 16"):
        operator(x_BLD)
    with pytest.raises(ValueError, match="max_length 16"):
        operator.extend(x_BLD, operator.init_state(B))
    state = operator.extend(x_BLD[:, :16], operator.init_state(B))[1]
    with pytest.raises(ValueError, match="max_length 16"):
        operator.extend(x_BLD[:, :1], state)


@every_case
def test_no_position_is_an_error_and_no_sequence_an_empty_output(case: str) -> None:
    operator = make(case)
    with pytest.raises(ValueError, match="at least one"):
        operator(draw(B, 0, D))
    nothing = torch.zeros(0, 5, D, requires_grad=True)
    y_0LD = operator(nothing)
    assert y_0LD.shape == (0, 5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator(nothing).dtype == operator(draw(1, 5, D)).dtype
    state = operator.init_state(0)
    for steps in (5, 1, 1):
        assert operator.extend(torch.zeros(0, steps, D), state)[0].shape == (0, steps, D)
    assert state.length == 7
    if y_0LD.requires_grad and case != "skip":
        y_0LD.sum().backward()
        assert nothing.grad is not None and nothing.grad.shape == nothing.shape
        assert all(p.grad is not None and not p.grad.any() for p in operator.parameters() if p.requires_grad)


@every_case
def test_no_output_depends_on_later_inputs(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 50, D)
    changed = x_BLD.clone()
    changed[:, 30:] += 10 * draw(B, 20, D, seed=2)
    before, after = operator(x_BLD)[:, :30], operator(changed)
    magnitude = max(1.0, after.abs().max().item())
    assert (before - after[:, :30]).abs().max() <= 1e-5 * magnitude
    if case != "skip":
        assert (operator(x_BLD)[:, 30:] - after[:, 30:]).abs().max() > 1e-3


@every_case
def test_gradients_equal_the_reference(case: str) -> None:
    operator, x_BLD = make(case).double(), draw(2, 70, D).double()
    cotangent, grads = draw(2, 70, D, seed=3).double(), []
    for path in (operator.forward, operator.reference):
        operator.zero_grad()
        inputs = x_BLD.clone().requires_grad_()
        outputs = path(inputs)
        if outputs.requires_grad:
            outputs.backward(cotangent)
        trained = {name: p.grad for name, p in operator.named_parameters() if p.requires_grad}
        grads.append({"x": inputs.grad, "y": outputs.detach(), **trained})
    fast, slow = grads
    for name in slow:
        if slow[name] is None or case == "skip":
            assert fast[name] is None or not fast[name].any(), name
        else:
            close(fast[name], slow[name], 1e-11)


@every_case
def test_sequences_do_not_see_each_other(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 33, D)
    changed = x_BLD.clone()
    changed[1:] = draw(B - 1, 33, D, seed=5)
    close(operator(x_BLD)[:1], operator(changed)[:1], 1e-6)
    close(operator(x_BLD)[:1], operator(x_BLD[:1]), 1e-6)


@every_case
def test_autocast_changes_the_dtype_of_projections_only(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 40, D)
    inputs = x_BLD.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BLD = operator(inputs)
        y_BnD, _ = operator.extend(x_BLD, operator.init_state(B))
    if case == "skip":
        return
    y_BLD.float().sum().backward()
    assert y_BLD.dtype == y_BnD.dtype == torch.bfloat16
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32
    close(y_BLD.float(), operator(x_BLD), 0.05)
    close(y_BLD.float(), y_BnD.float(), 0.02)


@every_case
def test_autocast_leaves_a_float64_model_alone(case: str) -> None:
    operator, x_BLD = make(case).double(), draw(B, 40, D).double()
    plain = [operator(x_BLD), extended(operator, x_BLD, [20, 1, 19])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [operator(x_BLD), extended(operator, x_BLD, [20, 1, 19])]
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@every_case
def test_a_bfloat16_model_computes_its_middle_in_float32(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 40, D)
    expected = operator(x_BLD)
    operator.to(torch.bfloat16)
    y_BLD = operator(x_BLD.bfloat16())
    assert y_BLD.dtype == torch.bfloat16
    close(y_BLD.float(), expected, 0.1)
    close(extended(operator, x_BLD.bfloat16(), [20, 1, 19]).float(), y_BLD.float(), 0.02)


@every_case
def test_results_repeat_bit_for_bit(case: str) -> None:
    results = []
    for _ in range(2):
        operator, inputs = make(case), draw(B, MAX, D).requires_grad_()
        outputs = operator(inputs)
        if outputs.requires_grad:
            outputs.sum().backward()
        results.append([outputs, *(p.grad for p in operator.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_case
def test_state_dict_round_trip(case: str) -> None:
    operator = make(case)
    other = empty_like(operator)
    other.load_state_dict(operator.state_dict(), strict=True)
    x_BLD = draw(B, 21, D)
    assert torch.equal(operator(x_BLD), other(x_BLD))
    assert set(operator.state_dict()) == {name for name, _ in operator.named_parameters()}


@every_case
@pytest.mark.parametrize("splits", [[MAX], [1] * MAX, [70] + [1] * 10, [1, 2, 3, 30, 1, 1, 42], [40, 40], SWITCHING])
def test_extending_in_any_split_equals_forward(case: str, splits: list[int]) -> None:
    operator, x_BLD = make(case), draw(B, MAX, D)
    close(extended(operator, x_BLD, splits), operator(x_BLD))


@every_case
@pytest.mark.parametrize("splits", [[40], [20] + [1] * 20, [1] * 40, [3, 37]])
def test_left_padding_leaves_real_tokens_unchanged(case: str, splits: list[int]) -> None:
    operator, x_BLD = make(case), draw(B, 40, D)
    mask_BL = torch.ones(B, 40, dtype=torch.long)
    for row, padding in enumerate((0, 5, 17)):
        mask_BL[row, :padding] = 0
    for y_BLD in (operator(x_BLD, mask_BL), extended(operator, x_BLD, splits, mask_BL)):
        for row, padding in enumerate((0, 5, 17)):
            close(y_BLD[row, padding:], operator(x_BLD[row : row + 1, padding:])[0])


@every_case
def test_a_mask_may_end_with_the_prompt_or_start_after_it(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 30, D)
    mask_BL = torch.ones(B, 30, dtype=torch.bool)
    mask_BL[1, :9] = False
    for first, second, whole in ((mask_BL[:, :20], None, mask_BL), (None, mask_BL[:, 20:], None)):
        state = operator.init_state(B)
        _, state = operator.extend(x_BLD[:, :20], state, first)
        y_BnD, _ = operator.extend(x_BLD[:, 20:], state, second)
        close(y_BnD, operator(x_BLD, whole)[:, 20:])


@every_case
@torch.no_grad()
def test_state_reorder_select_and_repeat(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 30, D)
    for name, chosen in (("reorder", [2, 0, 0]), ("select", [1]), ("repeat", [0, 0, 1, 1, 2, 2])):
        _, state = operator.extend(x_BLD[:, :20], operator.init_state(B))
        getattr(state, name)(2 if name == "repeat" else torch.tensor(chosen))
        joined = torch.cat([x_BLD[chosen, :20], draw(len(chosen), 10, D, seed=9)], dim=1)
        parts = [operator.extend(joined[:, t : t + 1], state)[0] for t in range(20, 30)]
        close(torch.cat(parts, dim=1), operator(joined)[:, 20:])


@every_case
@pytest.mark.parametrize("kept", [0, 1, 2, 19])
@torch.no_grad()
def test_cropping_forgets_exactly(case: str, kept: int) -> None:
    operator, x_BLD = make(case), draw(B, 40, D)
    _, state = operator.extend(x_BLD[:, :20], operator.init_state(B))
    _, state = operator.extend(x_BLD[:, 20:21], state)
    state.crop(kept)
    joined = torch.cat([x_BLD[:, :kept], draw(B, 12, D, seed=9)], dim=1)
    parts = [operator.extend(joined[:, kept : kept + 6], state)[0]]
    parts += [operator.extend(joined[:, t : t + 1], state)[0] for t in range(kept + 6, kept + 12)]
    close(torch.cat(parts, dim=1), operator(joined)[:, kept:])


@every_case
@torch.no_grad()
def test_a_padded_state_is_cropped_and_its_rows_chosen_exactly(case: str) -> None:
    """Of one row nothing but padding is left, of another its last two tokens."""
    operator, x_BLD, rows = make(case), draw(B, 20, D), [2, 0, 1, 1]
    mask_BL = torch.arange(20) >= torch.tensor([0, 4, 9])[:, None]
    _, state = operator.extend(x_BLD, operator.init_state(B), mask_BL)
    state.crop(6)
    state.select(torch.tensor(rows))
    new_BnD = draw(len(rows), 12, D, seed=9)
    parts = [operator.extend(new_BnD[:, :5], state)[0]]
    parts += [operator.extend(new_BnD[:, t : t + 1], state)[0] for t in range(5, 12)]
    for row, (of, y_nD) in enumerate(zip(rows, torch.cat(parts, dim=1), strict=True)):
        text_TD = torch.cat([x_BLD[of, :6][mask_BL[of, :6]], new_BnD[row]])
        close(y_nD, operator(text_TD[None])[0, -12:])


@every_case
def test_misused_states_are_errors(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 4, D)
    state: State = operator.extend(x_BLD, operator.init_state(B))[1]
    misuses: list[tuple[Callable[[], Any], str]] = [
        (lambda: state.crop(5), "length"),
        (lambda: state.crop(-1), "length"),
        (lambda: state.repeat(0), "n must"),
        (lambda: state.reorder(torch.tensor([0])), "use select"),
        (lambda: operator.extend(x_BLD[:1], state), "holds 3 sequences"),
        (lambda: operator.extend(x_BLD[:, :0], state), "at least one"),
    ]
    for call, message in misuses:
        with pytest.raises(ValueError, match=message):
            call()


@every_case
def test_a_prefill_is_differentiable(case: str) -> None:
    operator, x_BLD = make(case), draw(B, 20, D)
    y_BLD, _ = operator.extend(x_BLD, operator.init_state(B))
    assert not y_BLD.requires_grad if case == "skip" else y_BLD.requires_grad
    assert torch.equal(y_BLD, operator(x_BLD))


@every_case
@pytest.mark.parametrize("new", [1, 7])
def test_positions_after_a_state_are_differentiable(case: str, new: int) -> None:
    operator, x_BLD = make(case).double(), draw(B, 30, D).double()
    grads = []
    for stepwise in (True, False):
        inputs = x_BLD[:, 20 : 20 + new].clone().requires_grad_()
        with torch.no_grad():
            _, state = operator.extend(x_BLD[:, :20], operator.init_state(B))
        if stepwise:
            y_BnD, _ = operator.extend(inputs, state)
            with torch.no_grad():
                operator.extend(x_BLD[:, 29:], state)
        else:
            y_BnD = operator.reference(torch.cat([x_BLD[:, :20], inputs], dim=1))[:, 20:]
        grads.append(torch.autograd.grad(y_BnD.square().sum(), inputs)[0] if y_BnD.requires_grad else None)
    if case != "skip":
        close(*grads, 1e-10)


@every_case
def test_initialise_sets_everything_from_its_generator(case: str) -> None:
    operator = make(case)
    operators: list[Any] = [operator, empty_like(operator)]
    for parameter in operators[1].parameters():
        nn.init.constant_(parameter, 7.0)
    before = torch.get_rng_state()
    operators[1].initialise(attention(inner=operator.inner), generator())
    assert torch.equal(before, torch.get_rng_state())
    first, second = (operator.state_dict() for operator in operators)
    assert all(torch.equal(first[name], second[name]) for name in first)
