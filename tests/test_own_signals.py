"""No test depends on the signals that `make test` inherits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import signal, subprocess, sys

CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, "
CHILD += "signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, []))"


def test_signals():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert subprocess.check_output([sys.executable, "-c", CHILD], text=True) == "True True set()\\n"
"""


def test_signals_that_a_shell_ignores_or_holds_back_reach_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_probe.py").write_text(PROBE)
    numbers = (signal.SIGINT, signal.SIGTERM)

    def inherit() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(tmp_path / "test_probe.py")],
        cwd=ROOT,
        preexec_fn=inherit,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
