"""Points of a search space to try next: Optuna draws them, and its own storage goes from one draw to the next.

Invariant: a draw is a function of what all trials before came to; no point is drawn twice.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.distill.context import Workplace
from orchestrator.files import read_json, write_json
from orchestrator.study.search import drawn_at_random
from orchestrator.study.space import Space, Uniform
from orchestrator.study.spec import DrawSpec

STORAGE, POINTS = "optuna.log", "points.json"
STARTUP = 4  # points that a sampler which learns draws without having learned
TRIES = 32  # at a point that was not drawn before, after which one is drawn at random
LACKS = "search.method optuna needs a package that is not here: install layerswap with the extra optuna"


def draw(spec: DrawSpec, place: Workplace) -> dict[str, Any]:
    """Tell Optuna what the trials of the draw before came to, and ask for `spec.count` points more.

    Returns:
        points: by study key the values of each; fewer than asked for where the space has no more.

    Raises:
        ValueError: Optuna is not installed.
    """
    optuna = _optuna()
    log = place.out / STORAGE
    before: list[dict[str, Any]] = []
    if spec.previous is not None:
        shutil.copy(place.inputs["previous"] / STORAGE, log)
        before = read_json(place.inputs["previous"] / POINTS)
    backend = optuna.storages.journal.JournalFileBackend(str(log))
    with warnings.catch_warnings():  # that some options may change with Optuna's version
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _sampler(optuna, spec, len(before))
        storage = optuna.storages.JournalStorage(backend)
    search = optuna.create_study(
        storage=storage, sampler=sampler, study_name="search", directions=list(spec.directions), load_if_exists=True
    )
    last = before[len(before) - len(spec.told) :]
    for point, values in zip(last, spec.told, strict=True):
        search.tell(point["number"], list(values))
    spaces = tuple({key: _axis(axis) for key, axis in space.items()} for space in spec.spaces)
    drawn = list(before)
    for _ in range(spec.count):
        found = _ask(search, spaces, spec, drawn)
        if found is None:
            break
        drawn.append(found)
    write_json(place.out / POINTS, drawn)
    return {"points": [point["values"] for point in drawn[len(before) :]]}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError(LACKS) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _sampler(optuna: Any, spec: DrawSpec, drawn: int) -> Any:
    seed = random.Random(f"{spec.seed} {drawn}").randrange(2**32)  # another one for every draw, the same whenever
    match spec.sampler:
        case "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=2 * STARTUP, seed=seed)
        case "qmc":  # the same sequence whenever, of which each draw takes the next
            return optuna.samplers.QMCSampler(scramble=True, seed=spec.seed)
    return optuna.samplers.TPESampler(
        n_startup_trials=STARTUP, multivariate=True, group=True, constant_liar=True, seed=seed
    )


def _axis(axis: Any) -> Any:
    return Uniform.model_validate(axis) if isinstance(axis, dict) else tuple(axis)


def _ask(search: Any, spaces: tuple[Space, ...], spec: DrawSpec, drawn: Sequence[dict[str, Any]]) -> Any:
    """A point that was not drawn before, with the number of its trial; None where there is none."""
    known = {_text(point["values"]) for point in drawn}
    for _ in range(TRIES):
        trial = search.ask()
        values = _suggested(trial, spaces, spec.whole)
        if _text(values) not in known:
            return {"number": trial.number, "values": values}
        search.tell(trial, state=_failed())  # it has nothing to say
    for values in _unseen(spaces, spec, known):
        search.enqueue_trial(_parameters(values, spaces))
        trial = search.ask()
        return {"number": trial.number, "values": _suggested(trial, spaces, spec.whole)}
    return None


def _unseen(spaces: tuple[Space, ...], spec: DrawSpec, known: set[str]) -> Iterator[dict[str, Any]]:
    generator = random.Random(f"{spec.seed} {len(known)}")
    return (values for values in drawn_at_random(spaces, generator) if _text(values) not in known)


def _suggested(trial: Any, spaces: tuple[Space, ...], whole: tuple[str, ...]) -> dict[str, Any]:
    """What a trial of Optuna's has at every axis of one of the spaces; a list's values by their places."""
    number = trial.suggest_categorical("space", list(range(len(spaces)))) if len(spaces) > 1 else 0
    values: dict[str, Any] = {}
    for key, axis in spaces[number].items():
        name = f"{number} {key}"
        if not isinstance(axis, Uniform):
            values[key] = axis[trial.suggest_categorical(name, list(range(len(axis))))]
        elif key in whole:
            values[key] = trial.suggest_int(name, int(axis.low), int(axis.high), step=axis.step or 1, log=axis.log)
        else:
            values[key] = trial.suggest_float(name, axis.low, axis.high, step=axis.step, log=axis.log)
    return values


def _parameters(values: dict[str, Any], spaces: tuple[Space, ...]) -> dict[str, Any]:
    """The same backwards."""
    for number, space in enumerate(spaces):
        found: dict[str, Any] = {"space": number} if len(spaces) > 1 else {}
        places = {key: [*map(_text, axis)] for key, axis in space.items() if not isinstance(axis, Uniform)}
        if space.keys() == values.keys() and all(_text(values[key]) in there for key, there in places.items()):
            own = {key: places[key].index(_text(value)) if key in places else value for key, value in values.items()}
            return found | {f"{number} {key}": value for key, value in own.items()}
    raise AssertionError("a point of no space")


def _failed() -> Any:
    return _optuna().trial.TrialState.FAIL


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
