"""A process that has imported what others wrote, and forks for every request.

`python -m tests.mutants.server MODULE ...` runs in a copy of the checkout and reads requests from its standard input,
one JSON object a line; it answers each with one on its standard output. A fork imports the copy's own modules anew, so
that it sees the file that was mutated, runs pytest and ends; what it starts is in its process group and ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO


def main() -> int:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while importing is no answer
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is not there: {error}", file=sys.stderr)
    if "transformers" in sys.modules:
        _remember_conversions()
    gc.freeze()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), file=answers, flush=True)
    return 0


def _remember_conversions() -> None:
    """Let transformers build its table of weights' names, a second that every fork would spend."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("gpt_neox")


def forked(request: dict[str, Any]) -> dict[str, Any]:
    """What a fork said to the request, within `seconds`.

    Returns:
        `answer`, None where there was none; `code`, the exit code, or minus the signal that ended it; `late`, whether
        it was ended for its time; `seconds`; `output`, the end of what it printed.
    """
    began, place = time.monotonic(), Path(tempfile.mkdtemp(prefix="fork-"))
    try:
        process = os.fork()
        if process == 0:
            _child(request, place)
        late = threading.Event()
        timer = threading.Timer(request["seconds"], lambda: (late.set(), _end(process)))
        timer.start()
        _, status = os.waitpid(process, 0)
        timer.cancel()
        timer.join()
        _end(process)  # what it left behind
        code = os.waitstatus_to_exitcode(status)
        answer = json.loads(text) if (text := _text(place / "answer")) else None
        seconds = time.monotonic() - began
        is_late, output = late.is_set() or code == -signal.SIGPROF, _text(place / "output")[-4000:]
        return {"answer": answer, "code": code, "late": is_late, "seconds": seconds, "output": output}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _child(request: dict[str, Any], place: Path) -> None:
    """Answer the request in a file of `place`; does not return."""
    code = 99
    try:
        os.setsid()
        output = os.open(place / "output", os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        sys.stdin, sys.stdout, sys.stderr = open(0), _writer(1), _writer(2)  # noqa: SIM115
        from tests.mutants import inside

        answer, code = getattr(inside, request["do"])(request, place)
        (place / "answer").write_text(json.dumps(answer))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _writer(number: int) -> TextIO:
    return open(number, "w", buffering=1, closefd=False)


if __name__ == "__main__":
    sys.exit(main())
