"""Faults that harm files: of stages, of mirrors and records, and the disk they are on; see `faults`."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import time
from pathlib import Path

from orchestrator.files import sealed, sha256_file, unsealed
from tests.chaos.aim import (
    Hit,
    end,
    find_database,
    finished,
    finished_with_files,
    flip_file,
    flipped,
    freeze,
    harm_checkpoint,
    kill,
    read_line,
)
from tests.chaos.scene import ESCAPED, Scene, newest_checkpoints, read

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


def leave_lease(scene: Scene) -> Hit:
    """A lease that a process on another machine does not renew any more."""
    if scene.wait(lambda: scene.running(trained=True)) is None:
        return None
    end(scene)
    elsewhere = {"machine": "elsewhere", "pid": 1, "birth": "1"}
    open_stages = [stage for stage in scene.stages() if not stage.done]
    for stage in open_stages:
        lease = {"owner": "elsewhere-1", "counter": 9, "ttl": 3.0, "holder": elsewhere}
        (stage.folder / "lease.json").write_text(json.dumps(lease))
    return f"{len(open_stages)} leases of another machine"


# Mirrors


def alter_mirror(scene: Scene) -> Hit:
    """A stage is gone here, and what the mirror says of it has a flipped bit."""
    manifest = _gone_but_mirrored(scene)
    if manifest is None:
        return None
    manifest.write_bytes(flipped(scene, manifest.read_bytes()))
    return f"stage {manifest.parent.name[:8]}: a bit of the mirror's DONE.json flipped, and the stage deleted here"


def lead_out_of_mirror(scene: Scene) -> Hit:
    """The mirror says of a stage that is gone here, with a digest that fits, that a file of it lies in the home."""
    manifest = _gone_but_mirrored(scene)
    if manifest is None:
        return None
    (scene.root / ESCAPED).write_text("evil")
    whole = unsealed(json.loads(manifest.read_text()))
    name = f"../../../../{ESCAPED}"  # of the folder above the mirror; into the folder above the store
    manifest.write_text(json.dumps(sealed({**whole, "files": {name: sha256_file(scene.root / ESCAPED)}})))
    return f"stage {manifest.parent.name[:8]}: the mirror leads out of the store"


def hide_mirror(scene: Scene) -> Hit:
    """The mirror cannot be reached for a while, and comes back."""
    if scene.wait(lambda: next(scene.mirror.glob("??/*/DONE.json"), None)) is None:
        return None
    seconds, aside = scene.random.uniform(2.0, 6.0), scene.root / "mirror-away"
    scene.mirror.rename(aside)
    scene.mirror.write_text("no directory")
    time.sleep(seconds)
    scene.mirror.unlink()
    aside.rename(scene.mirror)
    return f"mirror away for {seconds:.1f} s"


def _gone_but_mirrored(scene: Scene) -> Path | None:
    """The mirror's DONE.json of a finished stage that is deleted here, while its run goes on or after its end."""
    found = scene.wait(lambda: sorted(scene.mirror.glob("??/*/DONE.json")))
    if not found:
        return None
    manifest = scene.random.choice(found)
    if scene.random.random() < 0.5:
        end(scene)
    shutil.rmtree(scene.home / "store" / manifest.parent.relative_to(scene.mirror), ignore_errors=True)
    return manifest


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
    if scene.server is not None:
        scene.server.kill()  # else it goes on in the deleted file
    for path in database.parent.glob("mlflow.db*"):
        path.unlink()
    if scene.server is not None:
        scene.server.start()
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
