"""The time that a run will still take: what is left of its plan, played through as the broker plays it.

A pure function of the plan, of what a look at the store found, and of the moment. Place in the flow: the terminal tells
it all the while. Invariant: it goes by measured cost alone, this run's first; what stands in for a kind of work that
nothing has measured is named.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping

from orchestrator.record.screen.costs import Cost, Costs, Models, Observation, expected, models_of, observations
from orchestrator.record.screen.facts import Facts, Stage
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ProbesSpec, Spec, ThroughputSpec

TURN = 0.1  # seconds from the end of a stage to the beginning of the next on its core
UNKNOWN = "time left: known once the first steps are measured"
WORDS = {
    "evaluate": "evaluations",
    "score": "scores",
    "blend": "blends",
    "probes": "probes",
    "throughput": "speeds",
    "beside": "distillation",
    "layers": "distillation without logits",
    "alone": "training without a teacher",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A plan as the estimate reads it: all its stages in the broker's order, and the models they compute with."""

    specs: Mapping[str, Spec]
    models: Models
    students: Mapping[str, frozenset[str]]  # key of a measurement of speed -> of the stages that it is of
    may_stop: bool  # whether trials may end early
    may_grow: bool = False  # whether results will bring further stages

    @staticmethod
    def of(plan: Plan, speeds: Mapping[str, ThroughputSpec]) -> Work:
        """The work of a plan with its measurements of speed."""
        specs = {**plan.specs, **{spec.key: spec for spec in speeds.values()}}
        students: dict[str, set[str]] = {}
        for trained, spec in speeds.items():
            students.setdefault(spec.key, set()).add(trained)
        frozen = {key: frozenset(keys) for key, keys in students.items()}
        may_grow = bool(plan.rest or plan.drawing.left)
        return Work(specs, models_of(specs), frozen, plan.study.search.early_stopping is not None, may_grow)


@dataclasses.dataclass(frozen=True)
class Left:
    """Seconds that are left, and the kinds of work among them that were not measured yet."""

    seconds: float
    guessed: frozenset[str] = frozenset()
    at_most: bool = False
    at_least: bool = False

    def __str__(self) -> str:
        how = "at most" if self.at_most else "at least" if self.at_least else "about"
        told = f"{how} {duration(self.seconds)} left"
        named = ", ".join(WORDS[name] for name in sorted(self.guessed) if name in WORDS)
        return f"{told} (not measured yet: {named})" if named else told


@dataclasses.dataclass(frozen=True)
class Task:
    """A stage that is to be computed, or is being computed."""

    key: str
    seconds: float
    cores: int
    parents: frozenset[str]
    trains: bool
    running: bool


def time_left(work: Work, facts: Facts, past: Iterable[Observation], cores: int, now: float) -> Left | None:
    """How long a run will still take on so many cores; None where no rate is known that it could be told from.

    Stages come first, then the probes, then the measurements of speed, which have the machine alone. What has failed,
    and what would come after it, is not computed.
    """
    costs = Costs([*past, *observations(facts, work.specs, work.models)])
    lost = _lost(work, facts)
    phases: tuple[list[Task], ...] = ([], [], [])
    guessed: frozenset[str] = frozenset()
    for key, spec in work.specs.items():
        if key in lost or facts[key].state == "done":
            continue
        cost = _left_of(spec, facts[key], work.models, costs, now)
        if cost is None:
            return None
        guessed |= cost.guessed
        phase = 2 if isinstance(spec, ThroughputSpec) else int(isinstance(spec, ProbesSpec))
        taken = cores if phase == 2 else min(spec.cores, cores)
        open_parents = frozenset(parent for parent in spec.parents.values() if facts[parent].state != "done")
        running = facts[key].state == "running"
        phases[phase].append(Task(key, cost.seconds, taken, open_parents, hasattr(spec, "optimizer"), running))
    return Left(sum(played(tasks, cores) for tasks in phases), guessed, work.may_stop, work.may_grow)


def _left_of(spec: Spec, stage: Stage, models: Models, costs: Costs, now: float) -> Cost | None:
    """The seconds of a stage that are still to come."""
    cost = expected(spec, stage, models, costs)
    if cost is None or stage.state != "running":
        return cost
    if not stage.tokens:  # it may still be at its beginning, or takes longer than those before
        return dataclasses.replace(cost, seconds=max(cost.seconds - (now - stage.since), cost.seconds / 10))
    tokens = [0, *(at for at, _ in stage.points[-2:])]
    between = (tokens[-1] - tokens[-2]) / stage.points[-1][1] if stage.points else 0.0
    since_told = min(now - stage.heard, between)  # it has trained on since its newest line
    return dataclasses.replace(cost, seconds=max(cost.seconds - since_told, 0.0))


def _lost(work: Work, facts: Facts) -> set[str]:
    """Stages that will not be computed: what has failed, and all that needs it."""
    lost: set[str] = set()
    for key, spec in work.specs.items():  # parents before children
        students = work.students.get(key, frozenset())
        if (
            facts[key].state == "failed"
            or not lost.isdisjoint(spec.parents.values())
            or (students and students <= lost)
        ):
            lost.add(key)
    return lost


def played(tasks: Iterable[Task], cores: int) -> float:
    """Seconds until the last of these stages ends, each begun in its turn as `orchestrator.run.turns` gives it: what
    judges before what trains, each in the order given, and nobody overtakes who waits for more cores than are free."""
    order = {task.key: task for task in tasks}
    places = {key: (task.trains, place, key) for place, (key, task) in enumerate(order.items())}
    waits = {key: {parent for parent in task.parents if parent in order} for key, task in order.items()}
    children: dict[str, list[str]] = {}
    for key, parents in waits.items():
        for parent in parents:
            children.setdefault(parent, []).append(key)
    running = [(task.seconds, key) for key, task in order.items() if task.running]
    heapq.heapify(running)
    free = cores - sum(order[key].cores for _, key in running)
    ready = [places[key] for key, task in order.items() if not (task.running or waits[key])]
    heapq.heapify(ready)
    at = 0.0
    while running or ready:
        while ready and (order[ready[0][2]].cores <= free or not running):
            key = heapq.heappop(ready)[2]
            free -= order[key].cores
            heapq.heappush(running, (at + TURN + order[key].seconds, key))
        at, ended = heapq.heappop(running)
        free += order[ended].cores
        for child in children.get(ended, ()):
            waits[child].discard(ended)
            if not (waits[child] or order[child].running):
                heapq.heappush(ready, places[child])
    return at


def duration(seconds: float) -> str:
    """A time as people say it: in steps of five seconds, never none, and from ninety seconds on in minutes."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(5, round(seconds / 5) * 5):.0f} s"


def clock(seconds: float) -> str:
    """Minutes and seconds that have passed."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
