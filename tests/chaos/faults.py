"""What can happen to a study: each fault takes a scene with a run, hits something, and says what.

A fault returns None where the run ended before there was anything to hit. Faults that damage what a dead run left kill
the run first; the scene starts the command again afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable

from tests.chaos.aim import (
    Hit,
    catch_publishing,
    end,
    find_database,
    finished,
    finished_with_files,
    flip_file,
    flipped,
    freeze,
    harm_checkpoint,
    kill,
    kill_named,
    read_line,
)
from tests.chaos.scene import CONTINUE, KILL, STOP, Scene, Stage, newest_checkpoints, read, signal_to


@dataclasses.dataclass(frozen=True)
class Fault:
    """`act` hits; a run that was hit may end with one of `codes`, and must say `says` before all is over."""

    act: Callable[[Scene], Hit]
    codes: tuple[int, ...] = (0,)
    says: str = ""
    small_disk: bool = False
    later: bool = False  # what it harms may have no reader before the next run, which then finds it
    readers: bool = False  # stages that read what it harms notice, and begin again
    any_code: bool = False  # Ray itself is hit: its client decides how the driver ends

    @property
    def interrupts(self) -> bool:
        """Whether it may end a driver, and with it what that one computes."""
        return self.any_code or not {0, 1, 2}.issuperset(self.codes)


# Processes


def kill_driver(scene: Scene) -> Hit:
    scene.run.process.kill()
    scene.run.process.wait()
    return f"driver {scene.run.process.pid}"


def kill_worker(scene: Scene) -> Hit:
    stage = scene.wait(lambda: scene.running(trained=True))
    return None if stage is None else kill(scene, stage)


def kill_any_stage(scene: Scene) -> Hit:
    stage = scene.wait(scene.running)
    return None if stage is None else kill(scene, stage)


def kill_broker(scene: Scene) -> Hit:
    broker = scene.wait(lambda: scene.named("ray::Broker"))
    if not broker:
        return None
    before = {stage.key: stage for stage in scene.stages() if not stage.done}
    signal_to(broker[0].pid, KILL)
    time.sleep(0.5)  # its tasks die with it, those that were queued perhaps just begun
    after = {stage.key: stage for stage in scene.stages() if not stage.done}
    scene.forgive((before | after).values())
    return f"broker {broker[0].pid}"


def kill_trial(scene: Scene) -> Hit:
    trials = scene.wait(lambda: scene.named("ray::ImplicitFunc"))
    if not trials:
        return None
    victim = scene.random.choice(trials)
    signal_to(victim.pid, KILL)
    return f"trial coordinator {victim.pid}"


def kill_raylet(scene: Scene) -> Hit:
    return kill_named(scene, "raylet")


def kill_gcs(scene: Scene) -> Hit:
    return kill_named(scene, "gcs_server")


def kill_everything(scene: Scene) -> Hit:
    """A power cut, but for the disk's cache."""
    return f"{len(scene.kill_rest())} processes"


def terminate(scene: Scene) -> Hit:
    scene.run.process.terminate()
    return f"driver {scene.run.process.pid}"


def interrupt(scene: Scene) -> Hit:
    os.killpg(scene.run.process.pid, signal.SIGINT)  # as a terminal does it: the whole foreground group
    return f"group {scene.run.process.pid}"


def interrupt_twice(scene: Scene) -> Hit:
    interrupt(scene)
    time.sleep(scene.random.uniform(0.05, 1.0))
    if scene.alive():
        interrupt(scene)
    return f"group {scene.run.process.pid}, twice"


def pause_worker(scene: Scene) -> Hit:
    stage = scene.wait(lambda: scene.running(trained=True))
    if stage is None or stage.pid is None:
        return None
    signal_to(stage.pid, STOP)
    seconds = scene.random.uniform(1.0, 5.0)
    time.sleep(seconds)
    signal_to(stage.pid, CONTINUE)
    return f"{stage} stood still for {seconds:.1f} s"


def pause_driver(scene: Scene) -> Hit:
    seconds = scene.random.uniform(1.0, 5.0)
    signal_to(scene.run.process.pid, STOP)
    time.sleep(seconds)
    signal_to(scene.run.process.pid, CONTINUE)
    return f"driver stood still for {seconds:.1f} s"


