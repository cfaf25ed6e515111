"""Which operator stands in which layer: one in all of them, or a default with others in some.

Place in the flow: a study file has one of the two, or candidates that a choice takes from; a stage has the
least that says it of its own layers. Invariant: what a
stage has depends on the operators of its layers alone, however a file writes them, so stages are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from operators.config import HyenaConfig, OperatorConfig, SkipConfig, WindowConfig
from orchestrator.study.values import Model

UNWRITTEN: Final = "per_layer"  # a kind that study files do not write: `default` says it


def _with_kinds(operator: Any) -> Any:
    """A filter is implicit where it names no kind; what has a default is by layer."""
    match operator:
        case {"filter": {"kind": _}}:
            return operator
        case {"filter": dict(values)}:
            return {**operator, "filter": {"kind": "implicit", **values}}
        case {"default": _} | {"layers": _} if "kind" not in operator:
            return {"kind": UNWRITTEN, **operator}
        case _:
            return operator


Operator = Annotated[HyenaConfig | WindowConfig | SkipConfig, Field(discriminator="kind"), BeforeValidator(_with_kinds)]
Layer = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")]  # its number as text


class PerLayer(Model):
    """Operators by layer: `layers` in the layers that they name, `default` in all others."""

    kind: Literal["per_layer"] = UNWRITTEN
    default: Operator
    layers: Annotated[dict[Layer, Operator], Field(min_length=1)]

    def of(self, layer: int) -> OperatorConfig:
        """The operator of a layer."""
        return self.layers.get(str(layer), self.default)

    def __hash__(self) -> int:
        return hash((self.default, frozenset(self.layers.items())))


Placed = Annotated[
    HyenaConfig | WindowConfig | SkipConfig | PerLayer, Field(discriminator="kind"), BeforeValidator(_with_kinds)
]


Candidates = Annotated[tuple[Operator, ...], Field(min_length=2)]  # of which a choice takes one for each layer


def operator_of(placed: OperatorConfig | PerLayer, layer: int) -> OperatorConfig:
    """The operator of a layer."""
    return placed.of(layer) if isinstance(placed, PerLayer) else placed


def by_layer(placed: OperatorConfig | PerLayer, layers: Iterable[int]) -> dict[int, OperatorConfig]:
    """The operators of these layers, in their order."""
    return {layer: operator_of(placed, layer) for layer in layers}


def places_of(placed: OperatorConfig | PerLayer | Candidates) -> dict[tuple[str | int, ...], OperatorConfig]:
    """Every operator by the keys below `operator` that a study has it at."""
    if isinstance(placed, tuple):
        return {(place,): operator for place, operator in enumerate(placed)}
    if not isinstance(placed, PerLayer):
        return {(): placed}
    return {("default",): placed.default, **{("layers", int(layer)): each for layer, each in placed.layers.items()}}


def placing(operators: Mapping[int, OperatorConfig]) -> OperatorConfig | PerLayer:
    """The least that says which operator each of these layers has, at least one: one operator where all have the same,
    else the most frequent one as default, of equally frequent ones that of the lowest layer."""
    ordered = [operators[layer] for layer in sorted(operators)]
    default = max(ordered, key=ordered.count)
    layers = {str(layer): operators[layer] for layer in sorted(operators) if operators[layer] != default}
    return PerLayer(default=default, layers=layers) if layers else default


def placed_in(placed: OperatorConfig | PerLayer, layers: Iterable[int]) -> OperatorConfig | PerLayer:
    """The same of these layers alone; of no layer what it is."""
    operators = by_layer(placed, layers)
    return placing(operators) if operators else placed


def mapped(
    placed: OperatorConfig | PerLayer, change: Callable[[OperatorConfig], OperatorConfig]
) -> OperatorConfig | PerLayer:
    """The same with every operator changed."""
    if not isinstance(placed, PerLayer):
        return change(placed)
    layers = {layer: change(operator) for layer, operator in placed.layers.items()}
    return PerLayer(default=change(placed.default), layers=layers)
