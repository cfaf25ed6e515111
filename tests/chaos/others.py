"""Faults of others that a study has to do with: the MLflow server that its records go to, a user who may only read its
home; see `faults`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.aim import Hit
from tests.chaos.scene import ROOT, RUN_SECONDS, Scene, command_of
from tests.chaos.server import Server

OTHER = 65534  # user and group of somebody else
LOOK_SECONDS = 120.0  # a look that takes longer hangs
CODES = {"run": (1, 2), "doctor": (0, 1)}  # by which commands may end; the others by 0
REFUSED = "give another --home"  # how a home that may not be written is refused


# The server


def pause_server(scene: Scene) -> Hit:
    return _away(scene, Server.pause, Server.resume)


def kill_server(scene: Scene) -> Hit:
    return _away(scene, Server.kill, Server.start)


def _away(scene: Scene, go: Callable[[Server], None], come: Callable[[Server], None]) -> Hit:
    """Let the server go and come back some seconds later, or after the run has ended."""
    assert scene.server is not None
    seconds = scene.random.choice([scene.random.uniform(2.0, 25.0), RUN_SECONDS])
    began = time.monotonic()
    go(scene.server)
    scene.wait(lambda: None, seconds=seconds)
    ended = "" if scene.alive() else ", at the end of a run"
    come(scene.server)
    return f"server away for {time.monotonic() - began:.1f} s{ended}"


# The other user


def look_and_try(scene: Scene) -> Hit:
    """Another user, who may only read the home, looks at the study and tries to run it."""
    if scene.wait(lambda: any(stage.done for stage in scene.stages())) is None:
        return None
    place = scene.root / "other"  # what the other user may write
    place.mkdir(exist_ok=True)
    os.chown(place, OTHER, OTHER)
    for shown in (scene.root, scene.home):
        shown.chmod(0o755)
    tried = [
        ["status", scene.study],
        ["report", scene.study, "--json", place / "records.json"],
        ["list"],
        ["doctor", scene.study],
        ["run", scene.study, *scene.words],
    ]
    scene.random.shuffle(tried)
    told = []
    for name, *words in tried:
        code, text = _as_another(scene, place, [str(name), *map(str, words)])
        told.append(f"{name} {code}")
        if code not in CODES.get(str(name), (0,)) or "Traceback" in text or (name == "run" and REFUSED not in text):
            scene.wrong.append(f"{name} of another user ended with {code}: {text[-500:]!r}")
    return f"user {OTHER}: {', '.join(told)}"


def can_be_another() -> bool:
    """Whether this user may act as another one."""
    try:
        return subprocess.run([*other_user(), sys.executable, "-c", ""], capture_output=True).returncode == 0
    except OSError:  # no such program
        return False


def other_user() -> list[str]:
    """The words that let a command be another user's, who may read this program wherever it lies."""
    below = [parent for place in (ROOT, sys.prefix, sys.base_prefix) for parent in Path(place).resolve().parents]
    closed = any(not parent.stat().st_mode & stat.S_IXOTH for parent in below)
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"] if closed else []
    return ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", *reads, "--"]


def _as_another(scene: Scene, place: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command as the other user gives it."""
    own = {"HOME": str(place), "TMPDIR": str(place)}
    process = subprocess.Popen(
        [*other_user(), *command_of(words, scene.home)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        env={**os.environ, **own}, start_new_session=True,
    )  # fmt: skip
    scene.sessions.add(process.pid)  # what it leaves running is found
    try:
        text, _ = process.communicate(timeout=LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    return process.returncode, text.decode(errors="replace")
