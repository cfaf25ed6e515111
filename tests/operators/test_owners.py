"""What is derived from weights has an owner, dies with it and is never stale; training reads none of it.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators.channels import ChannelHyena
from operators.config import HyenaConfig
from operators.decoding.frozen import Filters
from operators.decoding.kept import frozen_filters
from operators.heads import HeadHyena
from operators.registry import build
from operators.window import WindowAttention
from operators.windowed import WindowedHeads
from tests.operators.cases import CASES, MAX, B, D, attention, close, draw, empty_like, generator, make

KINDS = ("order 3", "heads", "modal, order 2", "modal, heads", "fir, order 2", "power, full")
KINDS += ("window, power", "window, hedgehog, modal", "window alone")
LONG = 300


def train_by(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any, Tensor, bool], None]:
    def train(operator: Any, x_BLD: Tensor, narrow: bool) -> None:
        if not hasattr(operator, "optimizer"):
            operator.optimizer = make_optimizer([p for p in operator.parameters() if p.requires_grad])

        def loss() -> Tensor:
            operator.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                value: Tensor = operator(x_BLD).float().square().mean()
            value.backward()
            return value

        operator.optimizer.step(loss)

    return train


def add_to_data(operator: nn.Module) -> None:
    for parameter in operator.parameters():
        parameter.data.add_(0.05)


def load(operator: nn.Module, assign: bool = False) -> None:
    operator.load_state_dict({name: 1.05 * value for name, value in operator.state_dict().items()}, assign=assign)


def load_in_inference_mode(operator: Any) -> None:
    with torch.inference_mode():
        load(
            operator, assign=not next(operator.parameters()).is_inference()
        )  # the first makes weights without versions


OPTIMIZERS = {
    kind.__name__: kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
}
ELSEWHERE = {"Optimizer", "SparseAdam", "Muon"}  # an interface, sparse gradients, matrices only
CHANGES: dict[str, Callable[[Any, Tensor, bool], None]] = {
    **{name: train_by(lambda p, k=kind: k(p, lr=0.05)) for name, kind in OPTIMIZERS.items() if name not in ELSEWHERE},
    **{
        f"{name}, fused": train_by(lambda p, k=OPTIMIZERS[name]: k(p, lr=0.05, fused=True))
        for name in ("Adam", "AdamW", "SGD", "Adagrad")
    },
    "Muon": train_by(lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], lr=0.05)),
    "data": lambda operator, *_: add_to_data(operator),
    "load": lambda operator, *_: load(operator),
    "load, assigned": lambda operator, *_: load(operator, assign=True),
    "load in inference mode": lambda operator, *_: load_in_inference_mode(operator),
    "initialise": lambda operator, *_: operator.initialise(attention(inner=operator.inner), generator(5)),
}


def decoded(operator: Any, x_BLD: Tensor, steps: int = 4) -> Tensor:
    state = operator.init_state(len(x_BLD))
    parts = x_BLD.split([x_BLD.shape[1] - steps, *[1] * steps], dim=1)
    return torch.cat([operator.extend(part, state)[0] for part in parts], dim=1)


# Optimizers write alike: every one of them into one operator, some into the others.
ALIKE = OPTIMIZERS.keys() - {"AdamW", "SGD", "LBFGS"}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("change", "case"),
    [
        pytest.param(change, case, marks=[pytest.mark.slow] if change in ALIKE and case != "order 2" else [])
        for change in CHANGES
        for case in ("order 2", "modal, heads", "power, full")
    ],
)
def test_outputs_are_those_of_a_fresh_copy_of_the_weights(narrow: bool, change: str, case: str) -> None:
    """Whatever changes weights, with evaluation and decoding between the changes, in float32 and under autocast."""
    operator, x_BLD, seen = make(case), draw(B, 24, D), []
    for _ in range(3):
        operator.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            seen.append(operator(x_BLD))
            decoded(operator, x_BLD)
        CHANGES[change](operator.train(), x_BLD, narrow)
    fresh = empty_like(operator)
    fresh.load_state_dict(operator.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        found = operator.eval()(x_BLD)
        assert not torch.equal(found, seen[0])
        for ours, theirs in ((found, fresh(x_BLD)), (decoded(operator, x_BLD), decoded(fresh, x_BLD))):
            close(ours.float(), theirs.float(), 1e-6)  # weights of inference mode round otherwise


def counted(operator: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every length that filters are computed for."""
    computed: list[int] = []
    forward = type(operator.filter).forward
    monkeypatch.setattr(
        type(operator.filter), "forward", lambda self, length: (computed.append(length), forward(self, length))[1]
    )
    return computed


