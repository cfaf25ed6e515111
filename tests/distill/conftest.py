"""Models and workplaces small enough to build anew in every test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.models.student import load_teacher

Place = Callable[..., Workplace]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)


@pytest.fixture
def teacher(tiny_teacher: Path) -> Any:
    """A frozen GPT-NeoX of 3 layers, width 32, 4 heads, 96 positions, vocabulary 300."""
    return load_teacher(tiny_teacher)


@pytest.fixture
def tied_teacher(tiny_teacher: Path, tmp_path: Path) -> Path:
    """The folder of the same model, but for an output head that is its embedding."""
    folder = shutil.copytree(tiny_teacher, tmp_path / "tied")
    model = load_teacher(tiny_teacher)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of 20 tokens, (2, 20)."""
    return torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def said() -> list[str]:
    """What stages of the test's workplaces said."""
    return []


@pytest.fixture
def place(tmp_path: Path, said: list[str]) -> Place:
    """Makes the workplace called `name`, anew or as it was left, with an empty `out`."""

    def make(name: str = "stage", inputs: Mapping[str, Path] | None = None, **context: Any) -> Workplace:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        out = root / f"out-{len(list(root.glob('out-*')))}"
        out.mkdir()
        told = {"checkpoint_seconds": 0.0, "log_every": 2, **context}
        return Workplace(inputs or {}, root / "work", root, out, RunContext(store=str(tmp_path), **told), said.append)

    return make
