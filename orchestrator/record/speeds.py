"""Speeds of architectures, measured once or more: which measurements the store has, and what they say together.

Place in the flow: records tell speeds from here, `layerswap measure` asks for the next measurement, gc keeps all of
them with their first. Invariant: the store is read, nothing else.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orchestrator.distill.measuring.intervals import median_interval
from orchestrator.run.store import Store
from orchestrator.study.spec import ThroughputSpec, spec_from_json

Speed = dict[str, Any]  # the result of a measurement without its turns, and of several how many: `measurements`


def measurements(store: Store, spec: ThroughputSpec) -> list[ThroughputSpec]:
    """The finished measurements of an architecture, in their order."""
    found: list[ThroughputSpec] = []
    while store.finished((following := spec.changed(again=len(found))).key):
        found.append(following)
    return found


def speed_of(store: Store, spec: ThroughputSpec) -> Speed:
    """What all measurements of an architecture say together; empty before the first."""
    return together([store.result(each.key) for each in measurements(store, spec)])


def together(results: Sequence[Mapping[str, Any]]) -> Speed:
    """One result of several: of ratios the median over all turns and its interval, of speeds the median.

    A result from before turns were kept counts as one turn.
    """
    if not results:
        return {}
    told = {name: value for name, value in results[0].items() if not name.endswith("_turns")}
    if len(results) == 1:
        return told
    for name in [name for name in told if name.endswith("_tokens_per_s")]:
        told[name] = _by_length([result[name] for result in results], statistics.median)
    for name in [name for name in told if name.endswith("_ratio")]:
        kind = name.removesuffix("_ratio")
        turns = [result.get(f"{kind}_turns") or _by_length([result[name]], list) for result in results]
        told[name] = _by_length(turns, lambda each: statistics.median(turn for some in each for turn in some))
        told[f"{kind}_interval"] = _by_length(turns, lambda each: list(median_interval(each) or ()))
    return {**told, "measurements": len(results)}


def _by_length(values: Sequence[Any], of: Any) -> Any:
    """`of` the values, or by length of those at each length."""
    if not isinstance(values[0], Mapping):
        return of(values)
    return {length: of([value[length] for value in values]) for length in values[0]}


def next_round(store: Store, speeds: Mapping[str, ThroughputSpec]) -> dict[str, ThroughputSpec]:
    """By stage the next measurement of the finished stages' architectures that were measured least often.

    So a round that was interrupted is gone on with, and no architecture is two measurements ahead of another.
    """
    finished = {key: spec for key, spec in speeds.items() if store.finished(key)}
    counts = {spec.key: len(measurements(store, spec)) for spec in finished.values()}
    least = min(counts.values(), default=0)
    return {key: spec.changed(again=least) for key, spec in finished.items() if counts[spec.key] == least}


def measured_again(store: Store, kept: Collection[str]) -> set[str]:
    """Keys of later measurements whose first is `kept`."""
    found = set()
    for key in store.all_keys():
        with contextlib.suppress(OSError, ValueError):
            text = (store.folder(key) / "spec.json").read_text(encoding="utf-8")
            if '"again":' in text and spec_from_json(text).changed(again=0).key in kept:
                found.add(key)
    return found
