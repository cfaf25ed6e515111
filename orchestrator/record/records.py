"""Plan + store -> records: one row for the teacher, each control and each finished stage of each trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

from orchestrator.record.groups import OWN, ratio_of, students
from orchestrator.record.groups import Record as Record
from orchestrator.record.probe_results import probe_result
from orchestrator.record.speeds import speed_of
from orchestrator.record.task_results import task_results
from orchestrator.run.store import Store
from orchestrator.study.explain import dotted
from orchestrator.study.names import operator_name, schedule_name
from orchestrator.study.placing import places_of
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step


def make_records(
    plan: Plan,
    store: Store,
    speeds: dict[str, ThroughputSpec],
    trained: Collection[str] = (),
    run_id: Callable[[Step], str | None] = lambda _: None,
) -> list[Record]:
    """The rows of every finished step; `trained` holds the keys that its runs trained themselves.

    A metric that was not measured has no entry; nothing is filled in. `tasks` has what students were asked beside it,
    `probes` what perplexity hides.
    """
    asked = task_results(store)

    def record(kind: str, name: str, step: Step, **more: Any) -> Iterator[Record]:
        if not store.finished(step.train.key) or not store.finished(step.evaluate.key):
            return
        trained_result, quality = store.result(step.train.key), store.result(step.evaluate.key)
        metrics = {**quality, "student_tokens": step.tokens, "parameters": quality["parameters"]}
        speed = speeds.get(step.train.key)
        if speed is not None:
            metrics |= speed_of(store, speed)
        if trained_result.get("tokens_per_s"):
            metrics["stage_tokens_per_s"] = trained_result["tokens_per_s"]
            metrics["stage_seconds"] = trained_result["seconds"]
        operator = step.operator
        yield {
            "kind": kind,
            "name": name,
            "trial": None,
            "group": None,
            "seed": None,
            "stage_index": None,
            "stage_count": None,
            "operator": None if operator is None else operator_name(operator),
            "swapped_layers": list(step.swapped),
            "total_layers": plan.total_layers,
            "values": {},
            "words": "",
            "stage_key": step.train.key,
            "run_id": run_id(step),
            "reused": step.train.key not in trained,
            "metrics": metrics,
            "tasks": asked.get(step.train.key, {}),
            "probes": probe_result(store, step),
            **more,
        }

    words, groups = trial_words(plan), seed_groups(plan)
    rows = [*record("teacher", "teacher", plan.teacher)]
    if rows:
        rows[0]["metrics"]["teacher_tokens"] = getattr(plan.teacher.train, "token_budget", None)
    for name, step in plan.controls.items():
        rows += record("control", name, step)
    for trial in plan.trials:
        for index, step in enumerate(trial.steps):
            place = {"trial": trial.name, "stage_index": index, "stage_count": len(trial.steps)}
            place |= {"values": trial.values, "words": words[trial.name]}
            place |= {"group": groups[trial.name], "seed": trial.study.seed}
            label = "joint" if step.joint else f"stage {index + 1}"
            rows += record("stage", f"{trial.name} {label}", step, joint=step.joint, **place)
    return rows


def seed_groups(plan: Plan) -> dict[str, str]:
    """By trial the first one that is the same but for its seed."""
    first: dict[str, str] = {}
    found = {}
    for trial in plan.trials:
        same = trial.study.model_copy(update={"seed": 0}).model_dump_json()
        found[trial.name] = first.setdefault(same, trial.name)
    return found


def best_path(records: list[Record]) -> list[Record]:
    """The stages of the trials that swap most layers at the lowest mean perplexity ratio; none before one ends."""
    rows = students(records)
    last = [row for row in rows if row["stage_index"] == row["stage_count"] - 1]
    if not last:
        return []
    best = min(last, key=_most_layers_first)
    return [row for row in rows if row["group"] == best["group"]]


def ends(records: list[Record]) -> list[Record]:
    """The last finished stage of every student, most swapped layers and lowest mean perplexity ratio first."""
    last = {row["group"]: row for row in sorted(students(records), key=lambda row: row["stage_index"])}
    return sorted(last.values(), key=_most_layers_first)


def _most_layers_first(row: Record) -> tuple[int, float]:
    return -len(row["swapped_layers"]), ratio_of(row)


def pareto_front(records: list[Record], speed: str, length: str) -> list[Record]:
    """Students that no other student beats in both mean quality and speed, slowest first."""
    measured = [row for row in students(records) if length in row["metrics"].get(speed, {})]
    front: list[Record] = []
    for row in sorted(measured, key=lambda row: (-row["metrics"][speed][length], ratio_of(row))):
        if not front or ratio_of(row) < ratio_of(front[-1]):
            front.append(row)
    return front[::-1]


def trial_words(plan: Plan) -> dict[str, str]:
    """By trial its point of the search space in a few words: `losses=kl:1.0,ce:0.5`.

    An operator is told by its name and, where others of that name are tried, by the values in which these differ.
    """
    alike: dict[str, list[dict[str, Any]]] = {}
    for trial in plan.trials:
        operator = trial.study.operator
        alike.setdefault(operator_name(operator), []).append(_values(operator))

    def words(trial: Trial, key: str, value: Any) -> str:
        if key in ("schedule", "schedule.choice"):
            return f"schedule={schedule_name(trial.study.schedule).replace(' ', '_')}"
        if key != "operator":
            return f"{key.split('.')[-1]}={_short(value)}"
        name = operator_name(trial.study.operator)
        own = {leaf: _short(said) for leaf, said in leaves(value).items() if not _agree(alike[name], leaf)}
        return f"operator={name}" + (f"({','.join(f'{leaf}:{said}' for leaf, said in own.items())})" if own else "")

    return {
        trial.name: " ".join(words(trial, key, value) for key, value in trial.values.items()) or OWN
        for trial in plan.trials
    }


def leaves(value: Any) -> dict[str, Any]:
    """The values in nested mappings, and in lists of mappings, by dotted keys."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    found: dict[str, Any] = {}
    for key, inner in (value if isinstance(value, dict) else {}).items():
        found |= {f"{key}.{leaf}": last for leaf, last in leaves(inner).items()} or {str(key): inner}
    return found


def _values(placed: Any) -> dict[str, Any]:
    """All that an operator is, by dotted keys as a study has them."""
    found: dict[str, Any] = {}
    for place, operator in places_of(placed).items():
        found |= {dotted((*place, leaf)): value for leaf, value in leaves(dataclasses.asdict(operator)).items()}
    return found


def _agree(points: list[dict[str, Any]], leaf: str) -> bool:
    return all(leaf in point and point[leaf] == points[0].get(leaf) for point in points)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_short(inner)}" for key, inner in value.items() if key != "kind")
    if isinstance(value, list | tuple):
        return "[" + ",".join(_short(inner) for inner in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
