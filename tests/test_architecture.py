"""The directions of imports, the sole importers of ray, mlflow and torch, and what lies where."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "operators",
    "orchestrator.files",
    "orchestrator.study",
    "orchestrator.distill",
    "orchestrator.run",
    "orchestrator.record",
    "orchestrator.api",
    "orchestrator.cli",
    "orchestrator.__main__",
]
SOURCES = sorted(path for room in ("operators", "orchestrator") for path in (ROOT / room).rglob("*.py"))
TORCH_FREE = [ROOT / "operators" / "__init__.py", ROOT / "operators" / "config.py", ROOT / "orchestrator" / "files.py"]
TORCH_FREE += sorted((ROOT / "orchestrator" / "study").glob("*.py"))
TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt",
    "docs", "operators", "orchestrator", "pyproject.toml", "studies", "tests",
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "ray", "mlflow"}


@functools.cache
def imported(path: Path) -> tuple[str, ...]:
    """Every module a file imports, wherever the import stands; `from a import b` counts as `a.b`."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def roots(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported(path)}


def test_every_source_lies_in_a_room() -> None:
    homeless = [module_of(path) for path in SOURCES if room_of(module_of(path)) is None]
    assert homeless == ["orchestrator"]  # its docstring, and the way to the API


def test_the_package_itself_loads_nothing() -> None:
    """Every import of any room runs it."""
    tree = ast.parse((ROOT / "orchestrator" / "__init__.py").read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "typing"}


def test_a_room_imports_only_rooms_before_it() -> None:
    against = []
    for path in SOURCES:
        home = room_of(module_of(path))
        allowed = ROOMS[: ROOMS.index(home) + 1] if home else ["orchestrator.api"]
        ours = [module for module in imported(path) if module.split(".")[0] in ("operators", "orchestrator")]
        against += [f"{module_of(path)} imports {module}" for module in ours if room_of(module) not in allowed]
    assert against == []


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in SOURCES}
    taken = {
        name: {_module_in(modules, other) for other in imported(path)} - {None, name} for name, path in modules.items()
    }
    left = dict(taken)
    while free := [name for name, others in left.items() if others.isdisjoint(left)]:
        for name in free:
            del left[name]
    assert left == {}, "these import each other, or what does"


def _module_in(modules: dict[str, Path], imported_name: str) -> str | None:
    """The module of ours that an imported name is or lies in."""
    if imported_name in modules:
        return imported_name
    above = imported_name.rpartition(".")[0]
    return above if above in modules else None


@pytest.mark.parametrize(
    ("package", "room"),
    [("ray", "orchestrator.run"), ("mlflow", "orchestrator.record"), ("lm_eval", "orchestrator.distill")],
)
def test_ray_mlflow_and_lm_eval_have_one_room_each(package: str, room: str) -> None:
    assert {room_of(module_of(path)) for path in SOURCES if package in roots(path)} == {room}


def test_what_plans_imports_no_heavy_package() -> None:
    assert {module_of(path): heavy for path in TORCH_FREE if (heavy := roots(path) & HEAVY)} == {}


@pytest.mark.parametrize(
    "order",
    [
        {  # one after the other: what is allowed later must not have been there before
            "orchestrator.study.plan": "torch transformers datasets ray mlflow pandas",
            "orchestrator.study.sources": "torch transformers datasets ray mlflow pandas",
            "orchestrator.distill.context": "torch transformers ray mlflow pandas",
            "orchestrator.record.screen.plan_view": "torch pandas",
            "orchestrator.run.broker": "torch transformers datasets mlflow",
            "orchestrator.record.driver": "torch transformers datasets",
        },
        {
            "operators.registry": "transformers datasets ray mlflow orchestrator",
            "orchestrator.distill.stage": "lm_eval",
        },
    ],
    ids=["plan to driver", "operators and stages"],
)
def test_importing_a_room_loads_nothing_of_the_later_ones(order: dict[str, str]) -> None:
    code = "import importlib, sys\n"
    for module, absent in order.items():
        code += f"importlib.import_module({module!r})\n"
        code += (
            f"print(*({module!r} + ' loads ' + each for each in {absent.split()} if each in sys.modules), sep='\\n')\n"
        )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")) == (0, [""] * (len(order) + 1)), done.stdout + done.stderr


def test_studies_are_yaml_only() -> None:
    assert {path.suffix for path in (ROOT / "studies").rglob("*")} == {".yaml"}


def test_no_python_file_is_longer_than_400_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_top_level_holds_what_a_newcomer_expects() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    assert {Path(name).parts[0] for name in done.stdout.splitlines()} == TOP_LEVEL
