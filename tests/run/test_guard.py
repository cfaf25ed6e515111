"""The guard ends those who use its directory, and nobody else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.run import guard
from orchestrator.run.guard import DIED, guarded

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
    assert two[0].wait(timeout=250) == -9
    assert two[1].poll() is None
    assert not (tmp_path / "ours").exists() and (tmp_path / "ours-not").exists()


def test_it_does_so_when_its_driver_is_killed(
    tmp_path: Path, two: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    code = (
        "import os, sys; from orchestrator.run.guard import guarded\nwith guarded(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "ours")]).returncode == -9
    assert two[0].wait(timeout=250) == -9
    assert two[1].poll() is None


def test_a_slow_look_is_no_reason_to_end_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through all processes of a busy machine may take longer than the guard has."""
    killed: list[bool] = []
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def slow(folder: str, but: int) -> list[SimpleNamespace]:
        clock.now += 60.0
        return [] if killed else [SimpleNamespace(kill=lambda: killed.append(True))]

    monkeypatch.setattr(guard, "users", slow)
    monkeypatch.setattr(guard, "time", clock)
    monkeypatch.setattr(guard.psutil, "wait_procs", lambda *_, **__: None)
    guard.end(str(tmp_path / "ours"), 0)
    assert killed == [True]


def test_a_driver_ends_when_its_instance_dies(tmp_path: Path) -> None:
    """A copy of `sleep` stands for the raylet, whose death a client of Ray may wait through for ever."""
    raylet = Path(shutil.copy(str(shutil.which("sleep")), tmp_path / "raylet"))
    code = (
        "import psutil, sys, time; from orchestrator.run.guard import watched\n"
        "child = psutil.Popen([sys.argv[1], '600'])\n"
        "while child.name() != 'raylet': time.sleep(0.01)\n"
        "with watched('raylet'): child.kill(); time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(raylet)], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (1, f"{DIED.format('raylet')}\n")
