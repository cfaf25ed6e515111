"""The Python API: what the commands do, for notebooks and scripts.

    import orchestrator as ls

    study = ls.load("studies/layerwise.yaml", "seed=1")
    study.plan()            # the tree of stages, as text
    study.run()             # its exit code
    study.records()         # a row for the teacher, each control and each stage of each trial: a pandas frame
    ls.home("runs").studies()
    ls.home("runs").study("layerwise").records()

Place in the flow: beside the commands, on the same functions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.given import asked_before, asked_of, device_named
from orchestrator.record.home import Home, default_home
from orchestrator.record.remembered import Asked, variants
from orchestrator.run.environment import own_process
from orchestrator.run.hardware import hardware

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.record.job import Job

WHOLE = ("stage_index", "stage_count", "swapped", "layers")  # columns of whole numbers


def load(study: str | Path, *overrides: str, home: str | Path | None = None) -> StudyHandle:
    """A study file with `key=value` overrides; the home is the study's usual one unless given.

    Raises `ValueError` that names every mistake by file, line and key.
    """
    file = Path(study)
    return StudyHandle(asked_of(file, overrides, "cpu"), Home(Path(home) if home else default_home(file)))


def home(root: str | Path) -> HomeHandle:
    """What was run below a directory."""
    return HomeHandle(Home(Path(root)))


@dataclasses.dataclass(frozen=True)
class HomeHandle:
    """A home and what it remembers."""

    place: Home

    def studies(self) -> pd.DataFrame:
        """A row for every variant of every study, the one that was run last first: texts, as `layerswap list` tells."""
        import pandas as pd

        from orchestrator.record.catalogue import listed

        return pd.DataFrame(listed(self.place), dtype=str)

    def study(self, title: str) -> StudyHandle:
        """The variant NAME/ID, or the newest of NAME, as it was run. Raises `ValueError` for one that is not known."""
        return StudyHandle(asked_before(self.place, Path(title), ()), self.place)

    def titles(self) -> list[str]:
        """NAME/ID of every variant, the one that was run last first."""
        return [variant.title for variant in variants(self.place)]


@dataclasses.dataclass(frozen=True)
class StudyHandle:
    """A study in a home: as a file says it, or as it was run."""

    asked: Asked
    place: Home

    @property
    def job(self) -> Job:
        """Its plan with the commands that belong to it. Raises `ValueError` for a study that cannot be planned."""
        from orchestrator.record.job import Job

        words = f"{self.asked.file} {' '.join(f'--set {one}' for one in self.asked.overrides)}".strip()
        commands = {
            name: f"layerswap {name} {words} --home {self.place.root}" for name in ("run", "report", "export", "ui")
        }
        return Job.of(self.asked, self.place, commands)

    def plan(self) -> str:
        """The tree of stages, what is done of it and what the rest takes, as `layerswap plan` prints it."""
        from orchestrator.record.screen.plan_view import plan_text
        from orchestrator.run.store import Store

        job = self.job
        return plan_text(job.plan, Store(self.place.store, write=False), job.speeds)

    def run(self, **where: Any) -> int:
        """Run it, or go on with it, and return the exit code; `where` are the fields of `record.running.Where`.

        Raises `ValueError` where it cannot run as asked; then nothing was written.
        """
        own_process()
        from orchestrator.record.running import Where, start
        from orchestrator.run.interrupt import Interrupt

        chosen = Where(**where)
        device = device_named(chosen.device or "cpu")
        asked = dataclasses.replace(self.asked, device=device, hardware=hardware(device))
        with Interrupt() as interrupt:
            return start(StudyHandle(asked, self.place).job, asked.resolved, chosen, interrupt)

    def records(self) -> pd.DataFrame:
        """A row for the teacher, each control and each finished stage of each trial, as the report has them.

        Columns: kind, name, trial, stage_index, stage_count, outcome (of a stage: kept, extended, given_back or last),
        last (its trial ends with it), operator, words (the trial's values), stage_key, swapped (layers replaced),
        layers (of all), and a number for every metric, of speeds `prefill_ratio.256` and so on. What was not measured
        is missing (`pd.NA`).
        """
        import pandas as pd

        from orchestrator.record.records import make_records
        from orchestrator.run.store import Store

        job = self.job
        rows = make_records(job.plan, Store(self.place.store, write=False), job.speeds)
        frame = pd.json_normalize([_flat(row) for row in rows])
        frame["last"] = frame["last"].astype("boolean")
        numbers = [name for name in frame.columns if name != "last" and pd.api.types.is_numeric_dtype(frame[name])]
        return frame.astype({name: "Int64" if name in WHOLE else "Float64" for name in {*numbers, *WHOLE}})


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    told = ("kind", "name", "trial", "stage_index", "stage_count", "outcome", "last", "operator", "words", "stage_key")
    counts = {"swapped": len(row["swapped_layers"]), "layers": row["total_layers"]}
    return {**{name: row[name] for name in told}, **counts, **row["metrics"]}
