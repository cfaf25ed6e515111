"""What is wrong with a study, in the words of the person who wrote it: pydantic's problems as places and plain lines.

Place in the flow: `loader` validates, and asks here how to say what failed. Invariant: one mistake, one line; a line
names the key as the file does, never a type or a union's member.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from orchestrator.study.placing import UNWRITTEN
from orchestrator.study.schema import Study
from orchestrator.study.space import Uniform

Path_ = tuple[str | int, ...]
MOST_SHOWN = 80  # characters of a value
SWEPT = ("operator", "schedule", "recipe", "numerics", "seed")
NUMBER = re.compile(
    r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)


def explain(values: Any, places: Collection[Path_], problems: Sequence[Any]) -> list[tuple[Path_, str]]:
    """One (path, message) a mistake of `values`, whose keys stand at `places`.

    A union reports each of its members: what the member that understood most of the value said counts.
    """
    found: dict[Path_, list[tuple[Any, Any]]] = {}
    for problem in problems:
        path, model = _locate(values, problem["loc"])
        if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            path = (*path, problem["ctx"]["discriminator"].strip("'"))
        elif problem["type"] == "value_error":
            path = _named(places, path, str(problem["ctx"]["error"]))
        found.setdefault(path, []).append((problem, model))
    lines = []
    for path, here in found.items():
        if any(len(path) < len(other) and other[: len(path)] == path for other in found):
            continue
        shapes = [one for one in here if one[0]["type"].endswith("_type") or one[0]["type"] == "literal_error"]
        told = [_message(path, *one) for one in here if one not in shapes]
        if not told:
            given = shapes[0][0]["input"]
            wanted = ", or ".join(dict.fromkeys(_wanted(problem["msg"]) for problem, _ in shapes))
            told = [f"must be {wanted}, got {_shown(given)}{_spelling(wanted, given)}"]
        lines += [(path, said) for said in dict.fromkeys(told)]
    return lines


def axis_remedy(key: str) -> str:
    """What to write for an axis that names nothing that can be swept; empty where it names something."""
    model: Any = Study
    steps = steps_of(key)
    for index, step in enumerate(steps):
        known = _keys(model) if index else list(SWEPT)
        child = _child(model, step) if index or step in known else None
        if child is None:
            before = dotted(steps[:index])
            if not known:
                is_list = typing.get_origin(model) is tuple
                return f"{before} is a list: write {before}.0 for its first" if is_list else f"{before} has no keys"
            full = {name: f"{before}.{name}".lstrip(".") for name in known}
            near = difflib.get_close_matches(str(step), known, n=1)
            return f"did you mean {full[near[0]]}?" if near else f"can be swept: {', '.join(full.values())}"
        model = child
    return ""


def takes(key: str) -> Literal["integer", "real", "other"]:
    """The kind of number that a key of a study takes; `other` where it takes none, or is no key."""
    model: Any = Study
    for step in steps_of(key):
        model = _child(model, step)
    kinds = _members(model)
    return "real" if float in kinds else "integer" if int in kinds else "other"


def range_remedy(key: str, axis: Any) -> str:
    """What to write for a range over a key that cannot take its numbers; empty where it can, or is no range."""
    kind = takes(key)
    if not isinstance(axis, Uniform):
        return ""
    if kind == "other":
        return f"{key} takes no number: list its values"
    if kind == "integer" and not axis.whole:
        return f"{key} takes whole numbers: write both bounds so, not {axis.low} and {axis.high}"
    if kind == "integer" and isinstance(axis.step, float):
        return f"{key} takes whole numbers: write step so, not {axis.step}"
    return ""


def steps_of(key: str) -> list[str | int]:
    """The steps of a dotted key; a number is a position of a list, or a key that is one."""
    return [int(step) if step.isdecimal() else step for step in key.split(".")]


def is_number(key: str) -> bool:
    """Whether a key is a whole number, which is a step of a path as a position of a list is."""
    return re.fullmatch(r"0|[1-9][0-9]{0,8}", key) is not None


def dotted(path: Sequence[str | int]) -> str:
    """A path as the user writes it."""
    return ".".join(str(step) for step in path)


def _message(path: Path_, problem: Any, model: Any) -> str:
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"unknown key; {_nearest(str(path[-1]), _keys(model))}"
        case "missing" | "missing_argument":
            return "this value is missing; add it" if isinstance(path[-1], int) else "this key is missing; add it"
        case "union_tag_not_found":
            return f"this key is missing; add one of {', '.join(_tags(model, path))}"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            return f"unknown {path[-1]} {tag}; {_nearest(tag, _tags(model, path))}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "string_pattern_mismatch":
            return f"must match {problem['ctx']['pattern']}, got {_shown(problem['input'])}"
        case _:
            rule = problem["msg"].split(" should ", 1)[-1].removesuffix(" after validation")
            return f"must {rule}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    """A value as JSON, of a long one its beginning."""
    told = json.dumps(value, default=str)
    return told if len(told) <= MOST_SHOWN else f"{told[:MOST_SHOWN]} ..."


def _wanted(message: str) -> str:
    wanted = message.removeprefix("Input should be ")
    words = {
        "an object": "a mapping of keys",
        "a valid array": "a list",
        "a valid boolean": "true or false",
        "a valid string": "a text",
        "a valid integer": "an integer",
    }
    return words.get(wanted, wanted.replace("a valid ", "a "))


def _spelling(wanted: str, given: Any) -> str:
    if not isinstance(given, str) or not NUMBER.match(given) or not wanted.endswith(("number", "integer")):
        return ""
    return ": write it without quotes"


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(known)}"


def _tags(model: Any, path: Path_) -> list[str]:
    child = _child(model, path[-2])
    members = _members(model if child is None else child)  # a union in a union is located at its inside
    tags = [tag for member in members for tag in typing.get_args(_fields(member).get(str(path[-1])))]
    return [tag for tag in tags if tag != UNWRITTEN]


def _named(places: Collection[Path_], path: Path_, message: str) -> Path_:
    """The path of the key that a rule's message begins with, if the study has it once; else `path`."""
    word = re.match(r"[\w.]*", message)[0]  # type: ignore[index]
    exact = (*path, *steps_of(word))
    below = [known for known in places if known[: len(path)] == path and known[-1:] == (word,)]
    return exact if exact in places else below[0] if len(below) == 1 else path


