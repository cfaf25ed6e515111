"""`python -m tests.benchmarks.searches --home HOME`: searches that learn, held against the grid of a finished study.

Every point that Optuna draws from the grid's own space is a trial that is finished already, so a search is played by
what its trials came to, and nothing is trained. Quality and decoding speed make one number, the hypervolume: the area
that the trials so far dominate, below the grid's highest ratio and above its lowest speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.distill.choosing.draw import draw
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.record.home import Home
from orchestrator.record.remembered import named
from orchestrator.record.speeds import measurements
from orchestrator.run.growing import Growing
from orchestrator.run.store import Store
from orchestrator.study.loader import dump
from orchestrator.study.spec import DrawSpec

SEEDS, ORDERS, BATCH = 3, 200, 2
NEAR = 0.99  # of the grid's hypervolume


@dataclasses.dataclass(frozen=True)
class Tried:
    """A trial of the grid: perplexity and decoding speed over the teacher's, tokens by trained stage."""

    point: str
    ratio: float
    decode: float
    tokens: dict[str, int]


def hypervolume(points: Iterable[tuple[float, float]], worst: tuple[float, float]) -> float:
    """The area that (ratio, decode) points dominate: ratios below the worst one, speeds above the worst one."""
    area, best = 0.0, worst[1]
    for ratio, decode in sorted(points):
        if ratio < worst[0] and decode > best:
            area += (worst[0] - ratio) * (decode - best)
            best = decode
    return area


def tried(home: Home, name: str, length: int) -> tuple[list[Tried], tuple[dict[str, object], ...]]:
    """The finished trials of the study's newest run, by their newest speeds, and its search space."""
    growing = Growing(named(home, name).asked().growing(store := Store(home.store, write=False)).planner, store)
    plan, found = growing.plan, []
    for trial in plan.trials:
        assert trial.end is not None and not trial.open, f"{trial.name} is not finished: run {name} first"
        newest = measurements(store, growing.speeds[trial.end.train.key])[-1]
        speed = store.result(newest.key)["decode_ratio"][str(length)]
        ratio = store.result(trial.end.evaluate.key)["perplexity_ratio"]
        tokens = {step.train.key: step.own_tokens for step in trial.steps}
        found.append(Tried(json.dumps(trial.values, sort_keys=True), ratio, speed, tokens))
    spaces = tuple({key: dump(axis) for key, axis in space.items()} for space in plan.study.search.spaces)
    return found, spaces


def course(order: Sequence[Tried], worst: tuple[float, float], whole: float) -> list[tuple[int, float]]:
    """After every trial: tokens of all distinct stages so far, and the share of the grid's hypervolume."""
    stages: dict[str, int] = {}
    course = []
    for number, trial in enumerate(order, 1):
        stages |= trial.tokens
        points = [(each.ratio, each.decode) for each in order[:number]]
        course.append((sum(stages.values()), hypervolume(points, worst) / whole))
    return course


def drawn(every: dict[str, Tried], spaces: tuple[dict[str, object], ...], sampler: str, seed: int) -> list[Tried]:
    """The trials in the order in which a search with two objectives draws them, all of them."""
    order: list[Tried] = []
    with tempfile.TemporaryDirectory() as folder:
        previous, told = None, ()
        while len(order) < len(every):
            out = Path(folder) / str(len(order))
            out.mkdir()
            spec = DrawSpec(
                previous=None if previous is None else previous.name, told=told, spaces=spaces, whole=(),
                sampler=sampler, directions=("minimize", "maximize"), count=BATCH, seed=seed,
            )  # fmt: skip
            inputs = {} if previous is None else {"previous": previous}
            result = draw(spec, Workplace(inputs, out, out, out, RunContext(folder), print))
            new = [every[json.dumps(point, sort_keys=True)] for point in result["points"]]
            if not new:
                break
            order += new
            previous, told = out, tuple((each.ratio, each.decode) for each in new)
    return order


def row(name: str, courses: Sequence[list[tuple[int, float]]], cost: int) -> str:
    """At half of the grid's tokens the share of its hypervolume; the tokens, as a share, until nearly all is there."""
    half = [max((share for tokens, share in course if tokens <= cost / 2), default=0.0) for course in courses]
    until = [next(tokens for tokens, share in course if share >= NEAR) / cost for course in courses]
    told = [f"{statistics.fmean(each):.3f} [{min(each):.3f}, {max(each):.3f}]" for each in (half, until)]
    return f"| {name} | {len(courses)} | {' | '.join(told)} |"


def main(words: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--study", default="layerwise")
    parser.add_argument("--length", type=int, default=1024, help="at which decoding speed is looked at")
    asked = parser.parse_args(words)
    trials, spaces = tried(Home(asked.home), asked.study, asked.length)
    worst = max(each.ratio for each in trials), min(each.decode for each in trials)
    whole = hypervolume([(each.ratio, each.decode) for each in trials], worst)
    cost = course(trials, worst, whole)[-1][0]
    print(f"{len(trials)} trials, {cost / 1e6:.2f} M tokens of distinct stages; the grid's best:")
    for each in sorted(trials, key=lambda trial: trial.ratio):
        others = [other for other in trials if (other.ratio, other.decode) != (each.ratio, each.decode)]
        if not any(other.ratio <= each.ratio and other.decode >= each.decode for other in others):
            print(f"  {each.ratio:.3f} {each.decode:.2f}x {each.point}")
    print(f"| order | seeds | hypervolume at half the tokens | tokens until {NEAR:.0%} of it |\n|---|--:|--:|--:|")
    every = {each.point: each for each in trials}
    for sampler in ("tpe", "nsga2", "qmc"):
        orders = [drawn(every, spaces, sampler, seed) for seed in range(SEEDS)]
        print(row(sampler, [course(order, worst, whole) for order in orders], cost), flush=True)
    shuffled = [random.Random(seed).sample(trials, len(trials)) for seed in range(ORDERS)]
    print(row("random", [course(order, worst, whole) for order in shuffled], cost))
    return 0


if __name__ == "__main__":
    sys.exit(main())