ENDS: dict[str, Callable[[Any], Any]] = {
    "train": lambda operator: operator.train(),
    "load": lambda operator: operator.load_state_dict(operator.state_dict()),
    "cast": lambda operator: operator.float(),
}


@pytest.mark.parametrize("end", ENDS)
def test_frozen_filters_are_computed_once_until_weights_change(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, x_BLD = make("order 2"), draw(B, 40, D)
    model, computed = nn.ModuleList([operator]), counted(operator, monkeypatch)
    with torch.no_grad():
        with frozen_filters(model):
            for _ in range(3):
                operator(x_BLD)
            assert computed == [40]
            model.eval()
            operator(x_BLD[:, :20])
            assert computed == [40]
            copied = copy.deepcopy(operator)
            with frozen_filters(model):  # of no effect inside
                operator(x_BLD)
            ENDS[end](model)
            operator(x_BLD), operator(x_BLD)
            assert computed == [40] * 3
            add_to_data(copied)
            fresh = build(CASES["order 2"], D, MAX)
            fresh.load_state_dict(copied.state_dict())
            assert torch.equal(copied(x_BLD), fresh(x_BLD))
        del computed[:]
        operator(x_BLD), operator(x_BLD)
        assert computed == [40, 40]


@pytest.mark.parametrize("case", ["order 2", "heads", "window, tied"])
def test_weights_are_cast_once_inside_of_frozen_filters(case: str) -> None:
    """To the bits that they are cast to outside, for prompts and for steps, until a call changes them; never for
    gradients."""
    operator, x_BLD = make(case), draw(B, 40, D)

    def prompt_and_steps() -> Tensor:
        state = operator.init_state(B)
        parts = [
            operator.extend(x_BLD[:, cut], state)[0]
            for cut in (slice(0, 30), *map(slice, range(30, 40), range(31, 41)))
        ]
        return torch.cat([operator(x_BLD), *parts], dim=1)

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        wanted = prompt_and_steps()
        with frozen_filters(operator):
            assert torch.equal(prompt_and_steps(), wanted)
            operator.in_proj.weight.data += 1.0
            operator.out_proj.bias.data += 1.0
            assert torch.equal(prompt_and_steps(), wanted)
            with torch.enable_grad():
                assert not torch.equal(operator(x_BLD), wanted[:, :40])
            operator.train()
            assert not torch.equal(operator(x_BLD), wanted[:, :40])
        moved = prompt_and_steps()
    fresh = build(CASES[case], D, MAX)
    fresh.load_state_dict(operator.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moved[:, :40], fresh(x_BLD))


def test_training_inside_of_frozen_filters_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, x_BLD = make("order 2"), draw(B, 40, D)
    with frozen_filters(operator):
        add_to_data(operator)
        y_BLD = operator(x_BLD)
    fresh = build(CASES["order 2"], D, MAX)
    fresh.load_state_dict(operator.state_dict())
    assert torch.equal(y_BLD, fresh(x_BLD))


@pytest.mark.parametrize("case", KINDS)
def test_a_state_computes_filters_once_and_no_more_lags_than_twice_its_positions(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, x_BLD = make(case, LONG), draw(B, 61, D)
    computed = counted(operator, monkeypatch)
    with torch.no_grad():
        decoded(operator, x_BLD, 10)
    assert len(computed) <= 3
    assert all(length <= 2 * (51 + 64) for length in computed)


MODES = [(case, mode) for case in KINDS for mode in make(case).step_modes()]
every_mode = pytest.mark.parametrize(("case", "mode"), MODES)


def test_every_kind_of_state_has_a_case() -> None:
    found = {type(make(case).init_state(1, mode)) for case, mode in MODES}
    owners = (ChannelHyena, HeadHyena, WindowedHeads, WindowAttention)
    assert found == {kind for owner in owners for kind in owner.STATES.values()}


@every_mode
@pytest.mark.parametrize("new", [1, 7])
def test_later_positions_have_gradients_of_all_parameters(case: str, mode: str, new: int) -> None:
    operator, x_BLD, mask_BL = make(case).double(), draw(B, 30, D).double(), torch.ones(B, 30, dtype=torch.bool)
    mask_BL[1, :5] = False
    with torch.no_grad():
        _, state = operator.extend(x_BLD[:, :20], operator.init_state(B, mode), mask_BL[:, :20])
    y_BnD, _ = operator.extend(x_BLD[:, 20 : 20 + new], state)
    y_BLD = operator(x_BLD[:, : 20 + new], mask_BL[:, : 20 + new])
    trained = {name: p for name, p in operator.named_parameters() if p.requires_grad}
    found, wanted = (
        torch.autograd.grad(y.square().sum(), list(trained.values()), allow_unused=True) for y in (y_BnD, y_BLD[:, 20:])
    )
    assert trained.keys() >= {"direct"} and all(grad is not None and grad.any() for grad in found)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, 1e-12)
    if mode != "modal" or case != "order 3":  # modes that were fitted
        with torch.no_grad():
            y_BnD, _ = operator.extend(x_BLD[:, 20 + new :], state)
            close(y_BnD, operator(x_BLD, mask_BL)[:, 20 + new :], 1e-10)


@every_mode
@pytest.mark.parametrize(("prompt", "kept"), [(0, 24), (0, 20), (12, 24), (12, 18), (12, 10), (12, 0)])
def test_a_state_goes_on_after_calls_with_gradients(case: str, mode: str, prompt: int, kept: int) -> None:
    """The state has their inputs alone, which crops and beams change, and computes the rest when it is asked."""
    operator, x_BLD, mask_BL = make(case).double(), draw(B, 40, D).double(), torch.ones(B, 40, dtype=torch.bool)
    mask_BL[1, :5] = False
    state, rows = operator.init_state(B, mode), [2, 0, 1]
    if prompt:
        with torch.no_grad():
            operator.extend(x_BLD[:, :prompt], state, mask_BL[:, :prompt])
    for part in (slice(prompt, 22), slice(22, 23), slice(23, 24)):
        y_BnD, _ = operator.extend(x_BLD[:, part], state, mask_BL[:, part])
        assert y_BnD.requires_grad
    assert state.behind == 24 - prompt
    state.crop(kept)
    state.reorder(torch.tensor(rows))
    joined = torch.cat([x_BLD[rows, :kept], x_BLD[:, kept:]], dim=1)
    seen_BL = torch.cat([mask_BL[rows, :kept], torch.ones(B, 40 - kept, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        parts = [operator.extend(joined[:, t : t + 1], state, None)[0] for t in range(kept, 40)]
        assert state.behind == 0
        near = 1e-2 if mode == "modal" and case == "order 3" else 1e-10  # modes that were fitted
        close(torch.cat(parts, dim=1), operator(joined, seen_BL)[:, kept:], near)


@every_mode
def test_gradients_that_a_state_cannot_give_are_an_error(case: str, mode: str) -> None:
    operator, x_BLD = make(case), draw(B, 30, D)
    _, state = operator.extend(x_BLD[:, :20], operator.init_state(B, mode, croppable=False))
    for inputs in (x_BLD, x_BLD.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"keeps none: decode under torch\.no_grad\(\), or .* croppable=True"):
            operator.extend(inputs[:, 20:21], state)
        operator.requires_grad_(False)
    assert state.length == 20
    y_BnD, _ = operator.extend(x_BLD[:, 20:21], state)  # nobody asks for gradients
    assert not y_BnD.requires_grad


@torch.no_grad()
def test_spectra_do_not_pile_up_over_requests() -> None:
    operator, x_BLD = make("order 3", LONG), draw(5, LONG, D)
    with frozen_filters(operator):
        sizes = []
        for first in (0, 7):
            for shift, batch in enumerate((1, 2, 3, 5), start=first):
                decoded(operator, x_BLD[:batch], 250 - shift)  # blocks that the end cuts are cut elsewhere each time
                decoded(operator, x_BLD[:batch, :250], 0)
            sizes.append(bytes_of(operator._kept))
        filters = operator._kept.covering(LONG)
    assert sizes[0] == sizes[1] < 12 * filters.numel() * filters.element_size()


def bytes_of(filters: Filters) -> int:
    with io.BytesIO() as file:
        torch.save({name: value for name, value in vars(filters).items() if not callable(value)}, file)
        return file.tell()


@pytest.mark.parametrize("case", ["order 3", "heads", "modal, order 2", "fir, order 2"])
@pytest.mark.parametrize("shared", [False, True])
def test_threads_share_an_operator_each_with_a_state_of_its_own(case: str, shared: bool) -> None:
    operator, x_BLD = make(case, LONG), draw(B, LONG, D)
    with torch.no_grad():
        whole = operator(x_BLD)

    def work(index: int) -> float:
        length = 150 + 20 * index
        with torch.no_grad():
            errors = []
            for _ in range(3):
                prefill = operator(x_BLD[:, : length - 60 + index])
                errors.append((prefill - whole[:, : length - 60 + index]).abs().max())
                errors.append((decoded(operator, x_BLD[:, :length], 40) - whole[:, :length]).abs().max())
            return max(error.item() for error in errors)

    with ThreadPoolExecutor(5) as pool:
        if shared:
            with frozen_filters(operator):
                worst = max(pool.map(work, range(5)))
        else:
            worst = max(pool.map(work, range(5)))
    assert worst < 1e-4


def test_what_inference_mode_computed_breaks_no_gradients() -> None:
    operator, x_BLD = make("order 3"), draw(B, 60, D)
    with frozen_filters(operator):
        with torch.inference_mode():
            decoded(operator, x_BLD, 40)
        with torch.no_grad():
            close(decoded(operator, x_BLD, 40), operator(x_BLD))
        _, state = operator.extend(x_BLD[:, :50], operator.init_state(B))
        operator.extend(x_BLD[:, 50:], state)[0].sum().backward()
    assert operator.direct.grad.any()


def pickled(value: Any) -> bytes:
    return pickle.dumps(value)


@every_mode
@torch.no_grad()
def test_copies_of_a_state_share_what_is_derived_and_pickles_leave_it_out(case: str, mode: str) -> None:
    operator, x_BLD = make(case, 2000), draw(B, 60, D)
    _, state = operator.extend(x_BLD[:, :20], operator.init_state(B, mode))
    for t in range(20, 40):
        operator.extend(x_BLD[:, t : t + 1], state)
    copied, again = copy.deepcopy(state), pickle.loads(pickled(state))
    assert copied.filters is state.filters is not None
    assert again.filters is None
    numbers = sum(p.numel() for p in operator.in_proj.parameters()) + 100 * B * D * 8
    assert len(pickled(state)) < 4 * numbers + 20_000
    found = []
    for each in (state, copied, again):
        found.append(torch.cat([operator.extend(x_BLD[:, t : t + 1], each)[0] for t in range(40, 60)], dim=1))
    close(found[0], operator(x_BLD)[:, 40:], 1e-2 if mode == "modal" and case == "order 3" else 1e-5)
    assert torch.equal(found[0], found[1])
    close(found[2], found[0], 1e-6)


@pytest.mark.parametrize("case", KINDS)
@torch.no_grad()
def test_a_pickled_operator_is_its_parameters(case: str) -> None:
    operator, x_BLD = make(case, 2000), draw(B, 1500, D)
    before = len(pickled(operator))
    with frozen_filters(operator):
        operator(x_BLD)
        decoded(operator, x_BLD, 40)
        assert len(pickled(operator)) == before
    operator(x_BLD)
    decoded(operator, x_BLD, 40)
    assert len(pickled(operator)) == before


def test_nothing_is_said_of_heads_that_the_registry_does_not_know() -> None:
    for config in (HyenaConfig(heads=2), HyenaConfig()):
        operator: Any = build(config, D, MAX)
        assert set(operator.step_modes()) <= set(operator.STATES)
