"""The part of a study file that says what is tried: the search, its space, early stopping."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.study.values import Model, Positive

NARROWEST = 1e-9  # width of a range of real numbers, as a share of its bounds: it has as many values as are asked for


class Halving(Model):
    """Early stopping by successive halving (Jamieson and Talwalkar 2016): students that have equally many swapped
    layers after equally many trained tokens are compared, and one of `reduction_factor` goes on."""

    reduction_factor: Annotated[int, Field(ge=2)] = 2
    grace_layers: Positive = 1  # with fewer swapped layers nobody is stopped


class Uniform(Model):
    """A number between two bounds, on a linear or logarithmic scale, or in steps from the lower one.

    Of a key that takes whole numbers both bounds are whole, and both may be drawn.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float | None, Field(gt=0, exclude_if=lambda value: value is None)] = None

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low} must be below high {self.high}, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} must be positive on a logarithmic scale")
        if self.step is not None and self.log:
            raise ValueError(f"step {self.step} has no use on a logarithmic scale: list the values, or leave log out")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step} is wider than the range from {self.low} to {self.high}: narrow it")
        if not self.whole and self.high - self.low < NARROWEST * max(abs(self.low), abs(self.high)):
            raise ValueError(f"low {self.low} and high {self.high} are too near for other numbers between: widen them")
        return self

    @property
    def whole(self) -> bool:
        """Whether both bounds are written as whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Axis = tuple[Any, ...] | Uniform
Space = dict[str, Axis]


class Decode(Model):
    """Objective: decoding speed over the teacher's at one of throughput.lengths."""

    decode: Positive


Objective = Literal["ratio", "decode"] | Decode  # perplexity over the teacher's; decoding speed at the longest length


class Learning(Model):
    """How a search learns from its trials: Optuna's samplers."""

    # TPE (Bergstra et al. 2011), NSGA-II for two objectives (Deb et al. 2002), quasi-Monte Carlo, which learns nothing
    sampler: Literal["tpe", "nsga2", "qmc"] = "tpe"
    # What a trial's last student is judged by; of two, none is put before the other.
    objective: Objective | Annotated[tuple[Objective, ...], Field(min_length=1, max_length=2)] = "ratio"
    batch: Positive = 2  # points drawn at a time: the next are drawn when all of these are done

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One or two, whichever way they were written."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)


class Search(Model):
    """Which values are tried. `space` maps study keys to choices; a list of such mappings is their union."""

    method: Literal["grid", "random", "optuna"] = "grid"
    space: Space | tuple[Space, ...] = Field(default_factory=dict)
    trials: Positive | None = None  # random, optuna: how many
    optuna: Annotated[Learning | None, Field(exclude_if=lambda value: value is None)] = None
    early_stopping: Halving | None = None

    @property
    def learning(self) -> Learning:
        """The settings of a search that learns."""
        return self.optuna or Learning()

    @property
    def spaces(self) -> tuple[Space, ...]:
        """The mappings, whichever way they were written."""
        return self.space if isinstance(self.space, tuple) else (self.space,)

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.method != "grid" and self.trials is None:
            raise ValueError(f"{self.method} search needs trials: how many points to draw")
        if self.method == "grid" and self.trials is not None:
            raise ValueError(f"trials={self.trials} belongs to random search: a grid runs every point")
        if self.method != "optuna" and self.optuna is not None:
            raise ValueError(f"optuna belongs to method optuna, and method is {self.method}: change one of them")
        if self.method == "optuna" and self.early_stopping is not None:
            raise ValueError("early_stopping compares all trials at once, and optuna draws them in turn: take one out")
        for space in self.spaces:
            for key, axis in space.items():
                if isinstance(axis, Uniform) and self.method == "grid":
                    raise ValueError(f"{key} is a range: a grid needs a list of values")
                if isinstance(axis, tuple) and not axis:
                    raise ValueError(f"{key} has no value: list at least one")
        return self
