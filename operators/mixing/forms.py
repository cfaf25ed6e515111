"""Which way of mixing is the fastest for given lengths, filters and feature maps, and mixing that way.

Shapes: as in `mixing`, L positions, S modes.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from operators.filters.modes import Modes
from operators.gpu import accelerated
from operators.gpu.heads import takes
from operators.mixing.chunked import Bases, mix_chunked
from operators.mixing.head_states import chunk_of, modal_bases, real_states
from operators.mixing.masked import mix
from operators.mixing.smooth import CHUNK, functions_for, smooth_bases

Form = Literal["masked", "recurrence", "smooth"]
SMOOTH_FROM = 1200  # positions, measured
RECURRENCE_FROM = 512  # at least
KERNELS_UP_TO = 8192  # positions, on accelerators


def form_of(
    length: int, key_width: int, dtype: torch.dtype, degree: int | None, states: int | None, fits: Callable[[], bool]
) -> Form:
    """The fastest form for whole sequences.

        form         computes                         for
        recurrence   a state a mode, `head_states`    modal filters, L > 2 (C + R K) and L > 512
        smooth       polynomials by chunk, `smooth`   filters that they fit, bfloat16, L > 1200
        masked       every product, `mixing`          everything else, powers of any length among it

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


def weights_for(
    length: int, widths: tuple[int, int], dtype: torch.dtype, h_HL: Tensor, modes: Modes | None, degree: int | None
) -> tuple[Tensor] | Bases:
    """What the form that `form_of` names mixes with: bases, or h alone; `modes` are those of h, where it has any.

    On accelerators filters that are no sums of modes are never fitted, and up to `KERNELS_UP_TO` positions the kernels
    mix in the masked form whatever the filter. `widths` are those of keys, after the feature map, and of values.
    """
    functions: list[int | None] = []

    def fits() -> bool:
        functions.append(functions_for(h_HL))
        return functions[0] is not None

    states = None if modes is None else real_states(modes)
    by_kernels = length <= KERNELS_UP_TO and accelerated(h_HL) and takes(dtype, len(h_HL), *widths, degree)
    if by_kernels or (h_HL.device.type != "cpu" and states is None):
        return (h_HL,)  # the question whether polynomials fit would wait for the device
    form = form_of(length, widths[0], dtype, degree, states, fits)
    if form == "recurrence":
        assert modes is not None
        return modal_bases(modes, chunk_of(dtype))
    if form == "smooth":
        assert functions[0] is not None
        return smooth_bases(h_HL, CHUNK, functions[0])
    return (h_HL,)


def mix_fastest(
    q_BHKL: Tensor, k_BHKL: Tensor, v_BHVL: Tensor, weights: tuple[Tensor] | Bases, degree: int | None
) -> Tensor:
    """`mixing.mix` of whole sequences with what `weights_for` gave."""
    if isinstance(weights, Bases):
        return mix_chunked(q_BHKL, k_BHKL, v_BHVL, weights)
    return mix(q_BHKL, k_BHKL, v_BHVL, weights[0], degree)
