"""The part of a study file that says what matters in the answer: columns and order. No stage depends on it."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from orchestrator.study.values import Model

# What a report can tell of a row, beside its name.
COLUMNS = (
    "swapped", "layers", "seeds", "tokens", "perplexity", "ratio", "agree", "hit", "miss", "copied", "greedy",
    "sampled", "kl", "prefill", "decode", "train",
)  # fmt: skip


def _known(name: str) -> str:
    if name not in COLUMNS:
        near = difflib.get_close_matches(name, COLUMNS, n=1)
        told = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
        raise ValueError(f"unknown column {name}; {told}")
    return name


Column = Annotated[str, AfterValidator(_known)]


class Report(Model):
    """What matters in the answer."""

    sort: Column | None = None  # of lists of students, the better first; none: most layers, then the lowest ratio
    columns: Annotated[tuple[Column, ...], Field(min_length=1)] | None = None  # of all tables of students, in order

    @model_validator(mode="after")
    def _each_once(self) -> Report:
        columns = self.columns or ()
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"columns names {', '.join(twice)} more than once: name each column once")
        return self
