"""What a home remembers of its studies: each as it was asked for, and every run of it with what it cost.

    studies/NAME/ID/            a variant: equal plans are one, whatever they were written like
                    study.yaml  the file, as it was at the newest run
                    asked.json  its values, what it read by fingerprint and place, device, hardware, keys of its stages
                    runs/0001.json  one file a run: who, when, with what, how it ended, what it cost
                    alive       held by every running driver
                    report.md   and the other files of the newest report
    studies/NAME/newest         a link to the variant that was run last

Place in the flow: a run writes it; whoever looks (status, report, export, gc, list, compare) plans from it, so the
study's inputs may be gone. Invariant: no variant is written over by another, and runs at one time have a file each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from orchestrator.files import canonical_json, read_json, write_json, write_text
from orchestrator.record.home import Home, held, holding
from orchestrator.record.provenance import Provenance
from orchestrator.run.growing import Growing
from orchestrator.run.store import Store
from orchestrator.study.loader import Document, StudyError, validate
from orchestrator.study.path import nothing_known
from orchestrator.study.plan import Plan, Planner
from orchestrator.study.sources import Resolved
from orchestrator.study.spec import Device
from orchestrator.study.trial import DECIDES

NEWEST, ASKED, ALIVE, RUNS = "newest", "asked.json", "alive", "runs"
SHOWN = ("question", "report", "record")  # keys of a study that tell how it is shown: they make no other variant
DIGITS = 8  # of an id
RESOLVED = TypeAdapter(Resolved)
Planned = TypeVar("Planned")


class UnknownStudyError(ValueError):
    """A name that the home does not know, or what another version of this program remembered."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A study as it was asked for: enough to plan it again without what it reads."""

    file: str  # path of the study file
    text: str
    overrides: tuple[str, ...]
    values: dict[str, Any]  # with the overrides laid over them
    places: Mapping[tuple[str | int, ...], str] = dataclasses.field(compare=False)  # of values in the file; not kept
    resolved: Resolved
    device: Device
    hardware: str

    def plan(self) -> Plan:
        """Its plan before anything runs. Raises what `growing` does."""
        return self._planned(lambda planner: planner(nothing_known))

    def growing(self, store: Store) -> Growing:
        """Its plan with the results of a store. Raises `StudyError`, of a study that was run before
        `UnknownStudyError`."""
        return self._planned(lambda planner: Growing(planner, store))

    def _planned(self, made: Callable[[Planner], Planned]) -> Planned:
        document = Document(self.file, self.values, self.places)
        try:
            return made(Planner(document, validate(document), self.resolved, self.device, self.hardware))
        except StudyError as error:
            if self.places:
                raise
            raise UnknownStudyError(
                f"this study was run by another version of layerswap, which allowed what this one does not ({error}): "
                "use that version, or run it again"
            ) from None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What all runs of a variant took together."""

    runs: int
    seconds: float
    trained: tuple[str, ...]  # keys of the stages that they trained
    peak_rss_mb: float  # of the largest run


@dataclasses.dataclass(frozen=True)
class Variant:
    """A study of a home, by name and id. Looking raises nothing where files are missing or torn."""

    name: str
    id: str
    folder: Path

    @property
    def title(self) -> str:
        """How people write it: NAME/ID."""
        return f"{self.name}/{self.id}"

    def asked(self) -> Asked:
        """As it was asked for at its newest run; `UnknownStudyError` where that cannot be read."""
        try:
            found = read_json(self.folder / ASKED)
            resolved = RESOLVED.validate_python(found["resolved"])
            text = (self.folder / "study.yaml").read_text(encoding="utf-8")
            return Asked(
                found["file"], text, tuple(found["overrides"]), found["values"], {}, resolved, found["device"],
                found["hardware"],
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise self._unreadable(error) from None

    def needed(self) -> frozenset[str]:
        """Keys of its stages, its measurements included, as the program of then named them; `UnknownStudyError` where
        that cannot be read."""
        try:
            return frozenset(read_json(self.folder / ASKED)["keys"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from None

    def runs(self) -> list[dict[str, Any]]:
        """Its runs, oldest first; the status of one whose process is gone is `interrupted`."""
        found = []
        for path in sorted((self.folder / RUNS).glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                run = read_json(path)
                found.append({**run, "status": run["status"]})
        running = [run for run in found if run["status"] == "running"]
        if running and not self.alive:
            for run in running:
                run["status"] = "interrupted"
        return found

    @property
    def alive(self) -> bool:
        """Whether somebody runs it at this moment."""
        return held(self.folder / ALIVE)

    def cost(self) -> Cost:
        """Of all runs so far."""
        runs = self.runs()
        trained = sorted({key for run in runs for key in run["trained"]})
        peak = max((run["peak_rss_mb"] for run in runs), default=0.0)
        return Cost(len(runs), sum(run["seconds"] for run in runs), tuple(trained), peak)

    def stopped(self) -> dict[str, int]:
        """Trials that early stopping ended in a run that came to its end, by the steps they finished: they stay so."""
        decided = [run["stopped"] for run in self.runs() if run["stopped"] is not None]
        return dict(decided[-1]) if decided else {}

    def remember(self, asked: Asked, keys: set[str]) -> None:
        """Write down what is about to run, and make it the newest of its name.

        Keys keep their order: a grid's numbers and names of trials follow it.
        """
        write_text(self.folder / "study.yaml", asked.text)
        told = {
            field.name: getattr(asked, field.name)
            for field in dataclasses.fields(asked)
            if field.name not in ("text", "places")
        }
        resolved = RESOLVED.dump_python(asked.resolved, mode="json")
        write_json(self.folder / ASKED, {**told, "resolved": resolved, "keys": sorted(keys)}, sort_keys=False)
        _link(self.folder.parent / NEWEST, self.id)

    def _unreadable(self, error: Exception) -> UnknownStudyError:
        where = self.folder / ASKED
        return UnknownStudyError(
            f"{where} cannot be read ({_first_line(error)}): run the study again, or remove its folder"
        )

    @contextlib.contextmanager
    def running(self, provenance: Provenance) -> Iterator[Run]:
        """A run of this process, alive until the block ends."""
        (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
        with holding(self.folder / ALIVE):
            yield Run(_new_file(self.folder / RUNS), provenance)


class Run:
    """One run as it goes on; it is written down whenever something changes, as far as the disk takes it."""

    def __init__(self, path: Path, provenance: Provenance) -> None:
        self.path = path
        self.known: dict[str, Any] = {
            **dataclasses.asdict(provenance), "number": int(path.stem), "pid": os.getpid(), "started": time.time(),
            "seconds": 0.0, "status": "running", "trained": [], "reused": 0, "peak_rss_mb": 0.0, "stopped": None,
            "failures": {},
        }  # fmt: skip
        self.tell()

    def tell(self, **more: Any) -> None:
        """Write down what is new."""
        self.known |= more
        with contextlib.suppress(OSError):  # a full disk must not end a run
            write_json(self.path, self.known)


def identity(plan: Plan) -> str:
    """The id of a plan's variant: equal for plans that ask for the same stages, trial by trial, and measure alike."""

    def keys(steps: Any) -> list[list[str]]:
        return [[step.train.key, step.evaluate.key, *(spec.key for spec in step.probed)] for step in steps]

    drawn = [spec.key for spec in plan.drawing.rounds[:1]]  # all that comes later hangs on the first round
    ruled = bool(drawn) or any(trial.ruled for trial in plan.trials)  # then some controls come later
    controls = {name: keys([step]) for name, step in plan.controls.items()}
    asked = {
        "teacher": keys([plan.teacher]),
        "trials": [[trial.rule] if trial.ruled else keys(trial.steps) for trial in plan.trials if not drawn],
        "controls": plan.study.controls.model_dump(mode="json") if ruled else controls,
        "search": plan.study.search.model_dump(mode="json", exclude={"space"}),
        "throughput": plan.study.throughput.model_dump(mode="json"),
    }
    if drawn:
        asked["drawn"] = [*drawn, plan.study.model_dump(mode="json", include=DECIDES)]
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:DIGITS]