def kill_at_publish(scene: Scene) -> Hit:
    """Kill between the rename of the artefacts and the marker that commits them."""
    caught: list[Stage] = []

    def look() -> bool:
        for stage in scene.stages():
            if not stage.done and stage.pid is not None and scene.ours(stage.pid):
                caught.extend(catch_publishing(scene, stage))
        return bool(caught)

    if not scene.wait(look, seconds=40.0, pause=0.005):
        return None
    return f"{caught[0]} had artefacts and no {'DONE.json'}"


def two_drivers(scene: Scene) -> Hit:
    second = scene.start(beside=True)
    return f"second driver {second.process.pid}"


# Files of a stage in the making


def tear_checkpoint(scene: Scene) -> Hit:
    def tear(blob: bytes) -> bytes:
        return blob[: scene.random.randrange(len(blob))]

    return harm_checkpoint(scene, tear, "torn")


def flip_checkpoint(scene: Scene) -> Hit:
    return harm_checkpoint(scene, lambda blob: flipped(scene, blob), "flipped")


def tear_journal(scene: Scene) -> Hit:
    """What a crash can leave: half a line, of a step that no checkpoint covers."""
    stage = scene.wait(lambda: scene.running(checkpoints=1))
    if stage is None or not freeze(stage):
        return None
    journal = stage.folder / "journal.jsonl"
    saved = max((int(path.name.removeprefix("step-")) for path in newest_checkpoints(stage)), default=0)
    blob = journal.read_bytes()
    whole = blob[: blob.rstrip(b"\n").rfind(b"\n") + 1]
    last = read_line(blob[len(whole) :])
    if last > saved:
        journal.write_bytes(blob[: len(whole) + scene.random.randrange(1, len(blob) - len(whole) - 1)])
    else:
        journal.write_bytes(blob + b'{"step": ' + str(last + 10).encode() + b', "tok')
    return kill(scene, stage) + ", its journal torn"


def leave_torn_directories(scene: Scene) -> Hit:
    """What a crash in the middle of a checkpoint, of a publication and of a JSON file leaves."""
    stage = scene.wait(lambda: scene.running(checkpoints=1))
    if stage is None or not freeze(stage):
        return None
    torn = stage.folder / "work" / ".step-000990.deadbeef.tmp"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    (stage.folder / ".DONE.json.deadbeef.tmp").write_text("{")
    (stage.folder / "out-deadbeef").mkdir(exist_ok=True)
    (stage.folder / "out-deadbeef" / "model.safetensors").write_bytes(b"half")
    return kill(scene, stage) + ", torn files beside it"


def delete_unfinished(scene: Scene) -> Hit:
    stage = scene.wait(lambda: scene.running(trained=True))
    if stage is None:
        return None
    shutil.rmtree(stage.folder, ignore_errors=True)
    return f"{stage}, in the making"


# Files of a finished stage


def flip_artefact(scene: Scene) -> Hit:
    """Between two runs: the next one finds it before anything reads it."""
    stage = finished_with_files(scene)
    if stage is None:
        return None
    end(scene)
    return flip_file(scene, stage)


def flip_artefact_running(scene: Scene) -> Hit:
    """While stages that read it may still come."""
    stage = finished_with_files(scene)
    return None if stage is None else flip_file(scene, stage)


def tear_done(scene: Scene) -> Hit:
    stage = finished(scene)
    if stage is None:
        return None
    end(scene)
    marker = stage.folder / "DONE.json"
    marker.write_bytes(marker.read_bytes()[: scene.random.randrange(marker.stat().st_size - 1)])
    scene.forgive([stage])
    return f"{stage}: DONE.json torn"


def delete_done(scene: Scene) -> Hit:
    stage = finished(scene)
    if stage is None:
        return None
    if scene.random.random() < 0.5:
        end(scene)
    (stage.folder / "DONE.json").unlink()
    scene.forgive([stage])
    return f"{stage}: DONE.json deleted" + ("" if scene.alive() else " while nothing ran")


def delete_finished(scene: Scene) -> Hit:
    stage = finished(scene)
    if stage is None:
        return None
    if scene.random.random() < 0.5:
        end(scene)
    shutil.rmtree(stage.folder, ignore_errors=True)
    return f"{stage}, finished" + ("" if scene.alive() else " while nothing ran")


