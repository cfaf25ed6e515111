"""Faults that kill, stop or double processes; see `faults`."""

from __future__ import annotations

import os
import signal
import time

from tests.chaos.aim import Hit, catch_publishing, end, kill, kill_named
from tests.chaos.scene import CONTINUE, KILL, STOP, Scene, Stage, signal_to


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


def kill_in_choice(scene: Scene) -> Hit:
    return _kill_one_or_all(scene, ("score", "blend", "choice"))


def kill_in_draw(scene: Scene) -> Hit:
    return _kill_one_or_all(scene, ("draw",))


def _kill_one_or_all(scene: Scene, kinds: tuple[str, ...]) -> Hit:
    """Kill a stage of these kinds that is being computed, or the driver meanwhile."""
    stage = scene.wait(lambda: scene.running(kinds=kinds), pause=0.002)
    if stage is None:
        return None
    if scene.random.random() < 0.5:
        return kill(scene, stage)
    return f"{kill_driver(scene)} in {stage}"


def kill_at_gate(scene: Scene) -> Hit:
    """Kill the driver while a student is judged, or is trained on since a gate wants it."""

    def look() -> Stage | None:
        return scene.running(kinds=("evaluate",)) or scene.running(extended=True)

    stage = scene.wait(look, pause=0.002)
    return None if stage is None else f"{kill_driver(scene)} in {stage}"


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


def press_memory(scene: Scene) -> Hit:
    """Run the command for a while with a Ray that takes the machine's memory for full, and ends what it can."""
    end(scene)
    before = {stage.key: stage.attempts for stage in scene.stages()}
    scene.start(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="200")
    scene.wait(lambda: None, seconds=scene.random.uniform(15.0, 30.0))
    code = scene.run.process.poll()
    if code is None:
        end(scene)
    killed = {stage.key: stage.attempts - before.get(stage.key, 0) for stage in scene.stages()}
    for stage in scene.stages():
        scene.forgive([stage], killed[stage.key])
    return f"memory full for {sum(killed.values())} attempts, {'killed' if code is None else f'ended with {code}'}"