def variant_of(home: Home, plan: Plan) -> Variant:
    """Where the home remembers this plan, whether or not it does."""
    name, made = plan.study.study, identity(plan)
    return Variant(name, made, home.study(name) / made)


def variants(home: Home, name: str | None = None) -> list[Variant]:
    """All that the home remembers, of one name or of all, the one that was run last first."""
    found = [
        Variant(path.parent.parent.name, path.parent.name, path.parent)
        for path in (home.root / "studies").glob(f"{name or '*'}/*/{ASKED}")
        if not path.parent.is_symlink()
    ]
    return sorted(found, key=lambda variant: (_began(variant), variant.title), reverse=True)


def named(home: Home, title: str) -> Variant:
    """The variant NAME/ID, where the id may be cut short, or the newest of NAME. Raises `UnknownStudyError`."""
    name, _, start = title.partition("/")
    known = variants(home, name) if name else []
    found = [variant for variant in known if variant.id.startswith(start)]
    if not known:
        names = sorted({variant.name for variant in variants(home)})
        there = f"it knows {', '.join(names)}" if names else "nothing was run there yet"
        raise UnknownStudyError(f"{title}: no study file, and no study of {home.root}: {there}")
    if not found or (start and len(found) > 1):
        ids = ", ".join(variant.id for variant in known)
        raise UnknownStudyError(f"{title}: {len(found)} variants of {name} begin so: it has {ids}")
    return found[0]


def as_written(home: Home, document: Document) -> Variant | None:
    """The newest variant that was run with the values of this document; None where there is none."""
    wanted = canonical_json(_shown_aside(document.values))
    for variant in variants(home, str(document.values.get("study", ""))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if canonical_json(_shown_aside(read_json(variant.folder / ASKED)["values"])) == wanted:
                return variant
    return None


def _shown_aside(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in SHOWN}


def _began(variant: Variant) -> float:
    """When it was run last; 0 where no run is readable."""
    for path in sorted((variant.folder / RUNS).glob("*.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(read_json(path)["started"])
    return 0.0


def _new_file(folder: Path) -> Path:
    """An empty file of the next free number, which nobody else was given."""
    number = len(list(folder.glob("*.json"))) + 1
    while True:
        path = folder / f"{number:04d}.json"
        try:
            path.open("x").close()
        except FileExistsError:
            number += 1
        else:
            return path


def _link(path: Path, target: str) -> None:
    """Let a link point there from now on; where the file system has no links there is none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)


def _first_line(error: Exception) -> str:
    told = json.dumps(str(error.args[0])) if isinstance(error, KeyError) and error.args else str(error)
    return (told.strip().splitlines() or [type(error).__name__])[0]
