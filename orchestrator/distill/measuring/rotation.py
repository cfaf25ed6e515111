"""The options of a multiple-choice task in every order that a rotation gives, so that no place is favoured.

A model that likes "A" best is right wherever A is right. Asked once for every rotation of an item's options it is right
once in as many, like a guess; the item's score is the mean over its rotations.

What can be rotated: records with a list of options (the field that `doc_to_choice` names, else `choices`) and the place
of the right one as an integer (the field that `doc_to_target` names). Where the prompt does not tell the options their
order decides nothing, and an item is asked once.
"""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]


class RotationError(ValueError):
    """A multiple-choice task whose options cannot be rotated; the message goes on after the task's name."""


def rotations(task: Any, documents: list[Document]) -> list[list[Document]] | None:
    """By item its documents, one for every rotation; None where the order of options cannot matter."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    fields = _fields(task, documents[0])
    turned = [_turned(task, document, *fields) for document in documents]
    if all(task.doc_to_text(each) == task.doc_to_text(several[0]) for several in turned for each in several):
        return None
    shots = task.fewshot_cfg.split if task.config.num_fewshot else None
    if shots is not None and shots == (task.config.test_split or task.config.validation_split):
        raise RotationError("takes its examples from the items that it asks, which a rotation would hide")
    return turned


def _fields(task: Any, document: Document) -> tuple[str, str]:
    """The names of the fields with the options and with the place of the right one."""
    named, answer = task.config.doc_to_choice, task.config.doc_to_target
    options = named if isinstance(named, str) and named in document else "choices"
    if not isinstance(document.get(options), list):
        raise RotationError(f"has records without a list {options!r}")
    if not isinstance(answer, str) or not isinstance(document.get(answer), int):
        raise RotationError("has no field with the place of the right option that doc_to_target names")
    return options, answer


def _turned(task: Any, document: Document, options: str, answer: str) -> list[Document]:
    given, right = document[options], document[answer]
    if len(given) != len(task.doc_to_choice(document)) or not 0 <= right < len(given):
        raise RotationError(f"has a record whose {options!r} and {answer!r} do not fit its options")
    count = len(given)
    return [
        {**document, options: [*given[first:], *given[:first]], answer: (right - first) % count}
        for first in range(count)
    ]
