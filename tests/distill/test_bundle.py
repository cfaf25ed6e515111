"""The files of an exported folder: whole, free of this project, and bit for bit what the package computes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.distill.models import bundle as bundle_module
from orchestrator.distill.models.bundle import bundle
from orchestrator.distill.models.exported_model import CODE
from tests.operators.cases import D, draw, make, rows

TEXTS = {"layerswap_operators": "operators", "layerswap_kernels": "operators/gpu", "modeling_layerswap": "orchestrator"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, in a package called `travelled`."""
    made = tmp_path_factory.mktemp("code") / "travelled"
    made.mkdir()
    for name, text in {**bundle(), "__init__.py": ""}.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


@pytest.fixture
def travelled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operators and the model as they are imported from the files."""
    monkeypatch.syspath_prepend(str(folder.parent))
    return [importlib.import_module(f"travelled.{name}") for name in ("layerswap_operators", "modeling_layerswap")]


def test_there_are_three_files_that_import_each_other_and_packages_only() -> None:
    assert sorted(bundle()) == sorted(CODE)
    for name, text in bundle().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, f"{node.module}.py" in bundle()) == (1, True), f"{name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not [m for m in modules if m.split(".")[0] in ("operators", "orchestrator")], name


def test_every_name_is_defined_once(folder: Path) -> None:
    words = ["--isolated", "--no-cache", "--select", "F", str(folder)]
    done = subprocess.run([str(Path(sys.executable).parent / "ruff"), "check", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_comments_and_docstrings_stay() -> None:
    sections = re.findall(r"^# (operators|orchestrator)([\w.]+) -+$", "".join(bundle().values()), flags=re.MULTILINE)
    assert len(sections) == len({*sections}) > 40
    whole = "".join(bundle().values())
    for first, rest in sections:
        path = bundle_module.ROOT / f"{first}{rest}".replace(".", "/")
        text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert str(ast.get_docstring(ast.parse(text), clean=False)) in whole
        for comment in re.findall(r"^ *#.*$", text, flags=re.MULTILINE):
            assert comment in whole


@pytest.mark.parametrize("case", rows())
def test_operators_of_the_files_compute_the_same_bits(case: str, travelled: Any) -> None:
    operators, model = travelled
    ours = make(case)
    config = model.operator_config(dataclasses.asdict(ours.config))
    build = operators.registry_build  # there is another one, of the compiled core
    theirs = build(config, D, ours.max_length, ours.inner)
    theirs.load_state_dict(ours.state_dict())
    assert type(theirs) is not type(ours) and type(theirs).__name__ == type(ours).__name__
    found = []
    for operator in (ours, theirs):
        x_BLD = draw(2, 24, D).requires_grad_()
        y_BLD = operator(x_BLD, torch.ones(2, 24))
        (y_BLD * draw(2, 24, D, seed=3) + x_BLD).sum().backward()
        gradients = [parameter.grad for parameter in operator.parameters()]
        with torch.no_grad():
            state = operator.init_state(2)
            steps = [operator.extend(part, state)[0] for part in x_BLD.split([20, 1, 1, 2], 1)]
        found.append([y_BLD, x_BLD.grad, *gradients, *steps])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


LOW = '''
"""Names that another module has too."""
import math
from pathlib import Path as Place

SIZE = 2  # a comment
_made = 0


class Path:
    size = SIZE

    def grow(self, SIZE=SIZE):
        return SIZE + self.size


def step(x, *, scale=1):
    global _made
    _made += 1
    return [step for step in range(x)][-1] * scale + math.floor(SIZE), str(Place("a"))


def made():
    return _made
'''
HIGH = """
from __future__ import annotations

import math

from operators.low import SIZE as OTHER
from operators.low import Path, made
from operators.low import step as their_step

SIZE = 10
TEXT = f"{SIZE} and {OTHER} of {their_step(3)[0]}"


def sum(step, low=their_step):
    _made = 5
    one = their_step(step, scale=SIZE)
    return one, low(2), {SIZE: _made for SIZE in (1, 2)}, math.pi


def step():
    try:
        raise ValueError
    except ValueError as SIZE:
        told = type(SIZE).__name__
    return told, (lambda SIZE: SIZE)(7), [SIZE for _ in range(2)] if False else None


class Inner(Path):
    SIZE = 3

    def get(self, OTHER: int = OTHER) -> int:
        return SIZE + OTHER


def all():
    return TEXT, sum(4), step(), Inner.SIZE, Inner().get(), Inner().grow(), Path().grow(1), SIZE, made()
"""
MODEL = """
from operators.high import all as everything
from operators.low import Path
from pathlib import PurePath

def answer():
    Inner = PurePath("b").name
    return everything(), Inner, Path().size
"""


def test_names_that_collide_keep_their_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "first"
    texts = {"operators/low.py": LOW, "operators/high.py": HIGH, "orchestrator/model.py": MODEL}
    texts |= {"operators/__init__.py": "", "orchestrator/__init__.py": ""}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(bundle_module, "ROOT", root)
    monkeypatch.setattr(bundle_module, "ENTRY", "orchestrator.model")
    files = bundle.__wrapped__()
    (tmp_path / "second" / "bundled").mkdir(parents=True)
    for name, text in {**files, "__init__.py": ""}.items():
        assert "\n\n\n\n" not in text
        (tmp_path / "second" / "bundled" / name).write_text(text)
    print_answer = "import {} as model; print(repr(model.answer()))"
    answers = []
    for place, module in ((root, "orchestrator.model"), (tmp_path / "second", "bundled.modeling_layerswap")):
        done = subprocess.run(
            [sys.executable, "-S", "-c", print_answer.format(module)], capture_output=True, text=True, cwd=place
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] and "((32, 'a'), (3, 'a'), {1: 5, 2: 5}" in answers[0]
    operators = files["layerswap_operators.py"]
    assert "LOW_SIZE = 2  # a comment" in operators and "HIGH_SIZE = 10" in operators
    assert "class LowPath:" not in operators and "class Path:" in operators  # pathlib's is called Place there
    assert "def grow(self, SIZE=LOW_SIZE):\n        return SIZE + self.size" in operators
    assert "def high_sum(step, low=low_step):" in operators and "[step for step in range(x)]" in operators


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import operators.low\n", "import names from it"),
        ("def late():\n    from operators.low import made\n", "do it above"),
    ],
)
def test_imports_that_cannot_be_bundled_are_told(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "orchestrator" / "model.py").write_text(text)
    monkeypatch.setattr(bundle_module, "ROOT", tmp_path)
    monkeypatch.setattr(bundle_module, "ENTRY", "orchestrator.model")
    with pytest.raises(AssertionError, match=told):
        bundle.__wrapped__()
