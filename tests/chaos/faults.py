"""What can happen to a study: each fault takes a scene with a run, hits something, and says what.

A fault returns None where the run ended before there was anything to hit. Faults that damage what a dead run left kill
the run first; the scene starts the command again afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.chaos.aim import (
    Hit,
)
from tests.chaos.files import (
    delete_done,
    delete_finished,
    delete_records,
    delete_unfinished,
    fill_disk,
    flip_artefact,
    flip_artefact_running,
    flip_checkpoint,
    hide_records,
    leave_stale_claim,
    leave_torn_directories,
    lock_records,
    tear_checkpoint,
    tear_done,
    tear_journal,
)
from tests.chaos.processes import (
    interrupt,
    interrupt_twice,
    kill_any_stage,
    kill_at_publish,
    kill_broker,
    kill_driver,
    kill_everything,
    kill_gcs,
    kill_raylet,
    kill_trial,
    kill_worker,
    pause_driver,
    pause_worker,
    terminate,
    two_drivers,
)
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

    @property
    def interrupts(self) -> bool:
        """Whether it may end a driver, and with it what that one computes."""
        return self.any_code or not {0, 1, 2}.issuperset(self.codes)


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
