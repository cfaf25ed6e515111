"""What channel-wise and multi-head Hyena share: projections, short convolution, whole sequences, initialisation.

    channel-wise (Poli et al. 2023, definition 3.1)      multi-head (Massaroli et al. 2023, section 4)
    v <- h_n * (x_n v) + direct_n x_n v, n = 1 .. N-1    y_t = sum_s h_{t-s} f(q_t, k_s) v_s + direct v_t
    y  = x_0 v

Both are: one projection, a short convolution, gating and long convolution, one projection out. `channels.py` and
`heads.py` are what lies between the projections, `decoding.extend` is how all of them go on from a state.

Projections run in the ambient precision (bfloat16 under autocast), all that lies between them in float32 or
float64. Positions are the last axis between the projections: no transposition is ever copied.

Shapes: B batch, L positions, D model width, I inner width, E rows of the projection, K taps, C filters, T positions
seen.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from operators.convolution.causal import compute_dtype, short_conv_reference
from operators.decoding.extend import Extending, masked
from operators.decoding.frozen import Filters
from operators.filters.base import HALF, LongFilter, draw_linear, draw_uniform
from operators.filters.fir import FirFilter
from operators.filters.implicit import ImplicitFilter
from operators.filters.modal import ModalFilter
from operators.transfer.attention import AttentionWeights

FILTERS: dict[str, Callable[..., LongFilter]] = {"implicit": ImplicitFilter, "modal": ModalFilter, "fir": FirFilter}


class Hyena(Extending):
    """Causal operator (B, L, D) -> (B, L, D); call `initialise` before use. It keeps nothing but parameters.

    Parameters: `in_proj` (E, D), `short_weight` (E, K) oldest tap first, `short_bias` (E,), `filter` with C
    filters, `direct`, `out_proj` (D, I).

    Args:
        config: a `HyenaConfig`, or the one of an operator that shares the projections.
        d_model: model width D.
        max_length: longest sequence.
        inner: width I of what lies between the projections; None for D.

    Raises:
        ValueError: `heads` does not divide `inner`, `max_length` is not positive, or the filter does not fit it.
    """

    def __init__(self, config: Any, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 but is {max_length}.")
        self.config, self.d_model, self.max_length, self.inner = config, d_model, max_length, inner or d_model

    def long_filter(self, filters: int, steps: int) -> LongFilter:
        """The configuration's filter; `steps` convolutions share the filters. ValueError if it does not fit
        `max_length`."""
        return FILTERS[self.config.filter.kind](self.config.filter, filters, self.max_length, steps)

    def build(self, rows: int, made: LongFilter, direct: int) -> None:
        """Make the parameters, with so many rows of the projection."""
        self.in_proj = nn.Linear(self.d_model, rows)
        self.short_weight = nn.Parameter(torch.zeros(rows, self.config.short_taps))
        self.short_bias = nn.Parameter(torch.zeros(rows))
        self.filter = made
        if torch.get_default_dtype() in HALF:
            self.filter.float()
        self.direct = nn.Parameter(torch.zeros(direct))
        self.out_proj = nn.Linear(self.inner, self.d_model)

    def freeze(self) -> Filters:
        return self.filter.freeze()

    @abstractmethod
    def combine_reference(self, u_BEL: Tensor, h_CL: Tensor) -> Tensor:
        """`combine` of whole sequences from its definition, O(L^2), differentiable by autograd."""

    @abstractmethod
    def transfer(self, attention: AttentionWeights, generator: torch.Generator) -> None:
        """Set `in_proj` and, where it follows the attention, the filter."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Whole sequences at once.

        The filters are computed at every call, without gradients too: for many calls with the same weights there is
        `frozen_filters` (`decoding.kept`). `torch.compile` leaves it, and `extend`, as they are: one break in a layer's
        graph instead of loops unrolled.

        Args:
            x_BLD: inputs, 1 <= L <= max_length; of no sequences comes an empty output.
            mask_BL: 1 at real tokens, 0 at left padding, which leaves the outputs of real tokens unchanged.

        Returns:
            (B, L, D) in the dtype of the projections.

        Raises:
            ValueError: no position, or more than `max_length`.
        """
        if x_BLD.shape[1] < 1:
            raise ValueError("forward needs at least one position but got none.")
        self.filter.check(x_BLD.shape[1])
        if x_BLD.shape[0] == 0:
            return self.of_no_sequences(x_BLD)
        filters = self.filter(x_BLD.shape[1]) if torch.is_grad_enabled() else self.frozen()
        p_BEL = masked(self.project(self.in_proj, x_BLD.transpose(1, 2)), mask_BL)
        return self.project_out(self.whole(p_BEL, mask_BL, filters, None))

    def reference(self, x_BLD: Tensor) -> Tensor:
        """`forward` from the definitions, O(L^2), differentiable by autograd; for tests and for reading."""
        h_CL = self.filter(x_BLD.shape[1])
        u_BEL = short_conv_reference(self.in_proj(x_BLD).transpose(1, 2), self.short_weight, self.short_bias)
        y_BIL = self.combine_reference(u_BEL.to(compute_dtype(x_BLD.dtype)), h_CL)
        return self.out_proj(y_BIL.transpose(1, 2).to(x_BLD.dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """Set every parameter, deterministically given the generator's state.

        "transfer": value and output projections are copied, the rest follows the attention as `transfer` of the
        operator says; the short convolution starts as the identity and `direct` as 0.
        "random": torch's usual uniform bounds, `direct` standard normal as in safari.

        Raises:
            ValueError: "transfer" without an attention, with weights that do not fit, or without the
                statistics that the configuration needs.
        """
        self.filter.initialise(generator)
        if self.config.init == "random":
            draw_linear(self.in_proj, generator)
            draw_linear(self.out_proj, generator)
            bound = self.config.short_taps**-0.5
            draw_uniform(self.short_weight, bound, generator)
            draw_uniform(self.short_bias, bound, generator)
            self.direct.copy_(torch.randn(self.direct.shape, generator=generator, device=generator.device))
            return
        if attention is None:
            raise ValueError("init: transfer needs the attention to copy from but got None: use init: random.")
        attention.check(self.d_model, self.inner)
        self.transfer(attention, generator)
        self.out_proj.weight.copy_(attention.output)
        self.out_proj.bias.copy_(attention.bias_of("output"))
        self.short_weight.zero_()
        self.short_weight[:, -1] = 1.0
        self.short_bias.zero_()
        self.direct.zero_()
