"""The tables of keys in docs/study-files.md, whose keys, defaults and rules are those of the schema.

`python -m tests.study.keys --write` writes them. What a key means and its example are the page's own: they are read
from it and kept. `test_study_files.py` fails where page and schema differ.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from orchestrator.study.placing import UNWRITTEN
from orchestrator.study.schema import Study

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study-files.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
HEAD = "| key | default | rule | what it is | example |\n|---|---|---|---|---|\n"
ROW = re.compile(r"^\| `([\w.]+)` \| .*? \| .*? \| (.*) \| (.*) \|$")
Texts = dict[tuple[str, str], tuple[str, str]]  # heading and key -> what it is, and an example


@dataclasses.dataclass(frozen=True)
class Section:
    """A mapping of a study file: where it stands, which of several it is, and its model."""

    path: str
    tag: str  # `kind: hyena` where several kinds can stand there
    model: Any

    @property
    def heading(self) -> str:
        return f"`{self.path}`{f' of `{self.tag}`' if self.tag else ''}" if self.path else "The file itself"


def sections() -> list[Section]:
    """Every mapping of a study file once, at the first place where it can stand."""
    found: dict[Any, Section] = {}

    def walk(path: str, model: Any, tag: str) -> None:
        if model in found or path.startswith("teacher.optimizer"):  # told at recipe.optimizer
            return
        found[model] = Section(path, tag, model)
        for name, annotation in keys_of(model).items():
            members = _models(annotation)
            several = len(members) > 1
            for member, place in members.items():
                walk(
                    f"{path}.{name}{place}".lstrip(".").replace(".0.KEY", ".KEY"),
                    member,
                    _tag(member) if several else "",
                )

    walk("", Study, "")
    return list(found.values())


def tables(texts: Texts) -> str:
    """All sections with their tables."""
    every = sections()
    known = {section.model: section for section in every}
    parts = []
    for section in every:
        rows = [_row(section, name, known, texts) for name in keys_of(section.model)]
        parts.append(f"### {section.heading}\n\n{HEAD}{''.join(rows)}")
    return "\n".join(parts)


def read_texts(page: str) -> Texts:
    """What the page says of each key."""
    texts: Texts = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("### "):
            heading = line.removeprefix("### ")
        elif (row := ROW.match(line)) is not None:
            texts[heading, row[1]] = row[2].strip(), row[3].strip()
    return texts


def with_tables(page: str) -> str:
    """The page with the tables that the schema gives."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(read_texts(page))}\n{END}{after}"


def _row(section: Section, name: str, known: dict[Any, Section], texts: Texts) -> str:
    what, example = texts.get((section.heading, name), ("", ""))
    return (
        f"| `{name}` | {_default(section.model, name)} | {_rule(section.model, name, known)} | {what} | {example} |\n"
    )


def keys_of(model: Any) -> dict[str, Any]:
    """The keys of a mapping with the types of their values."""
    if issubclass(model, BaseModel):
        written = {name: field for name, field in model.model_fields.items() if field.default != UNWRITTEN}
        return {name: field.annotation for name, field in written.items()}
    hints = typing.get_type_hints(model)
    return {field.name: hints[field.name] for field in dataclasses.fields(model)}


def _models(annotation: Any) -> dict[Any, str]:
    """The mappings that a value may be -> `.0` where they are in a list."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return {annotation: ""}
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _models(inner[0])
    if origin in (typing.Union, types.UnionType):
        return {model: place for one in inner for model, place in _models(one).items()}
    if origin is tuple:
        return {model: f".0{place}" for one in inner if one is not ... for model, place in _models(one).items()}
    if origin is dict:
        return {model: f".KEY{place}" for model, place in _models(inner[1]).items()}
    return {}


def _tag(model: Any) -> str:
    for name in ("kind", "source"):
        if name in keys_of(model):
            return f"{name}: {', '.join(typing.get_args(keys_of(model)[name]))}"
    return ""


def _default(model: Any, name: str) -> str:
    schema = TypeAdapter(model).json_schema()
    if name in schema.get("required", ()):
        return "must be given"
    if issubclass(model, BaseModel):
        value = model.model_fields[name].get_default(call_default_factory=True)
    else:
        value = getattr(model(), name)
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        told = _differing(value)
        return f"`{told}`" if told != "{}" else "its defaults"
    return f"`{json.dumps(value)}`" if value is not None else "none"


def _differing(value: Any) -> str:
    """A mapping as a user writes it, without what is as its model has it."""
    plain = TypeAdapter(type(value)).dump_python(value, mode="json")
    if isinstance(value, BaseModel):
        fields = {key: field for key, field in type(value).model_fields.items() if not field.is_required()}
        bare = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
        plain = {key: plain[key] for key in plain if key in ("kind", "source") or getattr(value, key) != bare.get(key)}
    else:
        bare = dataclasses.asdict(type(value)())
        plain = {key: item for key, item in plain.items() if key == "kind" or item != bare[key]}
    told = (f"{key}: {item if isinstance(item, str) else json.dumps(item)}" for key, item in plain.items())
    return f"{{{', '.join(told)}}}"


def _number(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 2**62 else f"{value:g}"


def _rule(model: Any, name: str, known: dict[Any, Section]) -> str:
    schema = TypeAdapter(model).json_schema()
    by_name = {made.__name__: section for made, section in known.items()}
    return _said(schema["properties"][name], by_name)


def _said(schema: dict[str, Any], known: dict[str, Section]) -> str:
    if "$ref" in schema:
        return f"mapping: `{known[schema['$ref'].rsplit('/', 1)[-1]].path}`"
    if several := schema.get("anyOf") or schema.get("oneOf"):
        told = list(dict.fromkeys(_said(one, known) for one in several))
        return ", or ".join(sorted(told, key=lambda one: not one.startswith("mapping")))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case "string":
            return f"text like `{schema['pattern']}`" if "pattern" in schema else "text"
        case "integer" | "number" as kind:
            bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            limits = " and ".join(
                f"{sign} {_number(schema[bound])}" for bound, sign in bounds.items() if bound in schema
            )
            return f"{'whole number' if kind == 'integer' else 'number'} {limits}".strip()
        case "array":
            if "prefixItems" in schema:
                return f"list of {len(schema['prefixItems'])}: {_said(schema['prefixItems'][0], known)}"
            least = f", at least {('one', 'two')[schema['minItems'] - 1]}" if schema.get("minItems") else ""
            inner = _said(schema["items"], known) if schema.get("items") else "any value"
            return f"list: {_one(inner)}{least}"
        case "object":
            if "patternProperties" in schema:
                (inner,) = schema["patternProperties"].values()
                least = ", at least one" if schema.get("minProperties") else ""
                return f"mapping from layers to {_one(_said(inner, known))}{least}"
            return f"mapping from keys of the study to {_one(_said(schema['additionalProperties'], known))}"
    return "any value"


def _one(rule: str) -> str:
    return f"({rule})" if ", or " in rule else rule


if __name__ == "__main__":
    text = with_tables(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
