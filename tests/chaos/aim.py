"""What faults hit: the process or file they mean, and the harm that is done to it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.chaos.scene import CONTINUE, KILL, STOP, Scene, Stage, newest_checkpoints, signal_to

Hit = str | None


def read_line(line: bytes) -> int:
    """The step of a journal line; 0 where it is torn already."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def kill(scene: Scene, stage: Stage) -> str:
    assert stage.pid is not None
    if signal_to(stage.pid, KILL):
        scene.forgive([stage])
    return f"{stage} of process {stage.pid}"


def kill_named(scene: Scene, name: str) -> Hit:
    found: list[psutil.Process] = scene.named(name)
    if not found:
        return None
    signal_to(found[0].pid, KILL)
    began = time.monotonic()
    scene.finish(scene.run)
    return f"{name} {found[0].pid}; the driver noticed after {time.monotonic() - began:.0f} s"


def end(scene: Scene) -> None:
    """Kill the driver and wait until its processes are gone."""
    scene.run.process.kill()
    scene.run.process.wait()
    scene.wait_gone()


def wait_still(pid: int) -> None:
    """Wait until every thread of a process that was told to stop has: one that waits for the disk is late."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            states = [
                path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")
            ]
            if set(states) <= {"T", "t", "Z", "X"}:
                return
        time.sleep(0.01)


def freeze(stage: Stage) -> bool:
    """Stop the process of a stage; False, and all goes on, where the stage is finished meanwhile."""
    if stage.pid is None or not signal_to(stage.pid, STOP):
        return False
    wait_still(stage.pid)
    if (stage.folder / "DONE.json").exists() or not (stage.folder / "work").is_dir():
        signal_to(stage.pid, CONTINUE)
        return False
    return True


def harm_checkpoint(scene: Scene, harm: Callable[[bytes], bytes], word: str) -> Hit:
    """Stop the worker, harm its newest checkpoint, and kill it or the driver."""
    stage = scene.wait(lambda: scene.running(checkpoints=scene.random.choice([1, 2])))
    if stage is None or not freeze(stage):
        return None
    [newest, *_] = newest_checkpoints(stage)
    path = scene.random.choice([newest / "state.safetensors", newest / "manifest.json"])
    path.write_bytes(harm(path.read_bytes()))
    told = f"{stage}: {newest.name}/{path.name} {word}, "
    if scene.random.random() < 0.5:
        return told + f"then killed {kill(scene, stage)}"
    scene.run.process.kill()
    assert stage.pid is not None
    signal_to(stage.pid, KILL)  # at once: when their leader dies, stopped processes may be let go on, and save again
    end(scene)
    return told + "then killed the driver"


def catch_publishing(scene: Scene, stage: Stage) -> list[Stage]:
    assert stage.pid is not None
    artefacts, marker = stage.folder / "artefacts", stage.folder / "DONE.json"
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and not marker.exists():
        if artefacts.exists():
            if signal_to(stage.pid, STOP):
                time.sleep(0.02)
                if not marker.exists():
                    kill(scene, stage)
                    return [stage]
                signal_to(stage.pid, CONTINUE)
            return []
        if not any(stage.folder.glob("out-*")):
            return []
    return []


def finished(scene: Scene) -> Stage | None:
    return scene.wait(lambda: choice(scene, [stage for stage in scene.stages() if stage.done]))


def finished_with_files(scene: Scene) -> Stage | None:
    """A finished stage that others read."""

    def look() -> Stage | None:
        return choice(scene, [s for s in scene.stages() if s.done and any((s.folder / "artefacts").iterdir())])

    return scene.wait(look)


def choice(scene: Scene, stages: list[Stage]) -> Stage | None:
    return scene.random.choice(stages) if stages else None


def flip_file(scene: Scene, stage: Stage) -> str:
    files = sorted(path for path in (stage.folder / "artefacts").rglob("*") if path.is_file() and path.stat().st_size)
    path = scene.random.choice(files)
    path.write_bytes(flipped(scene, path.read_bytes()))
    scene.forgive([stage])
    return f"{stage}: a bit of {path.name} flipped"


def flipped(scene: Scene, blob: bytes) -> bytes:
    place = scene.random.randrange(len(blob))
    return blob[:place] + bytes([blob[place] ^ (1 << scene.random.randrange(8))]) + blob[place + 1 :]


def find_database(scene: Scene) -> Path | None:
    """The MLflow database once it has runs."""
    path = scene.database
    if not path.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.1)) as connection:
            return path if connection.execute("SELECT count(*) FROM runs").fetchone()[0] else None
    except sqlite3.Error:
        return None
