"""What of a study does not fit its teacher or itself, told with its place in the file.

Place in the flow: `plan` asks here before and while it lays out stages. Pure functions; each raises `StudyError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.study.explain import dotted
from orchestrator.study.loader import Document, StudyError
from orchestrator.study.placing import PerLayer, places_of
from orchestrator.study.schema import Study
from orchestrator.study.sources import Resolved

MATRIX_RATE = "recipe.optimizer.matrix_lr"


def check_lengths(document: Document, study: Study, resolved: Resolved) -> None:
    """Of text, prompts, probes and measurements: none is longer than the teacher's positions."""
    longest = resolved.architecture.max_length
    if study.data.sequence_length > longest:
        raise StudyError(
            f"{document.place(('data', 'sequence_length'))}: data.sequence_length: {study.data.sequence_length} "
            f"exceeds the teacher's {longest} positions: lower it, or take a teacher of more"
        )
    prompt, new = min(study.evaluation.prompt_tokens, study.data.sequence_length), study.evaluation.new_tokens
    if study.evaluation.prompts and prompt + new > longest:
        raise StudyError(
            f"{document.place(('evaluation', 'new_tokens'))}: evaluation.new_tokens: {new} after a prompt of {prompt} "
            f"tokens exceeds the teacher's {longest} positions: lower new_tokens or prompt_tokens"
        )
    for length in (study.evaluation.probes and study.evaluation.probes.lengths) or ():
        if length > longest:
            raise StudyError(
                f"{document.place(('evaluation', 'probes', 'lengths'))}: evaluation.probes.lengths: {length} exceeds "
                f"the teacher's {longest} positions: lower it"
            )
    for length in study.throughput.lengths:
        if not study.throughput.decode_tokens < length <= longest:
            raise StudyError(
                f"{document.place(('throughput', 'lengths'))}: throughput.lengths: {length} must exceed decode_tokens "
                f"({study.throughput.decode_tokens}) and be at most the teacher's {longest} positions"
            )


def check_operator(document: Document, point: Study, resolved: Resolved) -> None:
    """Of the operators: their filters' taps and their heads, and the layers that are named."""
    for below, operator in places_of(point.operator).items():
        _check_one(document, ("operator", *below), operator, resolved)
    if isinstance(point.operator, PerLayer):
        for layer in sorted(map(int, point.operator.layers)):
            if said := _never_swapped(layer, point, resolved):
                path = ("operator", "layers", layer)
                raise StudyError(f"{document.place(path)}: {dotted(path)}: {said}")


def _check_one(document: Document, path: tuple[str | int, ...], operator: Any, resolved: Resolved) -> None:
    def wrong(key: str, said: str) -> StudyError:
        place = (*path, *key.split("."))
        return StudyError(f"{document.place(place)}: {dotted(place)}: {said}")

    taps = getattr(getattr(operator, "filter", None), "taps", 0)
    if taps > resolved.architecture.max_length:
        raise wrong(
            "filter.taps", f"{taps} exceeds the teacher's {resolved.architecture.max_length} positions: lower it"
        )
    heads = getattr(operator, "heads", None)
    width = resolved.inner
    if heads is not None and width % heads:
        near = max(number for number in range(1, heads) if width % number == 0)
        raise wrong("heads", f"{heads} must divide the teacher's width {width}: give a divisor, for example {near}")
    own, there = resolved.architecture.heads, getattr(operator, "window", None) is not None
    if there and heads not in (None, own) and getattr(operator, "init", "") == "transfer":
        raise wrong(
            "heads",
            f"{heads} with a window must be the teacher's {own}, whose queries and keys it starts from: give {own}, or "
            "init: random",
        )


def _never_swapped(layer: int, point: Study, resolved: Resolved) -> str:
    """Why no stage swaps a layer that has an operator of its own; empty where one may."""
    layers, schedule = resolved.architecture.layers, point.schedule
    if layer >= layers:
        return f"layer {layer} does not exist: the teacher has {layers} layers, 0 to {layers - 1}"
    if layer not in resolved.sites:
        have = ", ".join(map(str, resolved.sites))
        return f"layer {layer} has no softmax attention: those that have are {have}"
    if layer in schedule.keep:
        return f"layer {layer} stands in schedule.keep and stays attention: take it out of one"
    if isinstance(schedule.layer_order, tuple) and not any(layer in stage for stage in schedule.layer_order):
        return f"layer {layer} is never swapped: add it to schedule.layer_order, or take it out here"
    return ""


def check_swept_rates(document: Document, points: Sequence[tuple[Study, Mapping[str, Any]]]) -> None:
    """Muon's rate is not swept where no point has Muon. `points` are studies and their swept values."""
    swept = [study for study, values in points if MATRIX_RATE in values]
    if swept and all(study.recipe.optimizer.method == "adamw" for study in swept):
        path = next((path for path in document.places if path[-1:] == (MATRIX_RATE,)), ("search", "space", MATRIX_RATE))
        raise StudyError(
            f"{document.place(path)}: {dotted(path)}: changes nothing, for it is Muon's and recipe.optimizer.method is "
            "adamw: sweep recipe.optimizer.lr, or set the method to muon"
        )
