"""`python -m tests.chaos --seeds 0-49`: throw faults at a study, one home a seed, and check what is left.

Prints a line for every fault: seed, seconds into the scene, kind, what was hit, how it ended. A seed that fails keeps
its number: the same seed throws the same faults again, at the same progress of the study.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tests.chaos.checks import Expected, problems, remember
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.others import can_be_another
from tests.chaos.scene import HUNG, Run, Scene, can_mount

USUAL = "study"
MOST_RUNS = 6  # of the command, until it ends by itself
BEHIND = ("MLflow is behind", "MLflow lacks")  # what a run says that leaves records to the next one


@dataclasses.dataclass
class Event:
    """A fault of a seed: when, what, and what came of it."""

    seed: int
    kind: str
    seconds: float = 0.0
    hit: str = "nothing: the run had ended"
    ended: str = ""
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"seed {self.seed:3d}  {self.seconds:5.1f} s  {self.kind:22} {self.hit}  ->  {self.ended}"


def main(words: list[str] | None = None) -> int:
    """Run the seeds; returns 0 where all passed."""
    options = _options(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no scene stays behind
    kinds = [kind for kind in options.kinds.split(",") if kind] or list(FAULTS)
    if not can_mount():
        kinds = [kind for kind in kinds if not FAULTS[kind].small_disk]
        print("no right to mount a small file system: faults that need one are left out", flush=True)
    if not can_be_another():
        kinds = [kind for kind in kinds if not FAULTS[kind].other_user]
        print("no right to act as another user: faults that need it are left out", flush=True)
    if not kinds:
        return 0
    known: dict[Path, Expected] = {}
    events: list[Event] = []
    for seed in _seeds(options.seeds):
        study = options.study or study_of(seed, kinds)
        if study not in known:
            known[study] = found = undisturbed(study)
            stages, runs = len(found.results), len(found.points)
            print(f"{study.name} undisturbed: {stages} stages, {runs} MLflow runs, {found.seconds:.0f} s", flush=True)
        events += disturbed(seed, study, known[study], kinds, options.keep_logs)
    text = summary(events)
    print(f"\n{text}", flush=True)
    if options.summary:
        options.summary.write_text(text + "\n")
    return 1 if any(event.failures for event in events) else 0


def study_of(seed: int, kinds: list[str]) -> Path:
    """The study that a seed's faults are thrown at: that of the first kind which has one of its own."""
    named = [FAULTS[kind].study for kind in chosen_kinds(random.Random(seed), seed, kinds)]
    own = next((name for name in named if name != USUAL), USUAL)
    return Path(__file__).with_name(f"{own}.yaml")


def undisturbed(study: Path) -> Expected:
    """What the study leaves when nothing happens; `RuntimeError` where that fails already."""
    scene = Scene(study)
    try:
        run = scene.start()
        if scene.finish(run) != 0 or (left := scene.wait_gone()):
            raise RuntimeError(f"the undisturbed run ended with {run.code}, left {left}:\n{run.text[-3000:]}")
        return remember(scene.home, time.monotonic() - scene.began)
    finally:
        scene.close()


def disturbed(seed: int, study: Path, expected: Expected, kinds: list[str], logs: Path | None) -> list[Event]:
    """One seed: one to three faults at random moments of one home, then the checks."""
    choice = random.Random(seed)
    chosen = chosen_kinds(choice, seed, kinds)
    moments = sorted(choice.uniform(0.0, 0.8) for _ in chosen)
    events = [Event(seed, kind) for kind in chosen]
    words = dict.fromkeys(FAULTS[kind].words for kind in chosen)  # of each kind's own, once
    small = any(FAULTS[kind].small_disk for kind in chosen)
    server = any(FAULTS[kind].server for kind in chosen)
    scene = Scene(study, seed, small_disk=small, server=server, words=[word for several in words for word in several])
    try:
        if scene.server is not None:
            scene.server.start()
        run = scene.start()
        orphans: list[str] = []
        for event, moment in zip(events, moments, strict=True):
            if not scene.alive():
                orphans += _over(scene, run)
                run = scene.start()
            scene.wait_progress(int(moment * len(expected.results)))
            time.sleep(choice.uniform(0.0, 1.0))
            event.seconds = time.monotonic() - scene.began
            event.hit = (_act(scene, FAULTS[event.kind]) if scene.alive() else None) or event.hit
        orphans += _to_the_end(scene)
        if any(FAULTS[event.kind].later for event in events):
            orphans += _again(scene)
        failures = [f"left running: {name}" for name in orphans]
        failures += [*_wrong_ends(scene, events), *problems(scene, expected)]
    except Exception as error:  # the harness itself failed: told like any failure, the other seeds go on
        failures = [f"the harness: {type(error).__name__}: {error}"]
    finally:
        _keep_logs(scene, seed, logs)
        scene.close()
    codes = ", ".join(str(run.code) for run in scene.runs)
    for event in events:
        event.failures = tuple(failures)
        event.ended = f"{'FAILED' if failures else 'same bits'}, exits {codes}"
        print(event, flush=True)
    for failure in failures:
        print(f"          {failure}", flush=True)
    return events


