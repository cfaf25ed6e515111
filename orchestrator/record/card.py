"""The model card of an exported student: what it is, how to load it, how good it is, and where it comes from."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from orchestrator.distill.models.origin import Origin
from orchestrator.record.answer.frames import table
from orchestrator.record.answer.markdown import pipe_table
from orchestrator.record.answer.verdict import legend
from orchestrator.record.records import Record
from orchestrator.record.screen.plan_view import layer_ranges
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.schema import Pretrain, Pretrained
from orchestrator.study.spec import STAGE_VERSION, SourceIdentity
from orchestrator.study.stages import Step

TAGS = ["layerswap", "hyena", "long-convolution", "distillation", "custom_code"]
PACKAGES = ("layerswap", "torch", "transformers")
LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

The code that `trust_remote_code` runs is the three Python files of this folder; it needs Python 3.11 or newer, torch
and transformers."""


def model_card(
    plan: Plan, records: list[Record], key: str, trial: str | None, layers: Sequence[int], origin: Origin
) -> str:
    """The card of the student with the stage key `key`, on the path of `trial` or of the first trial that has it.

    `layers` are all that have no attention, those of a teacher that was a student already among them.
    """
    path = next(each for each in plan.trials if trial in (None, each.name) and key in _keys(each))
    steps = _way(path, key)
    before = sorted({*layers} - {*steps[-1].swapped})
    teacher = _teacher(plan.study.teacher, origin)
    teacher += f", which had such in {layer_ranges(before)} already" if before else ""
    parts = [
        f"---\n{_metadata(origin)}\n---",
        f"# {plan.study.study}: {len(layers)} of {plan.total_layers} attention layers swapped",
        "A causal language model with long convolutions (Hyena and its relatives) where attention was, in the layers "
        f"{layer_ranges(sorted(layers))}. It was distilled from {teacher}. The conversion goes back to Scavenging "
        "Hyena (arXiv 2401.17574).",
        plan.study.question.strip(),
        "## How to load it",
        LOAD,
        "## Results",
        *_results(plan, records, path, steps, origin),
        "## Where it comes from",
        _lineage(plan, path, steps),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _teacher(teacher: Pretrain | Pretrained, origin: Origin) -> str:
    """The teacher in words."""
    if isinstance(teacher, Pretrain):
        return "the model that the study trained"
    if teacher.folder is None:
        return str(teacher.hub)
    made_from = f", made from {origin.name}" if origin.name else ""
    return f"the model in the folder `{Path(teacher.folder).name}`{made_from}"


def _metadata(origin: Origin) -> str:
    licence = {
        name: value for name, value in dataclasses.asdict(origin).items() if name.startswith("license") and value
    }
    base: dict[str, Any] = {"base_model": origin.name, "base_model_relation": "finetune"} if origin.name else {}
    kind: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    return ModelCardData(**kind, **base, **licence).to_yaml()


def _results(plan: Plan, records: list[Record], path: Trial, steps: Sequence[Step], origin: Origin) -> Iterator[str]:
    """The rows of teacher, controls and path, and what has to be known to read them."""
    length = str(max(plan.study.throughput.lengths))
    keys = {step.train.key for step in steps}
    mine = [row for row in records if row["trial"] == path.name and row["stage_key"] in keys]
    rows = [*(row for row in records if row["kind"] in ("teacher", "control")), *mine]
    yield pipe_table(table(rows, length))
    yield legend(rows, length)
    measured = mine and mine[-1]["stage_key"] == steps[-1].train.key
    yield f"The last row is this model, of {mine[-1]['words']}." if measured else "This model was not measured yet."
    if origin.dtype != "float32":
        yield (
            f"All was measured in float32. The weights here are rounded to {origin.dtype}, the precision of the "
            "teacher's; those of filters are not."
        )
    if any(row["metrics"].get("core") == "native" for row in rows):
        yield "The code of this folder runs in torch, which decodes slower than the compiled core."


def _lineage(plan: Plan, path: Trial, steps: Sequence[Step]) -> str:
    """The stages by their keys, the text by its fingerprints, and the versions of what ran."""
    lines = ["| stage | layers | tokens | key |", "|---|---|---:|---|"]
    lines.append(f"| text | | | `{plan.tokens.key}` |")
    lines.append(f"| teacher | | {plan.teacher.own_tokens:,} | `{plan.teacher.train.key}` |")
    for step in steps:
        name = "joint" if step.joint else f"stage {path.steps.index(step) + 1}"
        layers = layer_ranges(getattr(step.train, "layers", ()))
        lines.append(f"| {path.name} {name} | {layers} | {step.own_tokens:,} | `{step.train.key}` |")
    texts = {"training": plan.tokens.train, "validation": plan.tokens.validation}
    said = [f"- {name} text: {_source(source)}" for name, source in texts.items() if source is not None]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    said.append(f"- exported by {versions}, Python {platform.python_version()}; stages of version {STAGE_VERSION}")
    return "\n".join([*lines, "", *said])


def _source(source: SourceIdentity) -> str:
    return f"{source.source}, fingerprint `{source.fingerprint}`"


def _way(path: Trial, key: str) -> list[Step]:
    """The stages from the teacher to a student: what was given back before it is none of them."""
    wanted, found = key, []
    for step in reversed(path.steps):
        if step.train.key == wanted:
            found.append(step)
            wanted = str(getattr(step.train, "parent", ""))
    return found[::-1]


def _keys(trial: Trial) -> list[str]:
    return [step.train.key for step in trial.steps]
