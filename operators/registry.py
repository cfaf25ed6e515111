"""Which operators exist, how each can decode, what all of them offer, and how a configuration becomes one.

A new operator is a configuration in `config.OperatorConfig`, a module, and a line in `OPERATORS`; the contract suite
then asks for test cases of it. A new way to decode is a state class in the operator's `STATES`; which of them a filter
allows is said by its `step_modes`.

    channel-wise   tiled, direct, modal, window     `decoding.channelwise`
    heads          modal, direct                    `decoding.multihead`
    window alone   window                           `decoding.multihead`
    skip           count                            `decoding.state`

Shapes: B batch, L positions, D model width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from operators.channels import ChannelHyena
from operators.config import HyenaConfig, OperatorConfig
from operators.decoding.state import State
from operators.heads import HeadHyena
from operators.skip import Skip
from operators.transfer.attention import AttentionWeights
from operators.window import WindowAttention
from operators.windowed import WindowedHeads


class Operator(Protocol):
    """Interface of every operator: causal, built for a width outside, one inside, and a longest sequence."""

    d_model: int
    max_length: int
    inner: int

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Outputs (B, L, D) of whole sequences; a mask is 1 at real tokens and 0 at left padding."""

    def reference(self, x_BLD: Tensor) -> Tensor:
        """`forward` from the definition, O(L^2), differentiable by autograd."""

    def init_state(self, batch: int, mode: str | None = None, *, croppable: bool = True) -> State:
        """State of `batch` sequences of which nothing was seen; ValueError for a mode that the operator lacks."""

    def extend(self, x_BLD: Tensor, state: Any, mask_BL: Tensor | None = None) -> tuple[Tensor, State]:
        """Outputs of n >= 1 new positions after those in `state`, and the state, changed in place."""

    def initialise(self, attention: AttentionWeights | None, generator: torch.Generator) -> None:
        """Set every parameter, as the configuration's `init` says. ValueError if that is impossible."""


def _hyena(config: HyenaConfig, d_model: int, max_length: int, inner: int | None = None) -> nn.Module:
    heads = HeadHyena if config.window is None else WindowedHeads
    kind = ChannelHyena if config.heads is None else heads
    return kind(config, d_model, max_length, inner)


OPERATORS: dict[str, Callable[..., nn.Module]] = {"hyena": _hyena, "window": WindowAttention, "skip": Skip}


def build(config: OperatorConfig, d_model: int, max_length: int, inner: int | None = None) -> nn.Module:
    """Build the operator that `config` describes; call its `initialise` before use.

    Args:
        config: a member of `OperatorConfig`.
        d_model: width of the model.
        max_length: longest sequence, prompt and generated tokens together.
        inner: width between the projections, of an attention its heads times the width of a value; None for `d_model`.

    Returns:
        A module with the interface of `Operator`.

    Raises:
        ValueError: the configuration does not fit `inner`.
    """
    return OPERATORS[config.kind](config, d_model, max_length, inner)
