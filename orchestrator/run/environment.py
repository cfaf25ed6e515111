"""What of the place where a user works must not reach Ray and the stages: their modules, and settings of other runs.

Place in the flow: the command calls `own_process` before it imports anything large, `cluster` enters `own_instance`
before it starts Ray. Invariant: a run depends on its study, its home and the words of its command, not on where it was
started, and nobody else's process can join the Ray that it starts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import secrets
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2]  # the folder that holds `orchestrator` and `operators`
# Variables by which Ray would take another cluster, job or place for that of a run that starts its own.
OF_ANOTHER_RUN = (
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_CLIENT_MODE", "RAY_GCS_SERVER_PORT", "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_JOB_ID", "RAY_NAMESPACE", "RAY_OVERRIDE_LABELS", "RAY_OVERRIDE_RESOURCES", "RAY_RAYLET_PID",
    "RAY_REDIS_ADDRESS", "RAY_RUNTIME_ENV", "RAY_RUNTIME_ENV_HOOK", "RAY_START_HOOK", "RAY_STORAGE", "RAY_TMPDIR",
    "RAY_AIR_LOCAL_CACHE_DIR", "TUNE_RESULT_DIR", "RAY_LOG_TO_STDERR",
)  # fmt: skip
TOKEN, MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"  # an instance of its own asks for its token where no mode is set
ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: services listen on the loopback interface, as they do on a desktop


def own_process() -> None:
    """From now on be led by the words of the command alone, here and in processes that are started from here."""
    _own_modules()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the terminal does not know is no reason to stop
            stream.reconfigure(errors="replace")
    if os.environ.pop("PYTHONWARNINGS", None) is not None:  # an error there would be one of the libraries below us
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)


def _own_modules() -> None:
    """Import no module of the working directory.

    `python -m` and an empty entry of PYTHONPATH (`PYTHONPATH=$PYTHONPATH:more`) put it first, so that a `datasets.py`
    or an `operators/` of the user's would be taken for the one that is meant.
    """
    here = str(Path.cwd().resolve())
    if here == str(PROGRAM):
        return
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or here) != here]
    given = os.environ.get("PYTHONPATH")
    if given is not None:
        kept = [entry for entry in given.split(os.pathsep) if os.path.realpath(entry or here) != here]
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)


@contextlib.contextmanager
def own_instance() -> Iterator[None]:
    """Inside, a Ray instance that is started from here is led into no other one, and is this run's alone.

    It listens on the loopback interface, and only who knows its token may speak to it: this process and those that it
    starts, whose variables no other user can read. Ray writes no token to HOME then.
    """
    before = {name: os.environ.get(name) for name in (*OF_ANOTHER_RUN, TOKEN, MODE, ALONE)}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update({TOKEN: _token(), ALONE: "0"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@functools.cache
def _token() -> str:
    """One for all instances of this process, for Ray reads it once."""
    return secrets.token_hex(32)


def paths_of_workers() -> list[str]:
    """Where workers look for this program first; nowhere where it is installed among their packages."""
    installed = {os.path.realpath(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
    return [] if str(PROGRAM) in installed else [str(PROGRAM)]
