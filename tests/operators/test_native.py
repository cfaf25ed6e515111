"""The compiled core: the contract of channel-wise operators through it, agreement with torch, and life without it.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from operators import native
from operators.config import FirFilterConfig, HyenaConfig
from operators.native import build
from operators.native.projection import MOST_ROWS, project_step
from tests.operators import test_contract, test_decode
from tests.operators.cases import MAX, B, D, attention, close, draw, generator, hyena, make

HEADS = (
    "heads",
    "power, full",
    "power of eight, full",
    "gated",
    "hedgehog, signed",
    "modal, heads",
    "modal, heads, gated",
    "modal, heads, power",
    "window, power",
    "window, longer than most",
    "window, tied",
    "window, tied, normed",
    "window alone",
)
CHANNELS = ("order 2", "order 3", "order 4", "linear window", "modal, order 2", "fir, order 2")  # taps 3, 3, 1 and 4
ELSEWHERE = (
    "registered",
    "gradients_equal",
    "every_window",
    "every_input_meets",
    "no_step_transforms",
    "sizes_of_transforms",
)  # float64, or no operator


def plain(value: Any) -> Any:
    """A value of a parametrised test, marked there or not."""
    return value.values[0] if hasattr(value, "marks") else value


def contract() -> Iterator[Any]:
    """Every test of the contract and of decoding with each of its arguments, channel-wise cases only."""
    for name, test in [*vars(test_contract).items(), *vars(test_decode).items()]:
        if not name.startswith("test_") or any(part in name for part in ELSEWHERE):
            continue
        marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for chosen in itertools.product(*(map(plain, values) for _, values in marks)):
            arguments = dict(zip((key for key, _ in marks), chosen, strict=True))
            if arguments.get("case", CHANNELS[0]) in CHANNELS + HEADS:
                yield pytest.param(test, arguments, id=f"{name.removeprefix('test_')} {list(chosen)}")


@pytest.mark.parametrize(("test", "arguments"), list(contract()))
def test_the_contract_holds(test: Callable[..., None], arguments: dict[str, Any], core: None) -> None:
    test(**arguments)
    assert native.in_use(), "the test has switched the core off, and may have run without it"


def operator_of(order: int, taps: int, width: int, length: int) -> Any:
    operator = hyena(HyenaConfig(order=order, short_taps=taps, init="random"), width, length)
    operator.initialise(attention(width), generator())
    return operator


def passed(operator: Any, x_BLD: Tensor, mask_BL: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Output and every gradient of one pass."""
    operator.zero_grad()
    inputs = x_BLD.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y_BLD = operator(inputs, mask_BL)
    y_BLD.backward(draw(*y_BLD.shape, seed=3).to(y_BLD.dtype))
    grads = {name: p.grad for name, p in operator.named_parameters() if p.requires_grad}
    return {"y": y_BLD.detach(), "x": inputs.grad, **grads}


