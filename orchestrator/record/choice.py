"""Which finished student is meant: by its key, by its place in a trial, or as the best in some sense."""

from __future__ import annotations

import math

from orchestrator.record.groups import GIVEN_BACK, Record, ratio_of, students, ties
from orchestrator.record.records import best_path, ends, pareto_front
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.stages import Step

SPEED = "prefill_ratio"  # that of the report's front
SHORTEST_START = 4  # digits of a key; of a trial, fewer are the number of a stage


def exported_stage(
    plan: Plan, store: Store, records: list[Record], trial: str | None, stage: str | None, best: str | None
) -> str:
    """The key of the finished student that `--trial`, `--stage` and `--best` mean, each of which may be None.

    Of trials that differ in their seed alone it is the one whose perplexity ratio is nearest to their mean.
    Raises `ValueError` where none or several fit.
    """
    if stage is None:
        return _chosen(plan, records, trial, best)
    if best is not None:
        raise ValueError(f"--stage {stage} and --best {best} name a student each: give one of the two")
    return _named(plan, store, trial, stage)


def _named(plan: Plan, store: Store, trial: str | None, stage: str) -> str:
    """The key that begins so, or that of the stage of a trial by its number, from 1, or by the word joint."""
    trials = plan.trials if trial is None else (_trial(plan, trial),)
    if trial is not None and (stage == "joint" or (stage.isdecimal() and len(stage) < SHORTEST_START)):
        places = stages_of(trials[0])
        if stage not in places:
            raise ValueError(f"--stage {stage}: {trial} has {stages_text(trials[0])}")
        key = places[stage].train.key
        if not store.finished(key):
            raise ValueError(f"--stage {stage}: this stage of {trial} is not finished yet: run the study first")
        return key
    keys = {step.train.key for each in trials for step in each.steps}
    found = [key for key in keys if key.startswith(stage) and store.finished(key)]
    if len(found) != 1:
        raise ValueError(f"--stage {stage}: {len(found)} finished students begin so; layerswap status lists them")
    return found[0]


def stages_of(trial: Trial) -> dict[str, Step]:
    """The stages of a trial by what names them: a number, from 1, and the word joint."""
    places = {str(index): step for index, step in enumerate(trial.steps, 1)}
    return places | ({"joint": trial.steps[-1]} if trial.steps and trial.steps[-1].joint else {})


def stages_text(trial: Trial) -> str:
    """Which there are, for people."""
    if not trial.steps:
        return "no stages yet: results decide them"
    joint = ", the last of them joint" if trial.steps[-1].joint else ""
    return f"the stages 1 to {len(trial.steps)}{joint}"


def _chosen(plan: Plan, records: list[Record], trial: str | None, best: str | None) -> str:
    """The key of the best of all students, or of the trial's; without `best` that of the end of the best path, or of
    the trial."""
    if trial is not None:
        _trial(plan, trial)
    rows = [row for row in records if row["kind"] == "stage" and trial in (None, row["trial"])]
    length = str(max(plan.study.throughput.lengths))
    if best is None:
        good = [row for row in rows if row["outcome"] != GIVEN_BACK]
        found = good[-1:] if trial is not None else best_path(records)[-1:]
    elif best == "quality":
        found = sorted(students(rows), key=lambda row: (ratio_of(row), -len(row["swapped_layers"])))[:1]
    else:
        front = pareto_front(rows, SPEED, length)
        found = front[-1:] if best == "speed" else knee(front, length)
        if rows and not found:
            raise ValueError(f"--best {best}: no student's speed is measured yet: run the study to its end")
    if not found:
        raise ValueError(f"no student{f' of {trial}' if trial else ''} is finished yet: run the study first")
    return str(found[0]["stage_key"])


def told_apart(records: list[Record], key: str) -> str | None:
    """What to know of a chosen student: others that end with as many layers and cannot be told apart from it."""
    rows = ends(records)
    chosen = next((row for row in rows if row["stage_key"] == key), None)
    if chosen is None:
        return None
    alike = [row for row in rows if len(row["swapped_layers"]) == len(chosen["swapped_layers"])]
    names = [row["label"] for row in ties(chosen, alike, students(records))]
    return f"as good within the noise of seeds: {', '.join(names)}" if names else None


def knee(front: list[Record], length: str) -> list[Record]:
    """The point of a front, slowest first, that is farthest below the straight line between its ends, where the
    picture draws it: speed across, logarithm of the perplexity ratio upwards.

    The slowest, which is the one of best quality, where none is below the line; none of an empty front.
    """
    points = [(row["metrics"][SPEED][length], math.log(ratio_of(row))) for row in front]
    if not points:
        return []
    (x_0, y_0), (x_1, y_1) = points[0], points[-1]
    slope = (y_1 - y_0) / (x_1 - x_0) if x_1 > x_0 else 0.0
    below = [y_0 + slope * (x - x_0) - y for x, y in points[:-1]]
    return [front[max(range(len(below)), key=below.__getitem__)]] if below else front[:1]


def _trial(plan: Plan, name: str) -> Trial:
    found = next((trial for trial in plan.trials if trial.name == name), None)
    if found is None:
        raise ValueError(f"--trial {name}: the study has {plan.trials[0].name} to {plan.trials[-1].name}")
    return found