def leave_stale_claim(scene: Scene) -> Hit:
    """A lock file and an attempt of a process that is somebody else's, on another host."""
    if scene.wait(lambda: scene.running(trained=True)) is None:
        return None
    end(scene)
    open_stages = [stage for stage in scene.stages() if not stage.done]
    for stage in open_stages:
        (stage.folder / "lock").write_text("1\n")
        attempt = {**(read(stage.folder / "attempt.json") or {}), "pid": 1, "host": "elsewhere", "started": time.time()}
        (stage.folder / "attempt.json").write_text(json.dumps(attempt))
    return f"{len(open_stages)} stages claimed by pid 1 of another host"


# Disk and records


def fill_disk(scene: Scene) -> Hit:
    """The file system of the home has no byte left until the run ends, or for some seconds."""
    balloon = scene.home / "balloon"
    seconds = scene.random.uniform(3.0, 8.0)
    with contextlib.suppress(OSError), balloon.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"\0" * 4096)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and scene.alive():
        time.sleep(0.1)
    size = balloon.stat().st_size
    balloon.unlink()
    return f"disk full with {size >> 20} MB for {seconds:.1f} s"


def lock_records(scene: Scene) -> Hit:
    database = scene.wait(lambda: find_database(scene))
    if database is None:
        return None
    seconds = scene.random.uniform(2.0, 8.0)
    connection = sqlite3.connect(database, timeout=20.0, isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")
    return f"MLflow database locked for {seconds:.1f} s"


def delete_records(scene: Scene) -> Hit:
    database = scene.wait(lambda: find_database(scene))
    if database is None:
        return None
    for path in scene.home.glob("mlflow.db*"):
        path.unlink()
    return "MLflow database deleted"


def hide_records(scene: Scene) -> Hit:
    """The database cannot be opened for a while, and comes back."""
    database = scene.wait(lambda: find_database(scene))
    if database is None:
        return None
    seconds = scene.random.uniform(2.0, 6.0)
    aside = scene.root / "mlflow.db"
    database.rename(aside)
    database.mkdir()
    time.sleep(seconds)
    database.rmdir()
    aside.rename(database)
    return f"MLflow database unreadable for {seconds:.1f} s"


FAULTS: dict[str, Fault] = {
    "driver-kill": Fault(kill_driver, (-9,)),
    "worker-kill": Fault(kill_worker),
    "stage-kill": Fault(kill_any_stage),
    "publish-kill": Fault(kill_at_publish),
    "broker-kill": Fault(kill_broker),
    "trial-kill": Fault(kill_trial),
    "raylet-kill": Fault(kill_raylet, any_code=True),
    "gcs-kill": Fault(kill_gcs, any_code=True),
    "power-cut": Fault(kill_everything, (-9,)),
    "sigterm": Fault(terminate, (143,)),
    "sigint": Fault(interrupt, (130,)),
    "sigint-twice": Fault(interrupt_twice, (130,)),
    "worker-pause": Fault(pause_worker),
    "driver-pause": Fault(pause_driver),
    "two-drivers": Fault(two_drivers),
    "checkpoint-torn": Fault(tear_checkpoint, (0, -9), says="is damaged"),
    "checkpoint-flipped": Fault(flip_checkpoint, (0, -9), says="is damaged"),
    "journal-torn": Fault(tear_journal),
    "torn-directories": Fault(leave_torn_directories),
    "stage-deleted": Fault(delete_unfinished, (0, 1)),
    "artefact-flipped": Fault(flip_artefact, (-9,), says="is damaged or gone"),
    "artefact-flipped-live": Fault(flip_artefact_running, (0, 1), later=True, readers=True),
    "done-torn": Fault(tear_done, (-9,), says="is damaged or gone"),
    "done-deleted": Fault(delete_done, (0, 1, -9), readers=True),
    "finished-deleted": Fault(delete_finished, (0, 1, -9), readers=True),
    "stale-claim": Fault(leave_stale_claim, (-9,)),
    "disk-full": Fault(fill_disk, (0, 1, 2), small_disk=True),  # 2 where there is no room for a store
    "records-locked": Fault(lock_records),
    "records-deleted": Fault(delete_records, later=True),
    "records-hidden": Fault(hide_records),
}
