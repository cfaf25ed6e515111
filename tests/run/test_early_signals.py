"""A signal while the command is still loaded ends it with its exit code and a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUT = """
import os, signal, sys
from orchestrator.__main__ import main

class Cut:  # a signal in the middle of an import
    def find_spec(self, name, path=None, target=None):
        if name == "orchestrator.cli":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Cut())
main()
"""
LOADED = """
import signal, sys, types
from orchestrator.__main__ import main
signal.signal(signal.SIGTERM, {term})
sys.modules["orchestrator.cli"] = types.SimpleNamespace(
    app=lambda: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM))
)
main()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_anything_began(number: int, code: int) -> None:
    done = run(CUT.format(number=int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "stopped before anything began\n")


@pytest.mark.parametrize("term", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_the_command_finds_the_handlers_that_were_there(term: str) -> None:
    done = run(LOADED.format(term=term))
    assert (done.returncode, done.stdout) == (0, f"True {getattr(signal, term.removeprefix('signal.'))}\n"), done.stderr


def test_what_is_ignored_stays_so() -> None:
    """As in `nohup layerswap ... &` of a shell script."""
    ignored = "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ignored += "sys.argv = ['layerswap', '--version']\n"
    done = run(ignored + CUT.format(number=int(signal.SIGINT)))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("layerswap ")
