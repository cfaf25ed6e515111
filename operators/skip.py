"""The control operator: nothing flows, whatever a model still does it does without this layer's attention.

Shapes: B batch, L positions, D model width.
"""

import torch
from torch import Tensor, nn

from operators.config import SkipConfig
from operators.decoding.state import State
from operators.transfer.attention import AttentionWeights


class Skip(nn.Module):
    """Output zero, no parameters. Arguments and methods as in `registry.Operator`."""

    def __init__(self, config: SkipConfig, d_model: int, max_length: int, inner: int | None = None) -> None:
        super().__init__()
        self.config, self.d_model, self.max_length, self.inner = config, d_model, max_length, inner or d_model

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Zeros like the input. ValueError if it is longer than `max_length`."""
        State(x_BLD.shape[0], self.max_length).check(x_BLD.shape[0], x_BLD.shape[1])
        return torch.zeros_like(x_BLD)

    def reference(self, x_BLD: Tensor) -> Tensor:
        """The definition: zero times the input."""
        return 0.0 * x_BLD

    def init_state(self, batch: int, mode: str | None = None, *, croppable: bool = True) -> State:
        """State that only counts positions, whatever the mode."""
        return State(batch, self.max_length)

    def extend(self, x_BLD: Tensor, state: State, mask_BL: Tensor | None = None) -> tuple[Tensor, State]:
        """Zeros for n new positions; errors as for any operator."""
        state.check(x_BLD.shape[0], x_BLD.shape[1])
        state.length += x_BLD.shape[1]
        return torch.zeros_like(x_BLD), state

    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """Nothing to initialise."""