@pytest.mark.parametrize(
    ("order", "taps", "width", "length"),
    [(2, 3, 40, 1), (2, 3, 16, 15), (2, 4, 17, 16), (3, 3, 8, 17), (4, 1, 33, 129), (2, 3, 20, 512), (3, 4, 8, 1000)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_outputs_and_gradients_agree_with_torch(
    order: int, taps: int, width: int, length: int, masked: bool, dtype: torch.dtype, tolerance: float, core: None
) -> None:
    operator, x_BLD, mask_BL = operator_of(order, taps, width, length), draw(B, length, width), None
    if masked:
        mask_BL = torch.ones(B, length, dtype=torch.bool)
        mask_BL[1, : length // 3] = mask_BL[2, : length - 1] = False
    ours = passed(operator, x_BLD, mask_BL, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours["without gradients"] = operator(x_BLD, mask_BL)
    native.use(False)
    theirs = passed(operator, x_BLD, mask_BL, dtype)
    theirs["without gradients"] = theirs["y"]
    for name, expected in theirs.items():
        found = ours[name]
        assert expected is not None and found is not None and found.dtype == expected.dtype, name
        close(found.float(), expected.float(), tolerance)


@pytest.mark.parametrize("case", ["heads", "power", "power, full", "gated", "hedgehog", "modal, heads", "fir, heads"])
@pytest.mark.parametrize("length", [1, 15, 130, 300])
def test_heads_agree_with_torch(case: str, length: int, core: None) -> None:
    """In bfloat16, where both round, the core is as near to float32 as torch is, over a few inputs: single gradients of
    decay times are mostly rounding."""
    operator, mask_BL = make(case, 300), torch.ones(B, length, dtype=torch.bool)
    mask_BL[1, : length // 3] = False
    errors: dict[str, list[list[float]]] = {}
    for seed in (1, 2, 3):
        x_BLD = draw(B, length, D, seed=seed)
        native.use(True)
        ours, ours_rounded = (passed(operator, x_BLD, mask_BL, dtype) for dtype in (torch.float32, torch.bfloat16))
        native.use(False)
        theirs, theirs_rounded = (passed(operator, x_BLD, mask_BL, dtype) for dtype in (torch.float32, torch.bfloat16))
        for name, expected in theirs.items():
            assert expected is not None
            close(ours[name], expected)  # type: ignore[arg-type]
            size, row = max(1.0, expected.abs().max().item()), errors.setdefault(name, [])
            found = [each[name] for each in (ours_rounded, theirs_rounded)]
            row.append([(each.float() - expected).abs().max().item() / size for each in found])  # type: ignore[union-attr]
    for name, row in errors.items():
        ours_error, theirs_error = torch.tensor(row).square().mean(0).sqrt().tolist()
        assert ours_error <= 1.2 * theirs_error + 0.01, name


def test_results_do_not_depend_on_the_number_of_threads(core: None) -> None:
    operator, x_BLD = operator_of(3, 3, 40, 200), draw(B, 200, 40)
    before, results = torch.get_num_threads(), []
    p_BEL = draw(B, 160, 200, seed=4).requires_grad_()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        h_CL = operator.filter(200).detach().requires_grad_()
        y_BDL = operator.whole(p_BEL, None, h_CL, None)
        results.append([y_BDL, *torch.autograd.grad(y_BDL.sum(), [p_BEL, h_CL, operator.short_weight])])
    torch.set_num_threads(before)
    assert x_BLD.shape[0] == B and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 2))
@pytest.mark.parametrize(("inputs", "outputs"), [(37, 13), (5, 1), (64, 200)])
@torch.no_grad()
def test_products_of_few_rows_are_linear_layers(rows: int, inputs: int, outputs: int, core: None) -> None:
    linear, x_B1D = nn.Linear(inputs, outputs, bias=outputs > 1), draw(rows, 1, inputs)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(project_step(linear, x_B1D))
    torch.set_num_threads(before)
    close(found[0], linear(x_B1D), 1e-6)
    assert rows > MOST_ROWS or torch.equal(*found)


LONG = 620  # levels up to 128 inputs, windows of every kind


@pytest.mark.parametrize(("order", "width"), [(2, 40), (3, 8)])
@pytest.mark.parametrize("splits", [[1] * LONG, [100] + [1] * 520, [512] + [1] * 108, [611] + [1] * 9, [200, 1, 10]])
def test_every_level_and_window_is_exact(order: int, width: int, splits: list[int], core: None) -> None:
    operator, splits = operator_of(order, 3, width, LONG), splits + [1] * (LONG - sum(splits))
    x_BLD = draw(B, LONG, width)
    with torch.no_grad():
        close(test_contract.extended(operator, x_BLD, splits), operator(x_BLD), 1e-6)


@torch.no_grad()
def test_no_step_of_a_window_copies_the_history(core: None) -> None:
    operator, x_BLD = operator_of(2, 3, 8, 1000), draw(B, 600, 8)
    state = operator.extend(x_BLD[:, :300], operator.init_state(B))[1]
    histories = [state.inputs, *state.gated]
    before = [history.buffer.data_ptr() for history in histories]
    for t in range(300, 512):
        operator.extend(x_BLD[:, t : t + 1], state)
    assert [history.buffer.data_ptr() for history in histories] == before
    assert state.core is not None and (state.core.first, state.core.position) == (300, 512)


def test_a_step_has_the_gradients_of_torch(core: None) -> None:
    operator, x_BLD, grads = make("order 3"), draw(B, 41, D), []
    for on in (True, False):
        native.use(on)
        operator.zero_grad()
        with torch.no_grad():
            _, state = operator.extend(x_BLD[:, :40], operator.init_state(B))
        operator.extend(x_BLD[:, 40:], state)[0].sum().backward()
        grads.append(operator.in_proj.weight.grad)
    close(*grads)


@torch.no_grad()
def test_decoding_goes_on_when_the_core_is_switched(core: None) -> None:
    operator, x_BLD = operator_of(2, 3, 8, 200), draw(B, 200, 8)
    state = operator.extend(x_BLD[:, :50], operator.init_state(B))[1]
    steps = []
    for t in range(50, 200):
        native.use(t // 7 % 2 == 0)
        steps.append(operator.extend(x_BLD[:, t : t + 1], state)[0])
    close(torch.cat(steps, dim=1), operator(x_BLD)[:, 50:])


@torch.no_grad()
def test_what_is_too_long_for_the_core_decodes_in_torch(core: None) -> None:
    length = native.LONGEST - 3
    operator = hyena(HyenaConfig(init="random", filter=FirFilterConfig(taps=100)), 2, native.LONGEST + 100)
    operator.initialise(attention(2), generator())
    x_BLD, state = draw(1, length + 7, 2), operator.init_state(1, "tiled")
    found = [operator.extend(part, state)[0] for part in x_BLD.split([length, *[1] * 7], dim=1)]
    assert state.core is None
    native.use(False)
    close(torch.cat(found, dim=1)[:, -20:], operator(x_BLD[:, -500:])[:, -20:])


@pytest.mark.parametrize("narrow", [False, True])
def test_heads_too_long_for_the_core_are_mixed_in_torch(
    narrow: bool, core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of few keys among them, as short filters have, and chunks of few positions after many."""
    operator, x_BLD = (
        hyena(HyenaConfig(heads=2, init="random", filter=FirFilterConfig(taps=9)), 8, 300),
        draw(2, 300, 8),
    )
    operator.initialise(None, generator())
    monkeypatch.setattr(native, "LONGEST", 200)
    assert operator.path(2, 200).backend == "core" and operator.path(2, 201).backend == "torch"
    found = []
    for _ in range(2):
        operator.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            y_BLD = operator(x_BLD)
            with torch.no_grad():
                found.append([test_contract.extended(operator, x_BLD, [250, 20, 30]), y_BLD.detach()])
        y_BLD.float().square().sum().backward()
        found[-1] += [parameter.grad for parameter in operator.parameters()]
        native.use(False)
    for ours, theirs in zip(*found, strict=True):
        close(ours.float(), theirs.float(), 0.02 if narrow else 1e-5)


@torch.no_grad()
def test_steps_in_bfloat16_and_of_many_sequences_agree_with_torch(core: None) -> None:
    operator, x_BLD = operator_of(2, 3, 24, 150), draw(20, 150, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = test_contract.extended(operator, x_BLD, [60] + [1] * 90)
        native.use(False)
        theirs = test_contract.extended(operator, x_BLD, [60] + [1] * 90)
    assert ours.dtype == theirs.dtype
    close(ours.float(), theirs.float(), 0.03)


@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_heads_decode_under_autocast(case: str, core: None) -> None:
    """A prompt under autocast leaves keys and values in bfloat16, which the core does not read."""
    operator, x_BLD, found = make(case), draw(B, MAX, D), []
    for on in (True, False):
        native.use(on)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(test_contract.extended(operator, x_BLD, [20, 1, 1, 1, 30, *[1] * (MAX - 53)]))
    close(found[0].float(), found[1].float(), 0.03)
    close(found[0].float(), operator(x_BLD), 0.1)


def test_training_keeps_the_projections_in_their_dtype_and_little_else(core: None) -> None:
    operator, x_BLD = operator_of(2, 3, 64, 256), draw(B, 256, 64)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        operator(x_BLD.requires_grad_())
    numbers = x_BLD.numel()
    large = sum(size for size in kept.values() if size >= 2 * numbers)
    assert large <= 2 * (3 + 1 + 1) * numbers  # projections, input and output of the last product


def test_the_core_is_off_until_it_is_asked_for(core: None) -> None:
    operator, x_BLD = make("order 2"), draw(B, MAX, D)
    ours = operator(x_BLD)
    native.use(False)
    theirs = operator(x_BLD)
    assert not native.in_use() and not torch.equal(ours, theirs)
    double = make("order 2").double()
    before = double(x_BLD.double())
    assert native.use(True) and torch.equal(double(x_BLD.double()), before)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process that has loaded nothing and an empty cache."""
    for name in ("_loaded", "_failed", "_used"):
        monkeypatch.setattr(native, name, False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LAYERSWAP_NATIVE", raising=False)
    return monkeypatch


@pytest.mark.parametrize("mode", [None, "build"])
def test_without_a_core_torch_computes_after_one_notice(
    mode: str | None, fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("CXX", "no-such-compiler")
    if mode:
        fresh.setenv("LAYERSWAP_NATIVE", mode)
    with caplog.at_level(logging.INFO):
        assert not native.use(True) and not native.use(True) and not native.in_use()
    expected = "no C++ compiler 'no-such-compiler'" if mode else "make build-ext"
    assert len(caplog.messages) == 1 and expected in caplog.messages[0] and "\n" not in caplog.messages[0]
    operator, x_BLD = make("order 2"), draw(B, 20, D)
    close(operator(x_BLD), operator.reference(x_BLD))


def test_switched_off_or_insisted_on_by_the_environment(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("LAYERSWAP_NATIVE", "0")
    assert not native.use(True) and not caplog.messages
    fresh.setenv("LAYERSWAP_NATIVE", "1")
    fresh.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="asks for the compiled core, but false failed"):
        native.use(True)
    fresh.setenv("LAYERSWAP_NATIVE", "yes")
    with pytest.raises(ValueError, match="'yes'"):
        native.use(True)
    assert list(tmp_path.rglob("core.so")) == []


def test_a_killed_build_blocks_nobody(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho done > "$2"\n')
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    target = build.library()
    target.parent.mkdir(parents=True)
    target.with_suffix(".part").write_text("half")
    target.with_suffix(".lock").write_text("")
    assert build.build() == target and target.read_text() == "done\n"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert build.build() == target


def test_many_builds_at_once_compile_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every source once, several at a time, and then all into one library: here a compiler waits for a second one."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f"""#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "begin $(basename "$2")" >> {log}
tries=0
until [ "$(grep -c begin {log})" -ge 2 ] || [ $tries -ge 200 ]; do sleep 0.1; tries=$((tries + 1)); done
echo "end $(basename "$2")" >> {log}
echo done > "$2"
"""
    )
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setattr(build.os, "cpu_count", lambda: len(build.SOURCES))
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build.build(), range(4)))
    assert len(set(built)) == 1 and built[0].read_text() == "done\n"
    *compiled, begin, end = log.read_text().splitlines()
    assert sorted(compiled) == sorted(f"{when} {name}.o" for name in build.SOURCES for when in ("begin", "end"))
    assert [line.split()[0] for line in compiled[:2]] == ["begin", "begin"]
    assert (begin, end) == ("begin core.part", "end core.part")
    assert {path.name for path in built[0].parent.iterdir()} == {"core.so", "core.lock"}
