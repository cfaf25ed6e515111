"""Filters that are computed once for many evaluations: kept by an operator inside of a `with`, and nowhere else."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self, cast

from torch import nn

from operators.decoding.frozen import Filters


class KeptFilters(nn.Module, ABC):
    """An operator that keeps filters while `frozen_filters` says so."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Filters | None = None

    @abstractmethod
    def freeze(self) -> Filters:
        """The filters as they are now, for whoever asks to keep."""

    def frozen(self) -> Filters:
        """Those of the `frozen_filters` around this call, else new ones."""
        return self.freeze() if self._kept is None else self._kept

    def train(self, mode: bool = True) -> Self:
        """Training ends what `frozen_filters` keeps, and so does every other way of changing weights by a call."""
        self._kept = None if mode else self._kept
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        return cast(Self, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is parameters only."""
        return {**self.__dict__, "_kept": None}


@contextlib.contextmanager
def frozen_filters(model: nn.Module) -> Iterator[None]:
    """Inside, the operators of a model compute their filters once for all evaluation and decoding.

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
            operator._kept = None