def _act(scene: Scene, fault: Fault) -> str | None:
    """Let a fault hit. What reads what it harms begins again, once; so does what it ends, or lets fail, under a driver
    that goes on beside."""
    if not (fault.readers or ((fault.interrupts or fault.small_disk) and scene.beside())):
        return fault.act(scene)
    before = {stage.key: stage for stage in scene.stages() if not stage.done}
    hit = fault.act(scene)
    time.sleep(0.5)  # a reader that had just looked at its inputs shows itself
    after = {stage.key: stage for stage in scene.stages() if not stage.done}
    scene.forgive((before | after).values())
    return hit


def chosen_kinds(choice: random.Random, seed: int, kinds: list[str]) -> list[str]:
    """The faults of a seed in their order: the seed's own kind, every kind in turn, and up to two of any kind."""
    chosen = [kinds[seed % len(kinds)], *choice.choices(kinds, k=choice.choice([0, 0, 1, 1, 2]))]
    choice.shuffle(chosen)
    return chosen


def summary(events: list[Event]) -> str:
    """A Markdown table: kinds of fault, how often thrown, how often too late to hit, in how many seeds that failed."""
    thrown = Counter(event.kind for event in events)
    late = Counter(event.kind for event in events if event.hit.startswith("nothing"))
    failed = Counter(event.kind for event in events if event.failures)
    lines = ["| fault | thrown | too late | in failed seeds |", "|---|--:|--:|--:|"]
    lines += [f"| {kind} | {thrown[kind]} | {late[kind]} | {failed[kind]} |" for kind in FAULTS if thrown[kind]]
    seeds = {event.seed for event in events}
    bad = sorted({event.seed for event in events if event.failures})
    told = f"{len(seeds)} seeds, {len(events)} faults of {len(thrown)} kinds, {len(bad)} seeds failed"
    return "\n".join([*lines, "", told + (f": {', '.join(map(str, bad))}" if bad else "")])


def _over(scene: Scene, run: Run) -> list[str]:
    """Wait for a run, and any beside it, to end; names of processes that outlived it by too much."""
    for started in scene.runs:
        if started.code is None:
            scene.finish(started)
    return scene.wait_gone()


def _to_the_end(scene: Scene) -> list[str]:
    """Run the command again until it ends by itself with all done; names of processes that outlived a run."""
    orphans = _over(scene, scene.run)
    while (scene.run.code != 0 or any(told in scene.run.text for told in BEHIND)) and len(scene.runs) < MOST_RUNS:
        orphans += _again(scene)
    return orphans


def _again(scene: Scene) -> list[str]:
    scene.start()
    return _over(scene, scene.run)


def _wrong_ends(scene: Scene, events: list[Event]) -> list[str]:
    """Exit codes that no fault explains, crashes that nobody caught, damage that nobody told of."""
    faults = [FAULTS[event.kind] for event in events]
    allowed = {0, *(code for fault in faults for code in fault.codes)}
    told = []
    for index, run in enumerate(scene.runs):
        if run.code == HUNG:
            told.append(f"run {index} hung, its last words: {run.text[-200:]!r}")
        elif run.code not in allowed and not any(fault.any_code for fault in faults):
            told.append(f"run {index} ended with {run.code}: {run.text[-200:]!r}")
        if "Traceback (most recent call last)" in run.text and not any(fault.any_code for fault in faults):
            told.append(f"run {index} printed a traceback: {run.text.strip().splitlines()[-1][:200]!r}")
    if scene.run.code != 0:
        told.append(f"{len(scene.runs)} runs, and the last one ended with {scene.run.code}")
    alone = len(events) == 1 and not events[0].hit.startswith("nothing")
    if alone and not any(faults[0].says in run.text for run in scene.runs):
        told.append(f"nobody said {faults[0].says!r}")
    return told


def _keep_logs(scene: Scene, seed: int, logs: Path | None) -> None:
    if logs is None:
        return
    logs.mkdir(parents=True, exist_ok=True)
    for log in scene.root.glob("*.log"):
        shutil.copy(log, logs / f"seed-{seed}-{log.name}")


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", default="0-49", help="one seed, or the first and last of a range: 0-49")
    parser.add_argument("--study", type=Path, help="the study to disturb; default: that of the faults")
    parser.add_argument("--kinds", default="", help=f"only these, by comma: {', '.join(FAULTS)}")
    parser.add_argument("--summary", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--keep-logs", type=Path, help="keep what every run printed in this folder")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
