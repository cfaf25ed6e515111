"""What the cost of a stage depends on, and what the finished stages of a store took.

Place in the flow: `estimate` asks here. Invariant: a field of a specification tells sorts apart unless it is named as
one that costs nothing, so what comes later is never taken for what was measured before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.files import canonical_json
from orchestrator.run.store import Store, tree_bytes
from orchestrator.study.spec import spec_from_json
from orchestrator.study.stages import stretches_of

# Fields that say which stage it is, and not what a token of its training or a measurement costs.
COSTLESS = {
    "version", "tokens", "parent", "subject", "reference", "layers", "new_layers", "first_sequence", "text_windows",
    "token_budget", "seed", "architecture", "teacher", "prepared", "candidates", "blend",
}  # fmt: skip
TRAINING = ("teacher", "distil", "scratch")


@dataclasses.dataclass(frozen=True)
class Sort:
    """Stages of one sort cost alike: as much for each token, or each measurement."""

    kind: str  # `skip` for a swap that trains nothing
    model: str  # its teacher's architecture or fingerprint; of text, what is read
    like: str  # all that decides the cost, the model among it
    work: float = 1.0  # what the seconds of a measurement grow with

    @property
    def way(self) -> str:
        """What can stand in for each other, if roughly: all training together, else the kind."""
        return "training" if self.kind in TRAINING else self.kind


@dataclasses.dataclass(frozen=True)
class Took:
    """What a finished stage took."""

    sort: Sort
    machine: str | None  # none: not known, as of several processes on GPUs
    parameters: float | None  # of its model
    rate: float | None  # tokens a second of its training
    beside: float | None  # seconds beside the training; none where a resumed stage timed its last attempt only
    megabytes: float


def sort_of(spec: Any, specs: Mapping[str, Any]) -> Sort:
    """The sort of a stage; `specs` has the stages that it refers to, by their keys."""
    value = {name: field for name, field in spec.model_dump(mode="json").items() if name not in COSTLESS}
    kind, model = spec.kind, _model(spec, specs)
    if kind == "distil":
        kind = kind if spec.phases else "skip"
        value["phases"] = [how for how, _ in stretches_of(spec)]
    if "optimizer" in value:
        rates = spec.optimizer
        value["optimizer"] = [rates.method, rates.rest_scale > 0, rates.average is not None]
    value |= {"operator": _operator(spec, specs), "model": model}
    return Sort(kind, model, canonical_json(value), _work(spec))


def _model(spec: Any, specs: Mapping[str, Any]) -> str:
    """The teacher of a stage by its architecture or fingerprint, or by its key where that is all there is; its text for
    one that has no model."""
    if spec.kind == "tokens":
        return canonical_json(spec.model_dump(mode="json", include={"train", "validation"}))
    key = getattr(spec, "teacher", None)
    teacher: Any = spec if key is None else specs.get(key)
    if hasattr(teacher, "architecture"):
        return canonical_json(teacher.architecture.model_dump(mode="json"))
    return str(getattr(teacher, "fingerprint", key))


def _operator(spec: Any, specs: Mapping[str, Any]) -> Any:
    """The operator of a stage or of the stage that it measures, however its weights began; none of a teacher."""
    key = getattr(spec, "subject", None)
    holder = spec if key is None else specs.get(key)
    if holder is None:
        return key
    return _without_init(holder.model_dump(mode="json").get("operator", {}))


def _without_init(operator: Any) -> Any:
    if not isinstance(operator, dict):
        return operator
    return {name: _without_init(field) for name, field in operator.items() if name != "init"}


def _work(spec: Any) -> float:
    match spec.kind:
        case "evaluate":
            return float(spec.evaluation.tokens)
        case "score":
            return float(spec.text)
        case "probes":
            return float(spec.windows * max(spec.lengths))
        case "throughput":
            return float(spec.throughput.repeats * sum(spec.throughput.lengths))
    return 1.0


def measured(store: Store, specs: Mapping[str, Any]) -> Iterator[Took]:
    """All that the store's finished stages took; `specs` has stages that they may refer to, beside the store's own.

    What is damaged, or of a version that this one cannot read, is left out.
    """
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for key in store.all_keys():
        with contextlib.suppress(OSError, ValueError):
            done = store.done(key)
            found[key] = spec_from_json((store.folder(key) / "spec.json").read_text(encoding="utf-8")), done
    every = {**specs, **{key: spec for key, (spec, _) in found.items()}}
    for key, (spec, done) in found.items():
        result = done["result"]
        _, teacher = found.get(getattr(spec, "teacher", None) or "", (None, {"result": {}}))
        rate = result.get("tokens_per_s")
        beside = None if result.get("resumed_at") else max(0.0, done["seconds"] - (result["seconds"] if rate else 0.0))
        parameters = result.get("parameters") or teacher["result"].get("parameters")
        size = tree_bytes(store.folder(key)) / 2**20
        yield Took(sort_of(spec, every), done.get("machine"), parameters, rate, beside, size)
