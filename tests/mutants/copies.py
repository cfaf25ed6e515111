"""Copies of the checkout, each with a server of its own: nothing that is mutated is a file of the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutants.inside import STARTED

COPIED = (
    ".ci",
    "docs",
    "operators",
    "orchestrator",
    "studies",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
    "constraints.txt",
)
PRELOADED = (
    "numpy", "torch", "torch.utils.data", "transformers", "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "tokenizers",
    "safetensors.torch", "datasets", "pandas", "pydantic", "yaml", "typer", "typer.testing", "matplotlib.pyplot",
    "filelock", "fsspec", "psutil", "ray", "ray.tune", "mlflow", "mlflow.tracking", "sqlalchemy", "hypothesis",
    "pytest", "pytest_timeout", "coverage",
)  # fmt: skip
STARTED_BY = "sitecustomize.py"  # Python runs it when it starts


class Copy:
    """A copy of a checkout and the server in it; a context."""

    def __init__(self, root: Path, preloaded: tuple[str, ...] = PRELOADED) -> None:
        self.root, self.preloaded = root, preloaded
        self.place = Path(tempfile.mkdtemp(prefix="mutants-"))

    def __enter__(self) -> Copy:
        tree = self.place / "tree"
        tree.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in COPIED:
            if (self.root / name).is_dir():
                shutil.copytree(self.root / name, tree / name, ignore=ignored)
            elif (self.root / name).exists():
                shutil.copy2(self.root / name, tree / name)
        (tree / STARTED_BY).write_text(STARTED)
        harness = Path(__file__).parent
        if not (tree / "tests" / "mutants").exists():
            shutil.copytree(harness, tree / "tests" / "mutants", ignore=ignored)
        self.tree = tree
        subprocess.run([sys.executable, "-m", "compileall", "-q", "."], cwd=tree, check=False)
        (self.place / "temporary").mkdir()
        variables = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutated file leaves none behind
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(self.place / "temporary"),
        }
        self.log = (self.place / "server.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.server", *self.preloaded], cwd=tree, env=variables, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            self.server.kill()
        self.server.stdout.close()
        self.log.close()
        shutil.rmtree(self.place, ignore_errors=True)

    def ask(self, do: str, seconds: float, **request: Any) -> dict[str, Any]:
        """What a fork of the server answers within so many seconds."""
        print(json.dumps({"do": do, "seconds": seconds, **request}), file=self.server.stdin, flush=True)
        return self._answer()

    @contextlib.contextmanager
    def mutated(self, path: str, source: str) -> Iterator[None]:
        """The copy has this source as the file's, for the time of the context."""
        file = self.tree / path
        kept, times = file.read_bytes(), file.stat()
        file.write_bytes(source.encode())
        os.utime(file, (1, 1))  # no compiled file is of that time
        try:
            yield
        finally:
            file.write_bytes(kept)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _answer(self) -> dict[str, Any]:
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of mutants has ended:\n{(self.place / 'server.log').read_text()[-4000:]}")
        return json.loads(line)
