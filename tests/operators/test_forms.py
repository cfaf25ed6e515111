"""Compute forms of multi-head mixing against the definition; what is kept for backward.

Shapes: B batch, H heads, K key width, V value width, L positions.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from operators import heads, native
from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig
from operators.convolution.causal import short_conv, short_conv_reference
from operators.filters.modes import Modes
from operators.mixing import forms
from operators.mixing import masked as mixing
from operators.mixing.chunked import Bases, mix_chunked
from operators.mixing.features import Layout, divided, features
from operators.mixing.forms import Path, form_of
from operators.mixing.fused import Inputs, mix_fused
from operators.mixing.head_states import chunk_of, extend, first_state, freeze, modal_bases, step
from operators.mixing.masked import mix, mix_reference
from operators.mixing.smooth import residual, smooth_bases
from operators.registry import build
from tests.benchmarks.contenders import Attention
from tests.operators.cases import close, draw, generator, hyena


def parts(length: int, heads: int = 3, batch: int = 2, width: int = 5) -> list[Tensor]:
    """Queries, keys and values of unequal widths, float64."""
    widths = (width, width, width + 2)
    return [draw(batch, heads, w, length, seed=seed).double() / w**0.5 for seed, w in enumerate(widths)]


def gradients(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    cotangent = draw(*outputs.shape, seed=9).to(outputs.dtype)
    return list(torch.autograd.grad((outputs * cotangent).sum(), inputs))


@pytest.mark.parametrize("degree", [None, 4])
@pytest.mark.parametrize("length", [1, 100, 300])
def test_mixing_in_bfloat16_nears_the_definition(degree: int | None, length: int) -> None:
    inputs = [*parts(length, batch=1 + (length == 100)), 0.9 ** torch.arange(length).expand(3, -1).double()]
    wide, narrow = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = mix_reference(*wide, degree)
    outputs = mix(*(x.to(torch.bfloat16) for x in narrow[:3]), narrow[3].float(), degree)
    assert outputs.dtype == torch.bfloat16
    close(outputs.double(), expected, 0.02)
    for narrow_grad, wide_grad in zip(gradients(outputs, narrow), gradients(expected, wide), strict=True):
        close(narrow_grad, wide_grad, 0.03)


def kept_bytes(module: Any, x_BLD: Tensor) -> int:
    """Of all that autograd keeps of a training pass, parameters and input apart, each storage counted once."""
    storages: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), x_BLD]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        kept = module(x_BLD)
    assert kept.requires_grad
    return sum(storages.values())


def test_training_in_bfloat16_keeps_no_more_than_attention() -> None:
    length, width, heads = 512, 512, 8
    operator = hyena(HyenaConfig(heads=heads, init="random"), width, length)
    operator.initialise(None, generator())
    x_BLD = draw(2, length, width).requires_grad_()  # one filter for all sequences
    assert kept_bytes(operator, x_BLD) <= kept_bytes(Attention(width, heads), x_BLD)


def modes(heads: int = 3, kind: str = "complex") -> Modes:
    """Slow and fast modes, float64: with one state of oscillation each, or without."""
    rates = torch.tensor([0.3, 0.02, 0.004], dtype=torch.float64) * torch.arange(1, heads + 1)[:, None]
    residues = draw(heads, 3, seed=5).double()
    if kind == "real":
        return Modes(-rates, residues)
    return Modes(torch.complex(-rates, 3 * draw(heads, 3, seed=6).double()), torch.complex(residues, residues.flip(0)))


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 2), (16, 1), (17, 1), (61, 3)])
def test_the_chunked_recurrence_is_the_definition(kind: str, length: int, batch: int) -> None:
    inputs, filters, grads = [*parts(length, batch=batch), *modes(kind=kind)], [], []
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = Modes(*leaves[3:])
        if chunked:
            outputs = mix_chunked(leaves[0], leaves[1], leaves[2], modal_bases(found, 16))
        else:
            outputs = mix_reference(*leaves[:3], found.at(torch.arange(length)))
        filters.append(outputs)
        grads.append(gradients(outputs, leaves))
    close(filters[0], filters[1], 1e-11)
    for ours, theirs in zip(*grads, strict=True):
        close(torch.view_as_real(ours) if ours.is_complex() else ours,
              torch.view_as_real(theirs) if theirs.is_complex() else theirs, 1e-11)  # fmt: skip


def test_the_chunked_recurrence_in_bfloat16() -> None:
    leaves = [x.clone().requires_grad_() for x in [*parts(900), *modes(kind="real")]]
    narrow = [x.detach().clone().requires_grad_() for x in leaves]
    expected = mix_reference(*leaves[:3], Modes(*leaves[3:]).at(torch.arange(900)))
    bases = modal_bases(Modes(narrow[3].float(), narrow[4].float()), chunk_of(torch.bfloat16))
    outputs = mix_chunked(*(x.to(torch.bfloat16) for x in narrow[:3]), bases)
    close(outputs.double(), expected, 0.02)
    for ours, theirs in zip(gradients(outputs, narrow), gradients(expected, leaves), strict=True):
        close(ours, theirs, 0.03)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("splits", [[300], [1] * 12 + [288], [150, 1, 1, 148], [128, 128, 44]])
def test_a_state_of_constant_size_continues_any_split(kind: str, splits: list[int]) -> None:
    q, k, v = parts(300)
    recurrence = freeze(modes(kind=kind))
    state, outputs = first_state(2, recurrence, q.shape[2], v.shape[2]), []
    for some in zip(q.split(splits, -1), k.split(splits, -1), v.split(splits, -1), strict=True):
        y, state = (step if some[0].shape[-1] == 1 else extend)(*some, state, recurrence)
        outputs.append(y)
    close(torch.cat(outputs, -1), mix_reference(q, k, v, modes(kind=kind).at(torch.arange(300))), 1e-11)


def slow(rates: Tensor, length: int) -> Tensor:
    """Filters that turn and decay slowly."""
    lags = torch.arange(length, dtype=torch.float64)
    return torch.exp(-lags * rates[:, None] / 200) * (1 + 0.3 * torch.sin(rates[:, None] * lags / 50))


@pytest.mark.parametrize(("length", "batch"), [(10, 2), (32, 1), (33, 2), (200, 2)])
def test_smooth_filters_are_mixed_to_their_residual(length: int, batch: int) -> None:
    rates = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    missed, found, grads = residual(slow(rates, length), 16), [], []
    assert missed < 1e-3
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in [*parts(length, batch=batch), rates]]
        h_HT = slow(leaves[3], length)
        found.append(mix_chunked(*leaves[:3], smooth_bases(h_HT, 16)) if chunked else mix_reference(*leaves[:3], h_HT))
        grads.append(gradients(found[-1], leaves))
    assert (found[0] - found[1]).norm() <= max(2 * missed, 1e-12) * found[1].norm()
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= max(20 * missed, 1e-12) * theirs.norm()


def test_the_residual_is_the_error_of_outputs_for_white_inputs() -> None:
    h_HT = slow(torch.tensor([3.0], dtype=torch.float64), 600)
    q, k, v = torch.ones(1, 1, 1, 600).double(), draw(1, 1, 1, 600).double(), torch.ones(1, 1, 400, 600).double()
    v = v * draw(1, 1, 400, 600, seed=2)
    error = mix_chunked(q, k, v, smooth_bases(h_HT, 32)) - mix(q, k, v, h_HT)
    assert 0.5 < error[..., 512:].norm() / mix(q, k, v, h_HT)[..., 512:].norm() / residual(h_HT, 32) < 2.0


def test_rough_filters_have_a_large_residual() -> None:
    assert residual(draw(2, 200).double(), 16) > 0.1
    assert residual(torch.zeros(2, 200).double(), 16) == 0.0


def never() -> bool:
    raise AssertionError("the filters' smoothness does not matter here")


@pytest.mark.parametrize(
    ("form", "length", "dtype", "degree", "states", "fits"),
    [
        ("masked", 256, torch.bfloat16, None, 4, never),
        ("masked", 1500, torch.bfloat16, None, 8, never),
        ("recurrence", 1600, torch.bfloat16, None, 8, never),
        ("recurrence", 1300, torch.float32, None, 8, never),
        ("masked", 2048, torch.float32, None, 16, never),
        ("recurrence", 8192, torch.float32, None, 16, never),
        ("masked", 8192, torch.bfloat16, 4, 8, never),
        ("masked", 8192, torch.bfloat16, 4, None, never),
        ("masked", 8192, torch.float32, None, None, never),
        ("masked", 1024, torch.bfloat16, None, None, never),
        ("smooth", 2048, torch.bfloat16, None, None, lambda: True),
        ("masked", 2048, torch.bfloat16, None, None, lambda: False),
    ],
)
def test_the_rule(form: str, length: int, dtype: torch.dtype, degree: Any, states: Any, fits: Any) -> None:
    assert form_of(length, 64, dtype, degree, states, fits) == form


@pytest.mark.parametrize("form", ["recurrence", "smooth", "masked"])
def test_all_forms_mix_alike(form: Any) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in parts(700))
    decays = Modes(-torch.tensor([[0.002], [0.004], [0.008]]), torch.ones(3, 1))
    h_HT = decays.at(torch.arange(700))
    weights = forms.weights_for(Path(form, "torch", False, 8), q.dtype, h_HT, decays)
    assert isinstance(weights, Bases) == (form != "masked")
    outputs = forms.mix_fastest(q, k, v, weights, None)
    close(outputs.float(), mix(q.float(), k.float(), v.float(), h_HT), 0.02)


IMPLICIT = HyenaConfig(heads=2, init="random", filter=ImplicitFilterConfig(sine_frequency=1.0))
SQUARED = HyenaConfig(
    heads=2,
    init="random",
    feature_map="power",
    degree=2,
    key_dim=4,
    normalise=True,
    filter=ModalFilterConfig(modes=3, positive=True),
)
PATHS: list[tuple[HyenaConfig, int, torch.dtype, Path]] = [
    (IMPLICIT, 256, torch.float32, Path("masked", "torch", False)),
    (IMPLICIT, 2048, torch.float32, Path("masked", "torch", False)),
    (IMPLICIT, 256, torch.bfloat16, Path("masked", "torch", True)),
    (IMPLICIT, 2048, torch.bfloat16, Path("smooth", "torch", True, 4)),
    (replace(IMPLICIT, feature_map="power"), 2048, torch.bfloat16, Path("masked", "torch", True)),
    (SQUARED, 2048, torch.bfloat16, Path("recurrence", "torch", True)),
    (replace(SQUARED, degree=4), 2048, torch.bfloat16, Path("masked", "torch", True)),
    (replace(SQUARED, key_dim=17), 2048, torch.bfloat16, Path("masked", "torch", True)),
    (replace(IMPLICIT, filter=ModalFilterConfig()), 256, torch.float32, Path("masked", "torch", False)),
    (replace(IMPLICIT, filter=ModalFilterConfig()), 2048, torch.float32, Path("recurrence", "torch", False)),
    (replace(IMPLICIT, filter=ModalFilterConfig()), 2048, torch.bfloat16, Path("recurrence", "torch", True)),
]


def test_the_far_part_of_a_window_takes_the_path_of_what_lies_beyond_it() -> None:
    operator = hyena(replace(SQUARED, window=64), 8, 4096)
    operator.initialise(None, generator())
    assert operator.path(1, 64, torch.bfloat16) == Path("masked", "torch", False)  # nothing is far
    assert operator.path(1, 64 + 16, torch.bfloat16) == Path("masked", "torch", True)
    assert operator.path(1, 64 + 2048, torch.bfloat16) == Path("recurrence", "torch", True)


@pytest.mark.parametrize(("config", "length", "dtype", "path"), PATHS)
def test_an_operator_says_which_path_it_takes_and_takes_it(
    config: HyenaConfig, length: int, dtype: torch.dtype, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, taken = hyena(config, 8, 2048), []
    operator.initialise(None, generator())
    assert operator.path(1, length, dtype) == path
    for name in ("mix_chunked", "mix"):
        real = getattr(forms, name)
        monkeypatch.setattr(forms, name, lambda *given, name=name, real=real: (taken.append(name), real(*given))[1])

    def fused(inputs: Inputs, weights: Any, layout: Layout) -> Tensor:
        taken.append("fused chunks" if isinstance(weights, Bases) else "fused")
        return mix_fused(inputs, weights, layout)

    monkeypatch.setattr(heads, "mix_fused", fused)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        operator(draw(1, length, 8))
    chunked = path.form != "masked"
    assert taken == [("fused chunks" if chunked else "fused") if path.fused else "mix_chunked" if chunked else "mix"]


def test_the_core_is_a_path_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = hyena(IMPLICIT, 8, 300)
    operator.initialise(None, generator())
    monkeypatch.setattr(native, "_used", True)
    assert operator.path(2, 256) == Path("masked", "core", False)
    assert operator.double().path(2, 256, torch.float64) == Path("masked", "torch", False)


HEDGEHOG = ModalFilterConfig(positive=True)
MODAL = {
    "identity": HyenaConfig(heads=3, init="random", key_gate=True),
    "hedgehog": HyenaConfig(heads=3, init="random", feature_map="hedgehog", normalise=True, filter=HEDGEHOG),
}


@pytest.mark.parametrize(("case", "positive"), [("identity", True), ("identity", False), ("hedgehog", True)])
def test_heads_with_modes_train_and_decode_as_their_history_does(case: str, positive: bool) -> None:
    config = replace(MODAL[case], filter=ModalFilterConfig(modes=3, positive=positive))
    operator: Any = build(config, 12, 700)
    operator.initialise(None, generator())
    operator, x_BLD = operator.double(), draw(2, 700, 12).double()
    history = operator.extend(x_BLD, operator.init_state(2, "direct"))[0].detach()  # in the form that the rule names
    mask_BL = torch.ones(2, 700, dtype=torch.bool)
    for splits in ([690, *[1] * 10], [1] * 5 + [300, 395], [700]):
        state, outputs = operator.init_state(2), []
        assert state.mode == "modal"
        with torch.no_grad():
            for part, seen in zip(x_BLD.split(splits, 1), mask_BL.split(splits, 1), strict=True):
                outputs.append(operator.extend(part, state, seen if splits[0] == 1 else None)[0])
        close(torch.cat(outputs, 1), history, 1e-10)
        assert not hasattr(state, "keys")
    state.select(torch.tensor([1]))
    assert state.memory[0].shape[0] == 1


@pytest.mark.parametrize("form", ["masked", "recurrence", "power"])
def test_the_fused_pass_equals_its_parts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, leaves = 300, [draw(2, 3 * 12, 300).bfloat16(), draw(36, 3, seed=2), draw(36, seed=3), draw(12, seed=4)]
    weights: Any = (0.98 ** torch.arange(length).expand(3, -1),)
    if form == "recurrence":
        weights = modal_bases(Modes(*(x.float() for x in modes(kind="real"))), 128)
    degree, found = 4 if form == "power" else None, []
    monkeypatch.setattr(mixing, "SCRATCH", 128 * length)  # one head at a time
    for fused in (True, False):
        inputs = [x.clone().requires_grad_() for x in [*leaves, *weights]]
        p_BEL, taps_ET, bias_E, direct_D, *rest = inputs
        if fused:
            given = Inputs(p_BEL, None, taps_ET, bias_E, direct_D, None)
            bases: Any = Bases(*rest) if form == "recurrence" else (rest[0],)
            y_BDL = mix_fused(given, bases, Layout(3, 4, 4, degree=degree))
        else:
            u_BEL = short_conv(p_BEL, taps_ET, bias_E, narrow=True)
            q, k, v = (x.unflatten(1, (3, -1)) for x in u_BEL.chunk(3, 1))
            mixed = mix_chunked(q, k, v, Bases(*rest)) if form == "recurrence" else mix(q, k, v, rest[0], degree)
            y_BDL = mixed.flatten(1, 2) + v.flatten(1, 2) * direct_D[:, None].bfloat16()
        found.append([y_BDL, *gradients(y_BDL, inputs)])
    for ours, theirs in zip(*found, strict=True):
        close(ours.float(), theirs.float(), 0.02)


FEATURES = {
    "gated": Layout(2, 4, 6, gated=True),
    "normalised power": Layout(2, 4, 6, normalised=True, degree=4),
    "mapped": Layout(2, 4, 6, mapped=True),
    "all": Layout(2, 4, 6, gated=True, normalised=True, mapped=True),
    "squared": Layout(2, 4, 6, gated=True, normalised=True, squared=True),
}


@pytest.mark.parametrize(
    ("name", "recurrent"),
    [*((name, False) for name in FEATURES), ("gated", True), ("mapped", True), ("all", True), ("squared", True)],
)
def test_the_fused_pass_has_the_gradients_of_the_definition(
    name: str, recurrent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates, maps and sums of weights, one head at a time, with padding."""
    layout, length = FEATURES[name], 300
    rows = 2 * sum(layout.rows)
    monkeypatch.setattr(mixing, "SCRATCH", 128 * length)
    mask_BL = torch.ones(2, length, dtype=torch.bool)
    mask_BL[1, :90] = False
    short = [draw(rows, 3, seed=2) / 2, draw(rows, seed=3) / 4, draw(12, seed=4)]
    leaves = [draw(2, rows, length).bfloat16().float(), *short, draw(2, 4, 4, seed=5)]
    decays = Modes(-torch.tensor([[0.02], [0.1]]), torch.ones(2, 1))
    found = []
    for fused in (True, False):
        leaf = [x.clone().requires_grad_() for x in (leaves if fused else [x.double() for x in leaves])]
        p_BEL, taps_ET, bias_E, direct_D, map_HKK = leaf
        h_HT = decays.at(torch.arange(length)).to(p_BEL.dtype).requires_grad_()
        chosen = map_HKK if layout.mapped else None
        if fused:
            weights: Any = modal_bases(decays, 128) if recurrent else (h_HT,)
            y_BDL = mix_fused(Inputs(p_BEL.bfloat16(), mask_BL, taps_ET, bias_E, direct_D, chosen), weights, layout)
        else:
            u_BEL = short_conv_reference(p_BEL, taps_ET, bias_E) * mask_BL[:, None]
            parts_of_u = layout.parts(u_BEL)
            q, k, v = features(parts_of_u, layout.unsquared(), chosen, mask_BL)
            y_BHVL = mix_reference(q, k, v, h_HT, 2 if layout.squared else layout.degree)
            y_BHVL = divided(y_BHVL) if layout.normalised else y_BHVL
            y_BDL = y_BHVL.flatten(1, 2) + parts_of_u[2].flatten(1, 2) * direct_D[:, None]
        wanted = [*leaf[:4], *([map_HKK] if layout.mapped else []), *([] if recurrent else [h_HT])]
        y_BDL = y_BDL * mask_BL[:, None]
        found.append([y_BDL, *gradients(y_BDL, wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
