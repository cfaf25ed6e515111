"""What the README tells a newcomer to type exists, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE))
    made = (ROOT / "Makefile").read_text()
    assert {"study", "ui", "test", "setup", "plan"} <= targets
    for target in targets:
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", made, flags=re.MULTILINE), target


NAMES = re.compile(r"`((?:studies|orchestrator|operators|tests)/[\w/.-]+|[\w/-]+\.(?:py|h|yaml))`")


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_named_files_exist(text: str) -> None:
    """A name that begins at no folder of the top lies in the folder of the one before it."""
    folder = ROOT
    for name in NAMES.findall((ROOT / text).read_text()):
        whole = ROOT / name
        if not whole.exists():
            assert (folder / name).exists(), name
        elif "/" in name:
            folder = whole if whole.is_dir() else whole.parent


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^layerswap (\w+)", README, flags=re.MULTILINE))))
def test_commands_exist(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli", name, "--help"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0


def test_ci_runs_what_the_readme_tells() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
