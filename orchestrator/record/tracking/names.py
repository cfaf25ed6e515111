"""What people see of a study's runs: names that tell what differs, and the values that every trial tells.

Pure functions of the plan. Invariant: no two runs of a study have one name, and trials of one path are one run.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from orchestrator.record.records import leaves
from orchestrator.record.screen.facts import place
from orchestrator.study.explain import steps_of
from orchestrator.study.loader import dump
from orchestrator.study.names import operator_name, schedule_name
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.stages import Step

LONGEST = 160  # letters of a name, before what tells it from another one
Words = dict[str, str]  # swept key -> what a name tells of it


@dataclasses.dataclass(frozen=True)
class Path:
    """The trials of one path of stages: points of the search space that ask for the same."""

    trials: tuple[Trial, ...]
    name: str
    parameters: dict[str, str]  # every swept value of the study, several of one path side by side

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its stages."""
        return self.trials[0].steps

    @property
    def open(self) -> bool:
        """Whether results that are not there yet decide how it goes on."""
        return self.trials[0].open

    @property
    def operator(self) -> str:
        """The short name of its operator."""
        return operator_name(self.trials[0].study.operator)

    @property
    def numbers(self) -> str:
        """The names of its trials, separated by commas."""
        return ",".join(trial.name for trial in self.trials)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of trials, by its place on their paths."""

    name: str
    paths: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The runs of a plan below the study's own."""

    paths: tuple[Path, ...]
    stages: dict[str, Stage]  # by the key of the trained stage
    alone: dict[str, str]  # names of teacher and controls, by the same


def shown(plan: Plan) -> Shown:
    """Group a plan's trials by their paths, and name all runs."""
    groups: dict[str, list[Trial]] = collections.defaultdict(list)
    for trial in plan.trials:
        groups[trial.rule if trial.ruled else trial.steps[-1].train.key].append(trial)
    told = _words(plan)
    words = [_side_by_side([told[trial.name] for trial in trials]) for trials in groups.values()]
    values = _parameters(plan)
    plain = [
        Path(tuple(trials), _name(list(own.values())), _side_by_side([values[trial.name] for trial in trials], " | "))
        for own, trials in zip(words, groups.values(), strict=True)
    ]
    named = _distinct([path.name for path in plain], [path.numbers for path in plain], {plan.study.study})
    paths = tuple(dataclasses.replace(path, name=name) for path, name in zip(plain, named, strict=True))
    alone = {plan.teacher.train.key: "teacher", **{step.train.key: name for name, step in plan.controls.items()}}
    taken = {plan.study.study, *named, *alone.values()}
    return Shown(paths, _stages(paths, words, taken), alone)


def _stages(paths: tuple[Path, ...], words: list[Words], taken: set[str]) -> dict[str, Stage]:
    """Every stage of the paths, told by the words on which all that need it agree, and by its place."""
    users: dict[str, list[int]] = collections.defaultdict(list)
    places: dict[str, str] = {}
    for number, path in enumerate(paths):
        for index, step in enumerate(path.steps):
            key = step.train.key
            users[key].append(number)
            layers = ",".join(map(str, getattr(step.train, "layers", ())))
            at = place(path.trials[0], index)
            places.setdefault(key, f"{at} {'joint ' * step.joint}layers {layers}")
    plain = []
    for key, numbers in users.items():
        first = words[numbers[0]]
        common = [said for word, said in first.items() if all(words[n].get(word) == said for n in numbers)]
        plain.append(_name(common, places[key]))
    named = _distinct(plain, [key[:6] for key in users], taken)
    return {
        key: Stage(name, tuple(paths[number] for number in users[key])) for key, name in zip(users, named, strict=True)
    }


def _words(plan: Plan) -> dict[str, Words]:
    """By trial, what its name tells of the keys that it sets; of all trials the operator where any sets that."""
    operators: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for trial in plan.trials:
        operators[operator_name(trial.study.operator)].append(leaves(dump(trial.study.operator)))
    values = _parameters(plan)
    labels = _labels([leaf for told in values.values() for leaf in told])
    found: dict[str, Words] = {}
    for trial in plan.trials:
        name = operator_name(trial.study.operator)
        words = {"operator": name} if any("operator" in other.values for other in plan.trials) else {}
        for key, value in trial.values.items():
            if key == "operator":
                own = {f"{key}.{leaf}": said for leaf, said in leaves(value).items() if _differs(operators[name], leaf)}
                words[key] = " ".join([name, *(f"{labels[leaf]} {_brief(said)}" for leaf, said in own.items())])
                continue
            if key in ("schedule", "schedule.choice"):
                words[key] = schedule_name(trial.study.schedule)
                continue
            own = leaves({key: value})
            telling = [leaf for leaf in own if len({told[leaf] for told in values.values()}) > 1]
            words[key] = " · ".join(f"{labels[leaf]} {_brief(own[leaf])}" for leaf in telling or own)
        found[trial.name] = words or {"operator": name}
    return found


def _parameters(plan: Plan) -> dict[str, Words]:
    """By trial, its operator and the value of every key that any trial sets; its own study's where it sets none."""
    named = list(dict.fromkeys(leaf for trial in plan.trials for leaf in leaves(trial.values)))
    return {
        trial.name: {
            "operator": operator_name(trial.study.operator),
            **{leaf: str(_at(trial.study, leaf)) for leaf in named},
        }
        for trial in plan.trials
    }


def _at(value: Any, key: str) -> Any:
    """What a study has at a dotted key; None where it has none."""
    for step in steps_of(key):
        if isinstance(value, dict):
            value = value.get(str(step))
        elif isinstance(step, int):
            value = value[step] if isinstance(value, tuple) and step < len(value) else None
        else:
            value = getattr(value, step, None)
    return dump(value)


def _labels(keys: list[str]) -> dict[str, str]:
    """The shortest end of each dotted key that is the end of no other one and begins with a word."""
    ends: dict[str, set[str]] = collections.defaultdict(set)
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            ends[".".join(parts[-length:])].add(key)
    return {
        key: min((end for end in ends if ends[end] == {key} and not end[0].isdecimal()), key=len, default=key)
        for key in dict.fromkeys(keys)
    }


def _differs(operators: list[dict[str, Any]], leaf: str) -> bool:
    return any(operator.get(leaf) != operators[0].get(leaf) for operator in operators)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _side_by_side(several: list[Words], between: str = " or ") -> Words:
    """The same keys with all that is told of each."""
    keys = dict.fromkeys(key for words in several for key in words)
    return {key: between.join(dict.fromkeys(words[key] for words in several if key in words)) for key in keys}


def _name(words: list[str], place: str = "") -> str:
    told = " · ".join(words)
    if len(told) > LONGEST:
        told = f"{told[: LONGEST - 1]}…"
    return " · ".join(filter(None, [told, place]))


def _distinct(names: list[str], marks: list[str], taken: set[str]) -> list[str]:
    """The names, those that stand twice or are taken with a mark of their own behind them."""
    often = collections.Counter(names)
    return [
        f"{name} · {mark}" if often[name] > 1 or name in taken else name
        for name, mark in zip(names, marks, strict=True)
    ]
