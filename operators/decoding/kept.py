"""What is computed once for many evaluations: kept by an operator inside of a `with`, and nowhere else.

These are its filters, and the weights of its projections in the precision of autocast.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from operators.convolution.projection import plain
from operators.decoding.frozen import Filters


class KeptFilters(nn.Module, ABC):
    """An operator that keeps filters while `frozen_filters` says so."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Filters | None = None
        self._narrow: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def narrow(self, linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of a projection as autocast has them, inside of `frozen_filters`; None where nothing is kept:
        outside, with gradients, without autocast, and where the weights are not all there is to the projection."""
        device = x.device.type
        if self._kept is None or torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return None
        if not plain(linear) or linear.bias is None or x.dtype == torch.float64:
            return None
        dtype, kept = torch.get_autocast_dtype(device), self._narrow.get(linear)
        if kept is None or kept[0].dtype != dtype:
            kept = self._narrow[linear] = (linear.weight.detach().to(dtype), linear.bias.detach().to(dtype))
        return kept

    def _forget(self) -> None:
        self._kept, self._narrow = None, {}

    @abstractmethod
    def freeze(self) -> Filters:
        """The filters as they are now, for whoever asks to keep."""

    def frozen(self) -> Filters:
        """Those of the `frozen_filters` around this call, else new ones."""
        return self.freeze() if self._kept is None else self._kept

    def train(self, mode: bool = True) -> Self:
        """Training ends what `frozen_filters` keeps, and so does every other way of changing weights by a call."""
        if mode:
            self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget()
        return cast(Self, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is parameters only."""
        return {**self.__dict__, "_kept": None, "_narrow": {}}


@contextlib.contextmanager
def frozen_filters(model: nn.Module) -> Iterator[None]:
    """Inside, the operators of a model compute their filters once for all evaluation and decoding, and cast the weights
    of their projections once.

    Weights must not change inside. What changes them by a call of the model (`train`, `load_state_dict`, `to`) ends it
    for the operators concerned; an optimizer's step does not. Outside, and wherever gradients are on, nothing is kept:
    every forward pass and every decoding state computes its own.
    """
    operators = [module for module in model.modules() if isinstance(module, KeptFilters) and module._kept is None]
    for operator in operators:
        operator._kept = operator.freeze()
    try:
        yield
    finally:
        for operator in operators:
            operator._forget()