def _locate(values: Any, loc: Path_) -> tuple[Path_, Any]:
    """The path of a pydantic location in the user's own file, and the model that holds its last key.

    Pydantic puts the names of union members into a location; they are no keys, and select the member to go on with.
    """
    path: list[str | int] = []
    model: Any = Study
    for index, step in enumerate(loc):
        member = _member(model, step)
        if member is not None:
            model = member
        elif has(values, step) or step in _keys(model) or isinstance(step, int):
            path.append(int(step) if isinstance(step, str) and is_number(step) else step)
            if index < len(loc) - 1:
                model, values = _child(model, path[-1]), inside(values, path[-1])
    return tuple(path), model


def has(values: Any, step: str | int) -> bool:
    """Whether plain values have something at a step: a key of a mapping, a position of a list."""
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and str(step) in values


def inside(values: Any, step: str | int) -> Any:
    """What plain values have at a step; None where they have nothing."""
    at: Any = step if isinstance(values, list) else str(step)
    return values[at] if has(values, step) else None


def _fields(model: Any) -> dict[str, Any]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if isinstance(model, type) and dataclasses.is_dataclass(model):
        hints = typing.get_type_hints(model)
        return {field.name: hints[field.name] for field in dataclasses.fields(model)}
    return {}


def _keys(model: Any) -> list[str]:
    return list(_fields(model)) or [key for member in _members(model) for key in _fields(member)]


def _members(model: Any) -> list[Any]:
    if typing.get_origin(model) is typing.Annotated:
        return _members(typing.get_args(model)[0])
    if typing.get_origin(model) in (typing.Union, types.UnionType):
        return [leaf for part in typing.get_args(model) for leaf in _members(part)]
    return [model]


def _child(model: Any, step: str | int) -> Any:
    lists = [member for member in _members(model) if typing.get_origin(member) is tuple]
    if isinstance(step, int) and lists:
        return typing.get_args(lists[0])[0]
    for member in _members(model):
        if isinstance(step, str) and step in _fields(member):
            return _fields(member)[step]
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
    return None


def _member(model: Any, tag: str | int) -> Any:
    members = _members(model)
    for member in members if len(members) > 1 else []:
        names = {getattr(member, "__name__", "")}
        for name in ("kind", "source"):
            annotation = _fields(member).get(name)
            names |= set(typing.get_args(annotation)) if annotation is not None else set()
        if tag in names:
            return member
    return None
