"""Study file and overrides -> `Study`; every error with file, line, column, key, rule and the nearest valid key.

Invariant: nothing is read leniently. YAML is read by the 1.2 core rules (`1e-4` is a number, `no` is a text), a key
that stands twice is an error, and all errors of a file are told at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator.study.explain import (
    NUMBER,
    Path_,
    axis_remedy,
    dotted,
    explain,
    has,
    inside,
    is_number,
    range_remedy,
    steps_of,
)
from orchestrator.study.listed import fill_in
from orchestrator.study.schema import Study

TOO_DEEP = "a value refers to itself or is nested too deeply; write it out"


class StudyError(ValueError):
    """One or more things wrong with a study; its text is one line an error."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A study as plain values, with where each stood: (line, column) by path, or the `--set` that gave it."""

    file: str
    values: dict[str, Any]
    places: Mapping[Path_, str]

    def place(self, path: Path_) -> str:
        """`file:line:column` of the nearest known key on the way to `path`."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return f"{self.file}:1:1"


class _Loader(yaml.SafeLoader):
    """PyYAML with the YAML 1.2 core schema's scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared without ClassVar by PyYAML)


MOST_VALUES = 100_000  # of a study whose aliases are written out: a few lines can stand for billions
LONGEST_NUMBER = 30  # digits
_INTEGER = re.compile(r"^[-+]?[0-9][0-9_]*$")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read and validate a study file, with `a.b=1` overrides laid over it.

    Raises `StudyError` naming every mistake: `file:line:column: key: what is wrong; what is allowed`.
    """
    return validate(read_document(path, overrides))


def read_document(path: Path, overrides: tuple[str, ...] = ()) -> Document:
    """The file's plain values and their places; `StudyError` where it is no file, no YAML or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file: name a YAML file, for example studies/layerwise.yaml") from None
    except IsADirectoryError:
        raise StudyError(f"{path}: is a directory: name a YAML file, for example studies/layerwise.yaml") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}): give a file that can be") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: cannot be read as UTF-8 text ({error}): save it as UTF-8") from error
    places: dict[Path_, str] = {}
    errors: list[str] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = _construct(node, (), lambda at: _at(path, at), places, errors) if node is not None else {}
    except yaml.YAMLError as error:
        where = _at(path, getattr(error, "problem_mark", None))
        if isinstance(error, yaml.reader.ReaderError):
            where = f"{path}:{text.count(chr(10), 0, error.position) + 1}:1"
        raise StudyError(f"{where}: not valid YAML: {_said(error)}") from error
    except RecursionError as error:
        raise StudyError(f"{path}:1:1: {TOO_DEEP}") from error
    if not isinstance(values, dict):
        told = "a list" if isinstance(values, list) else "a plain value"
        raise StudyError(f"{path}:1:1: a study is a mapping of keys (study: ..., recipe: ...), got {told}")
    for override in overrides:
        _override(values, places, override, errors)
    for key, said in fill_in(values, path.parent):
        where = Document(str(path), values, places).place(key)
        errors.append(f"{where}: {dotted(key)}: {said}")
    if errors:
        raise StudyError("\n".join(errors))
    return Document(str(path), values, places)


def validate(document: Document) -> Study:
    """The study that plain values describe; `StudyError` with every mistake and its place."""
    try:
        study = Study.model_validate_json(json.dumps(document.values), strict=True)
    except ValidationError as error:
        told = explain(document.values, document.places, error.errors())
        lines = [f"{document.place(path)}: {dotted(path) or 'study'}: {said}" for path, said in told]
        raise StudyError("\n".join(lines)) from None
    lines = []
    for index, space in enumerate(study.search.spaces):
        prefix: Path_ = ("search", "space", index) if isinstance(study.search.space, tuple) else ("search", "space")
        for key, axis in space.items():
            remedy = axis_remedy(key)
            said = f"names no key of the study; {remedy}" if remedy else range_remedy(key, axis)
            lines += [f"{document.place((*prefix, key))}: {dotted((*prefix, key))}: {said}"] if said else []
    if lines:
        raise StudyError("\n".join(lines))
    return study


def with_values(document: Document, values: Mapping[str, Any]) -> tuple[Study, Document]:
    """The study at one point of its search space: `values` laid over the file's, the search itself left out.

    The document beside it says of a swept key where the search lists its value.
    """
    merged = json.loads(json.dumps(document.values))
    merged.pop("search", None)
    places = dict(document.places)
    try:
        for key, value in values.items():
            path = tuple(steps_of(key))
            _move(places, path, _axis_place(document, key, value))
            try:
                _assign(merged, path, value)
            except StudyError as error:
                raise StudyError(f"{places[path]}: {error}") from None
        point = Document(document.file, merged, places)
        return validate(point), point
    except StudyError as error:
        said = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        raise StudyError("\n".join(f"{line} (at the search point {said})" for line in str(error).split("\n"))) from None


def _axis_place(document: Document, key: str, value: Any) -> str:
    """Where the search space lists this value of this axis."""
    for path, place in document.places.items():
        if path[:2] == ("search", "space") and path[-2:-1] == (key,):
            axis: Any = document.values
            for step in path[:-1]:
                axis = axis[step]
            if axis[path[-1]] == value:
                return place
    return document.place(("search", "space", key))


