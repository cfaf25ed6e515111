"""What stands for a run wherever runs are told: what it is of, how it is called, what is told beside its curves.

Also results as points of curves. Pure but for reading the store. Invariant: a point has the time and the place of the
work that it tells of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.distill.training.journal import read_journal
from orchestrator.record.choices import Chosen
from orchestrator.record.records import leaves
from orchestrator.record.tracking.names import Path, Shown
from orchestrator.run.store import Store
from orchestrator.study.loader import dump
from orchestrator.study.names import operator_name
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step

MARKER = "stage_tokens"  # the last metric of every journal line
SUMMARY = (
    "perplexity",
    "perplexity_ratio",
    "accuracy",
    "agreement",
    "kl",
    "hit_nll",
    "miss_nll",
    "generation_agreement",
    "greedy_generation_perplexity",
    "sampled_generation_perplexity",
)
OUTCOME = "layerswap.outcome"  # tag: what became of a stage
Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step
Result = tuple[str, list[Point]]  # key of the stage that found it, what it found


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run: `identity` says what of, `parent` is the identity of the run that it stands below."""

    identity: str
    name: str
    parent: str | None = None
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    parameters: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


def stage_identity(step: Step) -> str:
    """That of a stage's run."""
    return f"stage:{step.train.key}"


def path_identity(path: Path) -> str:
    """That of the run of trials of one path."""
    first = path.trials[0]
    return f"trial:{first.rule}" if first.ruled else f"trial:{path.steps[-1].train.key}:{len(path.steps)}"


def stage_entry(shown: Shown, step: Step) -> Entry:
    """The run of a stage: below its trial's where one path alone needs it, below the study's otherwise."""
    key, parent = step.train.key, "study"
    tags = {"layerswap.stage": key, "layerswap.layers": ",".join(map(str, step.swapped))}
    stage = shown.stages.get(key)
    if stage is None or key in shown.alone:
        name = shown.alone[key]
        tags["layerswap.role"] = "teacher" if name == "teacher" else "control"
    else:
        name = stage.name
        parent = path_identity(stage.paths[0]) if len(stage.paths) == 1 else parent
        operator = operator_name(step.operator)
        trials = ",".join(path.numbers for path in stage.paths)
        tags |= {"layerswap.role": "stage", "layerswap.operator": operator, "layerswap.trials": trials}
        tags[OUTCOME] = outcome_of(shown, step)
    values = leaves({**step.train.model_dump(mode="json"), "stage_key": key})
    return Entry(stage_identity(step), name, parent, tags, {name: str(dump(value)) for name, value in values.items()})


def path_entry(path: Path, note: str = "") -> Entry:
    """The run of trials of one path."""
    tags = {"layerswap.role": "trial", "layerswap.trial": path.numbers, "layerswap.operator": path.operator}
    return Entry(path_identity(path), path.name, "study", tags, path.parameters, note)


def outcome_of(shown: Shown, step: Step) -> str:
    """What became of a stage; of trials that do not agree on it, all that they say."""
    key = step.train.key
    paths = shown.stages[key].paths if key in shown.stages else ()
    told = [each.outcome for path in paths for each in path.steps if each.train.key == key]
    return ",".join(dict.fromkeys(told or [step.outcome]))


def choice_results(store: Store, chosen: Sequence[Chosen]) -> list[Result]:
    """The scores of the layers that were chosen among, at the number of the decision."""
    found: list[Result] = []
    for each in chosen:
        stamp = int(store.done(each.key)["finished"] * 1000)
        points = [(f"score/layer_{layer}", score, stamp, each.number) for layer, (score, _) in each.scores.items()]
        found.append((each.key, points))
    return found


def choices_json(chosen: Sequence[Chosen]) -> str:
    """The decisions of a path as a file."""
    return json.dumps([dataclasses.asdict(each) for each in chosen], indent=1, sort_keys=True)


def journal_points(store: Store, key: str, after: int) -> Iterator[list[Point]]:
    """The points of each line of a stage's journal past the step `after`."""
    for line in read_journal(store.folder(key), after=after):
        # The marker goes last, so that a batch that was cut is sent again as a whole.
        metrics = [*line["metrics"].items(), (MARKER, line["tokens"])]
        stamp, step = int(line["time"] * 1000), line["step"]
        yield [(name, float(value), stamp, step) for name, value in metrics]


def stage_results(store: Store, step: Step, speed: ThroughputSpec | None, at: int) -> list[Result]:
    """What is finished of a stage's evaluation and its measurement of speed, as points at the step `at`."""
    if not store.finished(step.evaluate.key):
        return []
    keys = [step.evaluate.key, *([] if speed is None or not store.finished(speed.key) else [speed.key])]
    return [_result(store, key, at) for key in keys]


def path_results(store: Store, path: Path, speeds: dict[str, ThroughputSpec]) -> list[Result]:
    """Quality and speed over the tokens of a path, by stage as far as they are finished."""
    found: list[Result] = []
    for step in path.steps:
        results = stage_results(store, step, speeds.get(step.train.key), step.tokens)
        if not results:
            break
        key, points = results[0]
        kept = [point for point in points if point[0] in SUMMARY]
        kept.append(("swapped_layers", float(len(step.swapped)), points[0][2], step.tokens))
        found += [(key, kept), *results[1:]]
    return found


def _result(store: Store, key: str, at: int) -> Result:
    done = store.done(key)
    stamp = int(done["finished"] * 1000)
    return key, [(name, value, stamp, at) for name, value in _numbers(done["result"]).items()]


def _numbers(result: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/length_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found
