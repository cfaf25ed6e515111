"""Which layers are swapped in which stage."""

from __future__ import annotations

from orchestrator.study.choosing import Kept
from orchestrator.study.loader import StudyError
from orchestrator.study.schema import Study


def swap_order(study: Study, layers: int, sites: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The layers swapped in each stage, in order, out of the `sites`: the teacher's layers that have attention.

    Raises `StudyError` for layers that the teacher does not have, or that have no attention.
    """
    free, schedule = free_layers(study, layers, sites), study.schedule
    if isinstance(schedule.layer_order, tuple):
        return [tuple(sorted(stage)) for stage in schedule.layer_order]
    if schedule.layer_order == "top_down":
        free.reverse()
    elif schedule.layer_order == "interleaved":
        free = free[::2] + free[1::2]
    size = schedule.layers_per_stage
    return [tuple(sorted(free[start : start + size])) for start in range(0, len(free), size)]


def free_layers(study: Study, layers: int, sites: tuple[int, ...]) -> list[int]:
    """The layers that may be swapped, the lowest first or as a choice lists them.

    Raises `StudyError` where what is named does not fit.
    """
    schedule = study.schedule
    elsewhere = None if schedule.choice is None else schedule.choice.layers
    named = [("keep", layer) for layer in schedule.keep]
    if isinstance(schedule.layer_order, tuple):
        named += [("layer_order", layer) for stage in schedule.layer_order for layer in stage]
    if isinstance(elsewhere, tuple):
        named += [("choice.layers", layer) for layer in elsewhere]
    elif elsewhere is not None:
        named += [("choice.layers.keep", layer) for layer in elsewhere.keep]
    for key, layer in named:
        if layer >= layers:
            raise StudyError(
                f"schedule.{key}: layer {layer} does not exist: the teacher has {layers} layers, 0 to {layers - 1}"
            )
        if key in ("layer_order", "choice.layers") and layer not in sites:
            have = ", ".join(map(str, sites))
            raise StudyError(f"schedule.{key}: layer {layer} has no softmax attention: those that have are {have}")
    kept = {*schedule.keep, *(elsewhere.keep if isinstance(elsewhere, Kept) else ())}
    free = [layer for layer in (elsewhere if isinstance(elsewhere, tuple) else sites) if layer not in kept]
    if not free:
        raise StudyError("schedule.keep: every layer is kept as attention: leave at least one to swap")
    return free