def _at(file: Path, mark: Any) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else f"{file}:1:1"


def _said(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"a character of code {error.character:#x} is not allowed; take it out"
    said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return (", ".join(said) or str(error)) + (": indent with spaces" if "'\\t'" in "".join(said) else "")


def _construct(
    node: yaml.Node, path: Path_, at: Callable[[Any], str], places: dict[Path_, str], errors: list[str]
) -> Any:
    where = at(node.start_mark)
    places.setdefault(path, where)
    if len(places) > MOST_VALUES:
        raise StudyError(f"{where}: more than {MOST_VALUES:,} values, its aliases written out; use fewer of them")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = at(key_node.start_mark)
            if (said := _no_key(key_node)) is not None:
                errors.append(f"{here}: {dotted(path) or 'study'}: {said}")
                continue
            key = str(key_node.value)
            if key in result:
                errors.append(f"{here}: {dotted((*path, key))}: this key stands twice; keep one of them")
            step = int(key) if is_number(key) else key
            places[(*path, step)] = here
            result[key] = _construct(value_node, (*path, step), at, places, errors)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), at, places, errors) for i, item in enumerate(node.value)]
    return _scalar(node, path, where, errors)


def _no_key(node: yaml.Node) -> str | None:
    """What is wrong with the key of a mapping, if anything is."""
    if not isinstance(node, yaml.ScalarNode):
        return (
            "a key must be a plain word, and this one is a mapping or a list: fill in a template such as {{ name }} "
            "before, or put it in quotes"
        )
    if node.value == "<<" and node.style is None:
        return (
            "<< is a key like any other in YAML 1.2, which merges nothing: write the values out, or repeat a whole "
            "value by its alias (key: *name)"
        )
    if node.tag != "tag:yaml.org,2002:str" and not is_number(str(node.value)):
        return f"a key must be a plain word, got {node.value or 'nothing'}"
    return None


def _scalar(node: yaml.Node, path: Path_, where: str, errors: list[str]) -> Any:
    text = str(node.value)
    match node.tag.rsplit(":", 1)[-1]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            if len(text) > LONGEST_NUMBER:
                errors.append(f"{where}: {dotted(path)}: a number of {len(text)} digits is no integer to work with")
                return 0
            return int(text.replace("_", ""))
        case "float":
            number = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                errors.append(f"{where}: {dotted(path)}: {text} is not a finite number; write one")
            return number
        case "str":
            return text
        case _:
            errors.append(f"{where}: {dotted(path)}: YAML tag {node.tag} is not allowed; write a plain value")
            return None


def _override(values: dict[str, Any], places: dict[Path_, str], override: str, errors: list[str]) -> None:
    key, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not key:
        errors.append(f"{where}: an override is written key=value, for example --set seed=1")
        return
    path = _path_of(key, values)
    try:
        node = yaml.compose(text, Loader=_Loader)
        _move(places, path, where)
        value = _construct(node, path, lambda _: where, places, errors) if node is not None else None
    except RecursionError:
        errors.append(f"{where}: {TOO_DEEP}")
        return
    except yaml.YAMLError as error:
        errors.append(f"{where}: the value is not valid YAML: {_said(error)}")
        return
    try:
        _assign(values, path, value)
    except StudyError as error:
        errors.append(f"{where}: {error}")


def _path_of(key: str, values: Any) -> Path_:
    """The path of an override's key. That of an axis of the search has dots of its own, and is one step."""
    steps = tuple(steps_of(key))
    start = 3 if isinstance((*steps, "", "", "")[2], int) else 2  # the spaces may be a list
    if steps[:2] != ("search", "space") or not steps[start:]:
        return steps
    for step in steps[:start]:
        values = inside(values, step)
    whole = dotted(steps[start:])
    for end in range(len(steps), start, -1):
        axis = dotted(steps[start:end])
        within = axis_remedy(whole) or has(inside(values, axis), (*steps, "")[end])
        if has(values, axis) and within:  # something inside of an axis that is there
            return (*steps[:start], axis, *steps[end:])
    return (*steps[:start], whole)


def _move(places: dict[Path_, str], path: Path_, where: str) -> None:
    """From now on `path`, all below it and what has to be made on the way to it stand at `where`."""
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    for end in range(1, len(path) + 1):
        places.setdefault(path[:end], where)


def _assign(values: Any, path: Path_, value: Any) -> None:
    """Set `values[a][b]...`; missing mappings on the way are made, positions of a list must exist."""
    for depth, step in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(values, list):
            if not isinstance(step, int) or step >= len(values):
                there = f"0 to {len(values) - 1}" if values else "none"
                raise StudyError(f"{dotted(path)}: {step} is no position of the list {dotted(path[:depth])}: {there}")
        elif not isinstance(values, dict):
            told = f"{dotted(path[:depth])} is {json.dumps(values)}, which has no keys; give it a mapping as a whole"
            raise StudyError(f"{dotted(path)}: {told}")
        elif not last and values.get(str(step)) is None:
            values[str(step)] = {}
        at: Any = step if isinstance(values, list) else str(step)
        if last:
            values[at] = value
        else:
            values = values[at]


def dump(value: Any) -> Any:
    """Plain JSON values of a model or of a configuration dataclass."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return TypeAdapter(type(value)).dump_python(value, mode="json")
