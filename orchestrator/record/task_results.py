"""Tasks that students were asked: which stages of the store hold them, and a student's scores beside its teacher's.

Invariant: the store is read, nothing else; a result that is there is told whatever asked for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from orchestrator.distill.measuring.scores import Items, compare, read_items
from orchestrator.run.store import Store
from orchestrator.study.spec import TasksSpec, spec_from_json

Told = dict[str, Any]  # items, limit, rotate, fingerprint, harness, and by metric the numbers of `task_result`
NOT_TAKEN = re.compile(r"[^\w\-./: ]")
NUMBERS = ("value", "stderr", "relative", "relative_stderr", "ratio", "ratio_stderr")


def task_stages(store: Store) -> Iterator[TasksSpec]:
    """The specifications of all tasks in the store, finished or not."""
    for key in store.all_keys():
        with contextlib.suppress(OSError, ValueError):
            text = (store.folder(key) / "spec.json").read_text(encoding="utf-8")
            if '"kind":"tasks"' in text:  # of hundreds of stages only these are read in full
                yield spec_from_json(text)


def tasks_of(store: Store, kept: Collection[str]) -> set[str]:
    """Keys of the stages that asked one of the `kept` stages a task: they are kept with it."""
    return {spec.key for spec in task_stages(store) if spec.subject in kept}


def task_results(store: Store) -> dict[str, dict[str, Told]]:
    """By stage, and by task, what was found; of one task asked in several ways that have one name, the newest.

    What is damaged is left out: `layerswap doctor` names it.
    """
    done: list[tuple[float, str, str, Told]] = []
    for spec in task_stages(store):
        if spec.subject is None or spec.teacher is None or not store.finished(spec.key):
            continue
        beside = None if spec.subject == spec.teacher else spec.of(spec.teacher)
        with contextlib.suppress(OSError, ValueError, KeyError):
            finished, told = store.done(spec.key)["finished"], task_result(store, spec, beside)
            done.append((finished, spec.subject, label(spec), told))
    found: dict[str, dict[str, Told]] = {}
    for _, subject, name, told in sorted(done, key=lambda each: each[:3]):
        found.setdefault(subject, {})[name] = told
    return found


def label(spec: TasksSpec) -> str:
    """A task's name with the way it was asked."""
    first = "" if spec.limit is None else f" first {spec.limit}"
    return f"{spec.task}{first}{' rotated' if spec.rotate else ''}"


def task_result(store: Store, spec: TasksSpec, teacher: TasksSpec | None) -> Told:
    """What a task gave, beside the teacher's where that is given and finished.

    By metric `value`, `stderr`, `chance`, the teacher's `teacher` and `teacher_stderr`, and what `compare` tells.
    """
    result = store.result(spec.key)
    metrics: dict[str, Told] = {name: dict(numbers) for name, numbers in result["metrics"].items()}
    if teacher is not None and store.finished(teacher.key):
        theirs = store.result(teacher.key)["metrics"]
        items = [read_items(store.artefacts(each.key)) for each in (spec, teacher)]
        for name, numbers in metrics.items():
            if name in theirs:
                numbers |= {"teacher": theirs[name]["value"], "teacher_stderr": theirs[name]["stderr"]}
                numbers |= _compared(name, *items)
    return {
        "items": result["items"],
        "limit": spec.limit,
        "rotate": spec.rotate,
        "fingerprint": spec.fingerprint,
        "harness": spec.harness,
        "metrics": metrics,
    }


def _compared(name: str, own: Mapping[str, Items], theirs: Mapping[str, Items]) -> dict[str, Any]:
    return compare(own[name], theirs[name]) if name in own and name in theirs else {}


def task_numbers(tasks: Mapping[str, Told]) -> dict[str, float]:
    """The numbers of a stage's tasks as metrics of a run: `tasks/NAME/METRIC` and, with what they are, `_stderr`,
    `_relative`, `_relative_stderr`, `_ratio`, `_ratio_stderr`; signs that MLflow does not take are dots."""
    return {
        NOT_TAKEN.sub(".", f"tasks/{name}/{metric}") + ("" if kind == "value" else f"_{kind}"): float(numbers[kind])
        for name, told in tasks.items()
        for metric, numbers in told["metrics"].items()
        for kind in NUMBERS
        if numbers.get(kind) is not None
    }
