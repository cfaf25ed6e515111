"""`layerswap log`: what the processes of stages wrote while they computed, of those that failed or run, or of one.

Invariant: looking changes nothing; a name that means no stage, or several, is an error that says what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.record.choice import SHORTEST_START, stages_of, stages_text
from orchestrator.record.screen.facts import stage_names
from orchestrator.run.log import LOG
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ThroughputSpec, short

SHOWN = 40  # lines of each log where none was asked for by name, the last ones


def log_text(plan: Plan, store: Store, speeds: Mapping[str, ThroughputSpec], stage: str | None) -> str:
    """The logs that are meant, each below a line with the stage's name, its state and the log's path.

    Raises `ValueError` where `stage` names none, several, or one without a log.
    """
    names = stage_names(plan, speeds)
    if stage is None:
        asked = [key for key in names if _unfinished(store, key)]
        told = "\n\n".join(_log(store, key, names[key], SHOWN) for key in asked)
        return told or "no stage has failed or is running; the log of another: layerswap log STUDY STAGE"
    keys = list(_of_trial(plan, stage)) if ":" in stage else [_beginning(store, names, stage)]
    if not any((store.folder(key) / LOG).is_file() for key in keys):
        name = names.get(keys[0], short(keys[0]))
        why = "its files came from elsewhere, or are older than logs" if store.begun(keys[0]) else "it has not begun"
        raise ValueError(f"{stage}: {name} has no log: {why}")
    there = [key for key in keys if (store.folder(key) / LOG).is_file()]
    return "\n\n".join(_log(store, key, names.get(key, short(key))) for key in there)


def _unfinished(store: Store, key: str) -> bool:
    """Whether a stage has failed, runs, or was interrupted."""
    return not store.finished(key) and (store.attempt(key) is not None or store.failure(key) is not None)


def _log(store: Store, key: str, name: str, most: int | None = None) -> str:
    path, failure = store.folder(key) / LOG, store.failure(key)
    state = "finished" if store.finished(key) else f"failed: {failure['error']}" if failure else "begun"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = ["(no log)"]
    cut = [f"[the last {most} of {len(lines)} lines]"] if most is not None and len(lines) > most else []
    shown = lines[-most:] if cut and most is not None else lines
    return "\n".join([f"{name} ({short(key)}), {state}", str(path), *cut, *shown])


def _of_trial(plan: Plan, stage: str) -> Iterator[str]:
    """The keys of a stage of a trial, `trial-03:2` or `trial-03:joint`: of its training, and of what measures it; of a
    choice, `trial-03:choice-1`: of all scores that it rests on, and its own."""
    name, _, number = stage.partition(":")
    trial: Trial | None = next((trial for trial in plan.trials if trial.name == name), None)
    if trial is None:
        there = f"the study has {plan.trials[0].name} to {plan.trials[-1].name}" if plan.trials else "it has no trials"
        raise ValueError(f"{stage}: {name} is no trial: {there}")
    places = stages_of(trial)
    choices = {f"choice-{index}": decision for index, decision in enumerate(trial.path.decisions, 1)}
    if number in choices:
        yield from (spec.key for spec in (*choices[number].needs, choices[number].spec))
        return
    if number not in places:
        chosen = f", and choice-1 to choice-{len(choices)}" if choices else ""
        raise ValueError(f"{stage}: {name} has {stages_text(trial)}{chosen}")
    step = places[number]
    yield step.train.key
    yield step.evaluate.key
    if step.probes is not None:
        yield step.probes.key


def _beginning(store: Store, names: Mapping[str, str], stage: str) -> str:
    """The one key that begins so, of the study, else of the store."""
    if len(stage) < SHORTEST_START:
        raise ValueError(f"{stage}: give at least {SHORTEST_START} digits of a stage key, or trial-03:2")
    found = [key for key in names if key.startswith(stage)]
    found = found or [key for key in store.all_keys() if key.startswith(stage)]
    if len(found) != 1:
        many = f"{len(found)} stages begin" if found else "no stage begins"
        remedy = "give more digits" if found else "layerswap status lists them; of a trial write trial-03:2"
        raise ValueError(f"{stage}: {many} so: {remedy}")
    return found[0]
