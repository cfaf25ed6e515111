"""A finished stage -> a Hugging Face folder that loads anywhere with `AutoModelForCausalLM`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import operators
from orchestrator.distill.models import cache, exported_model, families, masks, swap
from orchestrator.distill.models.exported_model import LayerswapConfig, LayerswapForCausalLM
from orchestrator.distill.models.student import STUDENT, load_student, load_teacher
from orchestrator.files import published_directory, read_json

AUTO_MAP = {
    "AutoConfig": "exported_model.LayerswapConfig",
    "AutoModelForCausalLM": "exported_model.LayerswapForCausalLM",
}


def export_student(student: Path, teacher: Path, tokenizer: Path, target: Path) -> None:
    """Write model, code and tokenizer of a student into `target`, which must not exist.

    What the teacher says of generation (end of text, sampling) holds for the student too.

    Raises `ValueError` where `target` exists, or `student` is no student's artefacts.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: give another folder, or remove it")
    if not (student / STUDENT).exists():
        raise ValueError(f"{student} holds no student: name a stage that swaps layers")
    trained = load_student(student, load_teacher(teacher))
    values = {k: v for k, v in trained.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = LayerswapConfig(**values, operators=read_json(student / STUDENT)["operators"])
    model = LayerswapForCausalLM(config)
    model.load_state_dict(trained.state_dict())
    model.generation_config = trained.generation_config
    config.auto_map = AUTO_MAP
    with published_directory(target) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        _write_code(folder)


def _write_code(folder: Path) -> None:
    """The modules that the model needs, side by side; imports among them become relative."""
    ours = (exported_model, swap, cache, families, masks)
    sources: dict[str, Any] = {module.__name__.rpartition(".")[2]: module.__file__ for module in ours}
    package = Path(str(operators.__file__)).parent
    for path in package.rglob("*.py"):
        name = "_".join(path.relative_to(package.parent).with_suffix("").parts)
        if not name.endswith("___main__"):
            sources[name.removesuffix("___init__")] = path
    del sources["operators"]
    for name, path in sources.items():
        text = Path(path).read_text(encoding="utf-8")
        text = re.sub(
            r"^from (operators\.[\w.]+) import",
            lambda found: f"from .{found[1].replace('.', '_')} import",
            text,
            flags=re.MULTILINE,
        )
        text = re.sub(
            r"^from orchestrator\.distill\.models\.(\w+) import", r"from .\1 import", text, flags=re.MULTILINE
        )
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
