"""Which path heads take: the fastest form for given lengths, filters and feature maps, and who computes it.

Shapes: as in `masked`, L positions, S modes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from operators.filters.modes import Modes
from operators.mixing.chunked import Bases, mix_chunked
from operators.mixing.features import Layout
from operators.mixing.head_states import chunk_of, modal_bases, real_states
from operators.mixing.masked import Backend, backend_for, mix
from operators.mixing.smooth import CHUNK, functions_for, smooth_bases

Form = Literal["masked", "recurrence", "smooth"]
SMOOTH_FROM = 1200  # positions, measured
RECURRENCE_FROM = 512  # at least
KERNELS_UP_TO = 8192  # positions, on accelerators


@dataclass(frozen=True)
class Path:
    """How heads compute whole sequences.

    Attributes:
        form: see `form_of`.
        backend: see `backend_for`; of the other forms it is torch.
        fused: whether short convolution, features and direct term are in the same pass.
        functions: polynomials of the form "smooth".
    """

    form: Form
    backend: Backend
    fused: bool
    functions: int | None = None


def form_of(
    length: int, key_width: int, dtype: torch.dtype, degree: int | None, states: int | None, fits: Callable[[], bool]
) -> Form:
    """The fastest form for whole sequences.

        form         computes                         for
        recurrence   a state a mode, `head_states`    modal filters, L > 2 (C + R K) and L > 512
        smooth       polynomials by chunk, `smooth`   filters that they fit, bfloat16, L > 1200
        masked       every product, `masked`          everything else, powers of any length among it

    The first bound is where two products of every state with every position are fewer than those of half the positions
    with every position, and the chunks' own on top. Polynomials fit to 1e-3 only, which float32 would show.

    Args:
        length: positions L.
        key_width: of queries and keys after the feature map, K.
        dtype: of queries, keys and values.
        degree: of powers, None for other feature maps.
        states: real numbers R of a filter's modes, None where it has none.
        fits: whether polynomials fit the filters; asked only where the answer matters.
    """
    if degree is not None:
        return "masked"
    if states is not None:
        least = max(RECURRENCE_FROM, 2 * (chunk_of(dtype) + states * key_width))
        return "recurrence" if length > least else "masked"
    return "smooth" if dtype == torch.bfloat16 and length > SMOOTH_FROM and fits() else "masked"


def path_of(
    shape: tuple[int, int], layout: Layout, dtype: torch.dtype, h_HL: Tensor, modes: Modes | None, *, fused: bool
) -> Path:
    """The path of whole sequences (B, L); `modes` are those of h, where it has any.

    On accelerators filters that are no sums of modes are never fitted, for the question whether polynomials fit would
    wait for the device, and up to `KERNELS_UP_TO` positions the kernels mix in the masked form whatever the filter.
    """
    (batch, length), states = shape, None if modes is None else real_states(modes)
    like = h_HL.new_empty((0, length), dtype=dtype)
    backend = backend_for(like, batch * layout.heads, *layout.mixed, layout.degree)
    form: Form = "masked"
    functions: list[int | None] = []

    def fits() -> bool:
        functions.append(functions_for(h_HL))
        return functions[0] is not None

    if not (backend == "triton" and length <= KERNELS_UP_TO) and (like.device.type == "cpu" or states is not None):
        form = form_of(length, layout.mixed[0], dtype, layout.degree, states, fits)
    if form != "masked":
        return Path(form, "torch", fused, functions[0] if form == "smooth" else None)
    return Path(form, backend, fused)


def weights_for(path: Path, dtype: torch.dtype, h_HL: Tensor, modes: Modes | None) -> tuple[Tensor] | Bases:
    """What a path mixes with: bases, or h alone."""
    if path.form == "recurrence":
        assert modes is not None
        return modal_bases(modes, chunk_of(dtype))
    if path.form == "smooth":
        assert path.functions is not None
        return smooth_bases(h_HL, CHUNK, path.functions)
    return (h_HL,)


def mix_fastest(
    q_BHKL: Tensor, k_BHKL: Tensor, v_BHVL: Tensor, weights: tuple[Tensor] | Bases, degree: int | None
) -> Tensor:
    """`masked.mix` of whole sequences with what `weights_for` gave."""
    if isinstance(weights, Bases):
        return mix_chunked(q_BHKL, k_BHKL, v_BHVL, weights)
    return mix(q_BHKL, k_BHKL, v_BHVL, weights[0], degree)
