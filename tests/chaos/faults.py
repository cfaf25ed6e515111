"""What can happen to a study: each fault takes a scene with a run, hits something, and says what.

A fault returns None where the run ended before there was anything to hit. Faults that damage what a dead run left kill
the run first; the scene starts the command again afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.chaos import files, others, processes
from tests.chaos.aim import Hit
from tests.chaos.scene import Scene


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
    server: bool = False  # records go to an MLflow server
    other_user: bool = False  # it needs the right to act as another user
    words: tuple[
        str, ...
    ] = ()  # that every run of its scene is given; {root} is the scene's own folder, {server} its server
    study: str = "study"  # the one of this folder that it is thrown at

    @property
    def interrupts(self) -> bool:
        """Whether it may end a driver, and with it what that one computes."""
        return self.any_code or not {0, 1, 2}.issuperset(self.codes)


LEASED = ("--claims", "lease")
SERVED = ("--tracking-uri", "{server}")
MIRRORED = ("--mirror", "file://{root}/mirror")
FAULTS: dict[str, Fault] = {
    "driver-kill": Fault(processes.kill_driver, (-9,)),
    "worker-kill": Fault(processes.kill_worker),
    "stage-kill": Fault(processes.kill_any_stage),
    "publish-kill": Fault(processes.kill_at_publish),
    "broker-kill": Fault(processes.kill_broker),
    "trial-kill": Fault(processes.kill_trial),
    "raylet-kill": Fault(processes.kill_raylet, any_code=True),
    "gcs-kill": Fault(processes.kill_gcs, any_code=True),
    "power-cut": Fault(processes.kill_everything, (-9,)),
    "sigterm": Fault(processes.terminate, (143,)),
    "sigint": Fault(processes.interrupt, (130,)),
    "sigint-twice": Fault(processes.interrupt_twice, (130,)),
    "worker-pause": Fault(processes.pause_worker),
    "driver-pause": Fault(processes.pause_driver),
    "two-drivers": Fault(processes.two_drivers),
    "checkpoint-torn": Fault(files.tear_checkpoint, (0, -9), says="is damaged"),
    "checkpoint-flipped": Fault(files.flip_checkpoint, (0, -9), says="is damaged"),
    "journal-torn": Fault(files.tear_journal),
    "torn-directories": Fault(files.leave_torn_directories),
    "stage-deleted": Fault(files.delete_unfinished, (0, 1)),
    "artefact-flipped": Fault(files.flip_artefact, (-9,), says="is damaged or gone"),
    "artefact-flipped-live": Fault(files.flip_artefact_running, (0, 1), later=True, readers=True),
    "done-torn": Fault(files.tear_done, (-9,), says="is damaged or gone"),
    "done-deleted": Fault(files.delete_done, (0, 1, -9), readers=True),
    "finished-deleted": Fault(files.delete_finished, (0, 1, -9), readers=True),
    "stale-claim": Fault(files.leave_stale_claim, (-9,)),
    "lease-kill": Fault(processes.kill_worker, words=LEASED),
    "lease-left": Fault(files.leave_lease, (-9,), words=LEASED),
    "mirror-altered": Fault(files.alter_mirror, (0, 1, -9), readers=True, words=MIRRORED),
    "mirror-escapes": Fault(files.lead_out_of_mirror, (0, 1, -9), readers=True, words=MIRRORED),
    "mirror-away": Fault(files.hide_mirror, (0, 1), words=MIRRORED),
    "choice-kill": Fault(processes.kill_in_choice, (-9,), study="chosen"),
    "gate-kill": Fault(processes.kill_at_gate, (-9,), study="chosen"),
    "draw-kill": Fault(processes.kill_in_draw, (-9,), study="drawn"),
    "memory-full": Fault(processes.press_memory, (0, 1, -9)),
    "disk-full": Fault(files.fill_disk, (0, 1, 2), small_disk=True),  # 2 where there is no room for a store
    "records-locked": Fault(files.lock_records),
    "records-deleted": Fault(files.delete_records, later=True),
    "records-hidden": Fault(files.hide_records),
    "server-away": Fault(others.pause_server, server=True, words=SERVED),
    "server-kill": Fault(others.kill_server, server=True, words=SERVED),
    "second-user": Fault(others.look_and_try, other_user=True),
}
