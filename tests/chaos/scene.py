"""A home and the processes of a study that runs in it: started, watched, hit and started again.

Every run is a session of its own, so its processes are known by their session id, also after their parents died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import psutil

from orchestrator.run.lock import LOCK, Flock
from tests.chaos.server import Server

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 300.0  # a run that takes longer hangs
HUNG = -1000  # its exit code
ORPHAN_SECONDS = 30.0  # a run's processes are gone so soon after its driver
ESCAPED = "escaped"  # a file that a mirror tries to write into the home
TMPFS_BYTES = 256 * 2**20
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the store shows of a stage at one moment."""

    key: str
    kind: str
    folder: Path
    done: bool
    attempts: int
    pid: int | None  # of the process that computes it or did so last

    def __str__(self) -> str:
        return f"{self.kind} {self.key[:8]}"


@dataclasses.dataclass
class Run:
    """One start of the command."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float
    beside: bool = False  # a second driver, started while another one ran
    code: int | None = None

    @property
    def text(self) -> str:
        """What it printed, on both streams."""
        return self.log.read_text(errors="replace")


class Scene:
    """A place where a study runs, by a command with these `words` more. `small_disk`: its home lies on a small file
    system of its own. `server`: there is an MLflow server for its records, to be started."""

    def __init__(
        self, study: Path, seed: int = 0, *, small_disk: bool = False, server: bool = False, words: Iterable[str] = ()
    ) -> None:
        self.study = study
        self.random = random.Random(seed)
        self.root = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: Ray's sockets lie below it
        self.home, self.mirror = self.root / "home", self.root / "mirror"
        self.home.mkdir()
        self.server = Server(self.root / "server") if server else None
        self.database = self.server.database if self.server else self.home / "mlflow.db"
        self.words = [word.format(root=self.root, server=self.server and self.server.uri) for word in words]
        self.mounted = small_disk
        if small_disk:
            mount_small(self.home)
        self.began = time.monotonic()
        self.runs: list[Run] = []
        self.sessions: set[int] = set()
        self.allowed: Counter[str] = Counter()  # stage key -> attempts beyond the first that faults explain
        self.kinds: dict[str, str] = {}
        self.wrong: list[str] = []  # what a fault saw that must not be

    def close(self) -> None:
        """End what still runs and delete everything."""
        self.kill_rest()
        if self.server is not None:
            self.server.kill()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.home)], check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    # Runs

    def start(self, *, beside: bool = False, **variables: str) -> Run:
        """Run the study's command with these environment variables more; what was begun and is not finished may be
        tried once more, but for what another run computes now that goes on beside."""
        begun = [stage for stage in self.stages() if not stage.done]
        self.forgive(stage for stage in begun if not (beside and Flock(stage.folder / LOCK).held_by_other()))
        log = self.root / f"run-{len(self.runs)}.log"
        environment = {**os.environ, "TMPDIR": str(self.root), "PYTHONUNBUFFERED": "1", **variables}
        command = command_of(["run", str(self.study), "--checkpoint-seconds", "0.2", *self.words], self.home)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
                umask=0o022,
            )  # fmt: skip
        run = Run(process, log, time.monotonic(), beside)
        self.runs.append(run)
        self.sessions.add(process.pid)
        return run

    @property
    def run(self) -> Run:
        """The newest run that is not the second one of two."""
        return [run for run in self.runs if not run.beside][-1]

    def alive(self) -> bool:
        """Whether the newest run goes on."""
        return self.run.process.poll() is None

    def beside(self) -> bool:
        """Whether a second driver goes on."""
        return any(run.beside and run.process.poll() is None for run in self.runs)

    def finish(self, run: Run) -> int:
        """Wait until a run ends and return its exit code; one that hangs is killed and has `HUNG`."""
        try:
            run.code = run.process.wait(max(0.0, run.began + RUN_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.code = HUNG
            self.kill_rest()
        return run.code

    def wait(self, wanted: Callable[[], T], seconds: float = 60.0, pause: float = 0.02) -> T | None:
        """The first true value of `wanted`; None where the run ends before, or the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.alive():
            value = wanted()
            if value:
                return value
            time.sleep(pause)
        return None

    def wait_progress(self, stages: int) -> None:
        """Wait until so many stages are finished, or the run ends."""
        self.wait(lambda: sum(stage.done for stage in self.stages()) >= stages)

    # Processes

    def processes(self) -> list[psutil.Process]:
        """All living processes of all runs."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) in self.sessions:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def named(self, part: str) -> list[psutil.Process]:
        """The newest run's processes whose command line begins with, or whose program ends with, `part`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError, psutil.Error, IndexError):
                first = process.cmdline()[0]
                own = os.getsid(process.pid) == self.run.process.pid
                if own and (first.startswith(part) or first.endswith(f"/{part}")):
                    found.append(process)
        return found

    def wait_gone(self) -> list[str]:
        """Wait for the processes of ended runs to go; names of those that stay too long, which are killed."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < deadline:
            if not self.processes():
                return []
            time.sleep(0.1)
        return self.kill_rest()

    def kill_rest(self) -> list[str]:
        """Kill all processes of all runs and return their names."""
        names = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.pid} {' '.join(process.cmdline())[:60]}")
                process.kill()
        for run in self.runs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(5.0)
        return names

    # The store

    def stages(self) -> list[Stage]:
        """Every stage that has a specification in the store."""
        return [stage for folder in sorted(self.home.glob("store/??/*")) if (stage := self._stage(folder)) is not None]

    def _stage(self, folder: Path) -> Stage | None:
        key = folder.name
        if key not in self.kinds:
            specification = read(folder / "spec.json")
            if specification is None:
                return None
            self.kinds[key] = specification["kind"]
        attempt = read(folder / "attempt.json") or {}
        number = int(attempt.get("number", 0))
        return Stage(key, self.kinds[key], folder, (folder / "DONE.json").is_file(), number, attempt.get("pid"))

    def running(
        self, *, trained: bool = False, checkpoints: int = 0, kinds: tuple[str, ...] = (), extended: bool = False
    ) -> Stage | None:
        """A stage that is being computed: any, one that trains, one that has so many checkpoints, one of these kinds,
        or one that trains what was swapped before."""
        found = []
        for stage in self.stages():
            if stage.done or stage.pid is None or not self.ours(stage.pid):
                continue
            if (trained or checkpoints) and stage.kind not in ("teacher", "distil", "scratch"):
                continue
            if kinds and stage.kind not in kinds:
                continue
            if extended and (read(stage.folder / "spec.json") or {}).get("new_layers") != []:
                continue
            if len(newest_checkpoints(stage)) >= checkpoints:
                found.append(stage)
        return self.random.choice(found) if found else None

    def ours(self, pid: int) -> bool:
        """Whether a process belongs to a run of this scene."""
        try:
            return os.getsid(pid) in self.sessions
        except OSError:
            return False

    def forgive(self, stages: Any, times: int = 1) -> None:
        """Let these stages be computed once more, or so many times."""
        self.allowed.update({stage.key: times for stage in stages})


def command_of(words: list[str], home: Path) -> list[str]:
    """The program's command of these words on a home."""
    return [sys.executable, "-m", "orchestrator", *words, "--home", str(home)]


def newest_checkpoints(stage: Stage) -> list[Path]:
    """Published checkpoints of an unfinished stage, the newest first."""
    return sorted((path.parent for path in stage.folder.glob("work/step-*/manifest.json")), reverse=True)


def read(path: Path) -> dict[str, Any] | None:
    """A JSON mapping; None where it is absent, torn or something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def signal_to(pid: int, number: int) -> bool:
    """Send a signal to a process; False where there is none any more."""
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def can_mount() -> bool:
    """Whether this user may mount a small file system."""
    with tempfile.TemporaryDirectory() as place:
        try:
            mount_small(Path(place))
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", place], check=True)
        return True


def mount_small(place: Path) -> None:
    """Mount a small file system in memory; `CalledProcessError` where that is not allowed."""
    options = ["-t", "tmpfs", "-o", f"size={TMPFS_BYTES},mode=755", "none", str(place)]
    subprocess.run(["mount", *options], check=True, capture_output=True)


STOP, CONTINUE, KILL = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL
