"""The guard ends those who use its directory, and nobody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.run.guard import guarded

HOLD = "import sys, time; stream = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(600)"


def holder(path: Path) -> subprocess.Popen[str]:
    path.parent.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """One process with a file in the directory, one with a file beside it."""
    both = holder(tmp_path / "ours" / "file"), holder(tmp_path / "ours-not" / "file")
    yield both
    for process in both:
        process.kill()
        process.communicate()


def test_it_ends_who_uses_the_directory_and_removes_it(
    tmp_path: Path, two: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    with (tmp_path / "ours" / "owner").open("w"), guarded(str(tmp_path / "ours")):
        assert two[0].poll() is None
    assert two[0].wait(timeout=10) == -9
    assert two[1].poll() is None
    assert not (tmp_path / "ours").exists() and (tmp_path / "ours-not").exists()


def test_it_does_so_when_its_driver_is_killed(
    tmp_path: Path, two: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    code = (
        "import os, sys; from orchestrator.run.guard import guarded\nwith guarded(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "ours")]).returncode == -9
    assert two[0].wait(timeout=30) == -9
    assert two[1].poll() is None
