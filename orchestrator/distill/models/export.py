"""A finished stage -> a Hugging Face folder that loads anywhere with `AutoModelForCausalLM`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from orchestrator.distill.models.exported_model import LayerswapConfig, LayerswapForCausalLM
from orchestrator.distill.models.origin import origin_of
from orchestrator.distill.models.student import STUDENT, load_student, load_teacher, operators_of
from orchestrator.files import published_directory, read_json

TeacherPrecision = Literal["float32", "bfloat16"]


def export_student(
    student: Path, teacher: Path, tokenizer: Path, target: Path, card: str = "", held: TeacherPrecision = "float32"
) -> None:
    """Write model, code, tokenizer and `card`, as README.md, of a student into `target`, which must not exist.

    `held` is the precision in which the student's stage held the teacher: what did not train is as it was measured.
    Weights are rounded to the precision of the folder that the teacher came from; filters stay in single precision,
    see `operators.filters.base`. What the teacher says of generation (end of text, sampling) holds for the student too.

    Raises `ValueError` where `target` exists, or `student` is no student's artefacts.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: give another folder, or remove it")
    swapped_layers(student)
    model = exported(load_student(student, load_teacher(teacher, held)), getattr(torch, origin_of(teacher).dtype))
    with published_directory(target) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")


def swapped_layers(student: Path) -> list[int]:
    """The layers of a student that have no attention, from its artefacts. ValueError where they are no student's."""
    if not (student / STUDENT).exists():
        raise ValueError(f"{student} holds no student: name a stage that swaps layers")
    return sorted(int(layer) for layer in read_json(student / STUDENT)["operators"])


def exported(student: Any, dtype: torch.dtype) -> Any:
    """The student, cast in place to `dtype`, as a model of the class that travels; the two share their tensors."""
    values = student.config.to_dict()
    values.setdefault("base_model_type", values["model_type"])
    config = LayerswapConfig.from_dict({**values, "operators": operators_of(student), "dtype": dtype})
    with torch.device("meta"):
        model: Any = LayerswapForCausalLM(config)
    model.load_state_dict(student.to(dtype).state_dict(), assign=True)
    model.generation_config = student.generation_config
    return model
