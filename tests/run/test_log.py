"""The log of a stage: what its process writes while it computes, however it writes it, and never too much of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distill import stage as stage_module
from orchestrator.distill.context import RunContext, Stopped
from orchestrator.run import log
from orchestrator.run.compute import compute
from orchestrator.run.log import CUT, KEPT, LOG, MOST, logged
from orchestrator.run.store import Store
from orchestrator.study.spec import TokensSpec

HEADING = r"=== \d{4}-\d\d-\d\d \d\d:\d\d:\d\d on \S+, process \d+: "
CODE = """
import os, subprocess, sys, warnings
from pathlib import Path
from orchestrator.run.log import logged

print("before")
with logged(Path(sys.argv[1]), "distil, attempt 2"):
    print("to stdout")
    os.write(2, b"of compiled code\\n")
    subprocess.run(["echo", "of a child"])
    warnings.warn("a warning")
print("after")
"""


def test_all_that_a_process_writes_meanwhile_is_kept(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("an earlier attempt\n")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "")
    first, heading, *rest, end = (tmp_path / LOG).read_text().splitlines()
    assert first == "an earlier attempt"
    assert re.fullmatch(HEADING + "distil, attempt 2", heading)
    assert {"to stdout", "of compiled code", "of a child"} < set(rest) and "UserWarning: a warning" in " ".join(rest)
    assert re.fullmatch(r"=== [-\d: ]{19}, after \d+\.\d s", end)


def test_an_error_is_told_with_its_traceback_and_a_stop_in_a_line(tmp_path: Path) -> None:
    for error in (ValueError("no such thing"), Stopped("stopped at step 3 of 9")):
        with pytest.raises(type(error)), logged(tmp_path, "distil, attempt 1"):
            raise error
    _, *traceback, _, _, stopped, _ = (tmp_path / LOG).read_text().splitlines()
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ValueError: no such thing"
    assert stopped == "stopped at step 3 of 9"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    done = []
    with logged(tmp_path / "gone", "distil"):
        done.append(os.fstat(1))
    assert done


def test_a_log_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "EVERY", 0.01)
    path = tmp_path / LOG
    with logged(tmp_path, "distil"):
        os.write(1, b"x" * 99 + b"\n")
        for number in range(MOST // 99 + 2):
            os.write(1, b"%098d\n" % number)
        while path.stat().st_size > MOST:
            pass
        os.write(1, b"the last line\n")
    raw = path.read_bytes()
    assert raw.startswith(CUT) and KEPT - 200 < len(raw) < KEPT + 200
    assert raw.splitlines()[-2] == b"the last line"
    path.write_bytes(b"y" * MOST)
    log._bound(path)
    assert path.stat().st_size == MOST  # not too large yet


def test_afterwards_the_process_writes_where_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path, "distil"):
        os.write(2, b"inside\n")
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "outside\n"
    assert "inside" in (tmp_path / LOG).read_text()


def test_every_attempt_at_a_stage_is_logged_where_the_stage_lies(
    text: tuple[TokensSpec, RunContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, context = text

    def fails(*_: Any) -> dict[str, Any]:
        os.write(2, b"just before\n")
        raise ValueError("no such word")

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "run_stage", fails)
        with pytest.raises(ValueError, match="no such word"):
            compute(spec.model_dump_json(), context)
    compute(spec.model_dump_json(), context)
    path = Store(Path(context.store)).folder(spec.key) / LOG
    told = path.read_text()
    assert re.findall(HEADING + "(.*)", told) == ["tokens, attempt 1", "tokens, attempt 2"]
    assert told.index("just before") < told.index("ValueError: no such word") < told.index("attempt 2")
    compute(spec.model_dump_json(), context)
    assert path.read_text() == told  # it is finished: nothing is computed
