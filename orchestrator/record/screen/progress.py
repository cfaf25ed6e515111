"""What the terminal shows while a study runs, read from the store: it stays true whoever computes, and needs no tty.

Place in the flow: a thread of the driver calls `tick` every second. Invariant: an estimate is made from measured rates
only; before the first one it says so.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterable
from typing import TextIO

from orchestrator.distill.training.journal import read_journal
from orchestrator.run.store import FAILURE, Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec, short
from orchestrator.study.stages import Step

EVERY = 20.0  # seconds between lines when nothing happens
# Seconds of an evaluation, of probes and of a measurement of speed, before the first of them.
EVALUATION, PROBES, SPEED = 2.0, 5.0, 5.0
BEGINNING = 1.0  # seconds from a stage's start to its first step


class Progress:
    """Tells events at once and a summary every few seconds."""

    def __init__(
        self, plan: Plan, store: Store, speeds: dict[str, ThroughputSpec], cores: int, out: TextIO | None = None
    ):
        self.plan, self.store, self.cores, self.out = plan, store, cores, out or sys.stdout
        self.began = self.told = time.monotonic()
        self.heard = store.said(0)[1]
        self.users = plan.users()
        self.steps = distinct_steps(plan)
        self.speeds = {spec.key: spec for spec in speeds.values()}
        self.finished = {
            key for key in self.steps if store.finished(key) and store.finished(self.steps[key][1].evaluate.key)
        }
        self.reused = set(self.finished)
        self.started: set[str] = set()
        self.measured = {key for key in self.speeds if store.finished(key)}
        self.probes = {spec.key for step in plan.steps for spec in step.probed}
        self.probed = {key for key in self.probes if store.finished(key)}
        self.data_told = store.finished(plan.tokens.key)
        self.rates: dict[str, float] = {}
        self.before = {key: store.attempt(key) for key in self.steps}  # of earlier runs
        self.watched = self._watched()
        self.failed = {self._failed_attempt(key) for key in self.watched}

    def begin(self) -> None:
        """Say what is there and what will be done."""
        total, shared = len(self.steps), sum(len(names) > 1 for names in self.users.values())
        asked = sum(len(trial.steps) for trial in self.plan.trials)
        tokens = sum(step.own_tokens for key, (_, step) in self.steps.items() if key not in self.finished)
        self._say(
            f"{len(self.plan.trials)} trials ask for {asked} stages, {len(self.users)} distinct ({shared} shared); "
            f"with teacher and controls {total}: {len(self.finished)} finished before, "
            f"{total - len(self.finished)} to do, {tokens / 1e6:.2f} M tokens"
        )

    def tick(self) -> None:
        """Look at the store and say what is new."""
        now = time.monotonic()
        said, self.heard = self.store.said(self.heard)
        for line in said:
            self._say(line)
        if not self.data_told and self.store.finished(self.plan.tokens.key):
            self.data_told = True
            counts = self.store.result(self.plan.tokens.key)
            self._say(
                f"text ready: {counts['train_tokens']:,} training and {counts['valid_tokens']:,} validation tokens"
            )
        for key, (name, step) in self.steps.items():
            done = self.store.finished(key) and self.store.finished(step.evaluate.key)
            if key in self.finished:
                if not done:  # withdrawn, for it was damaged
                    self.finished.discard(key)
                    self.started.discard(key)
                continue
            if done:
                line = self._done_line(name, step)
                self.finished.add(key)
                self._say(line)
            elif key not in self.started and self._running(key):
                self.started.add(key)
                if step.own_tokens:
                    users = self.users.get(key, [])
                    shared = f", for {len(users)} trials" if len(users) > 1 else ""
                    self._say(f"start  {name}: {step.own_tokens:,} tokens{shared}")
        self._tell_failures()
        for key in sorted(self.probes - self.probed):
            if self.store.finished(key):
                self.probed.add(key)
                self._say(f"probes {len(self.probed)} of {len(self.probes)} models")
        for key in self.speeds:
            if key not in self.measured and self.store.finished(key):
                self.measured.add(key)
                self._say(f"speed  {len(self.measured)} of {len(self.speeds)} architectures measured")
        if now - self.told >= EVERY:
            self._summary()

    def _watched(self) -> dict[str, str]:
        """All that may fail, by key, with names for people."""
        named = {self.plan.tokens.key: "text"}
        for key, (name, step) in self.steps.items():
            named |= {key: name, step.evaluate.key: f"evaluation of {name}"}
            named |= {spec.key: f"probes of {name}" for spec in step.probed}
        return named | {key: f"speed of {short(key)}" for key in self.speeds}

    def _failed_attempt(self, key: str) -> tuple[str, int] | None:
        """The attempt that failed last, if the stage is not finished since."""
        if self.store.failure(key) is None or self.store.finished(key):
            return None
        return key, int((self.store.attempt(key) or {}).get("number", 0))

    def _tell_failures(self) -> None:
        for key, name in self.watched.items():
            attempt = self._failed_attempt(key)
            if attempt not in self.failed and attempt is not None:
                self.failed.add(attempt)
                told = self.store.failure(key) or {"error": "gone"}
                self._say(f"FAILED {name}: {told['error']}\n          traceback: {self.store.folder(key) / FAILURE}")

    def _summary(self) -> None:
        running = [
            (name, key, step)
            for key, (name, step) in self.steps.items()
            if key not in self.finished and self._running(key)
        ]
        left = self._time_left()
        self._say(f"{len(self.finished)} of {len(self.steps)} stages done, {left}")
        for name, key, step in running:
            lines = read_journal(self.store.folder(key))
            if lines:
                last = lines[-1]
                losses = " ".join(
                    f"{k.removeprefix('loss/')} {v:.3f}"
                    for k, v in last["metrics"].items()
                    if k.startswith("loss/") and "layer_" not in k
                )
                share = last["tokens"] / max(1, step.own_tokens)
                rate = last["metrics"]["tokens_per_s"]
                print(f"          {name}: {share:4.0%}  {losses}  {rate:,.0f} tokens/s", file=self.out)
        self.out.flush()

    def _running(self, key: str) -> bool:
        attempt = self.store.attempt(key)
        return attempt is not None and attempt != self.before[key] and not self.store.finished(key)

    def _time_left(self) -> str:
        """Work left over the cores, never less than the longest chain of stages that is left."""
        unfinished = {key: step for key, (_, step) in self.steps.items() if key not in self.finished}
        done = {key: self._measure(key, step) for key, step in unfinished.items()}
        if not self.rates and any(step.own_tokens for step in unfinished.values()):
            return "time left: known once the first steps are measured"
        evaluated = self._median(spec.evaluate.key for _, spec in self.steps.values())
        chains = {key: (evaluated or EVALUATION) + self._seconds(step, done[key]) for key, step in unfinished.items()}
        work = sum(seconds * unfinished[key].train.cores for key, seconds in chains.items())
        work += (self._median(self.probed) or PROBES) * len(self.probes - self.probed)
        longest = max((sum(chains.get(s.train.key, 0.0) for s in t.steps) for t in self.plan.trials), default=0.0)
        longest += chains.get(self.plan.teacher.train.key, 0.0)
        speeds = (self._median(self.measured) or SPEED) * (len(self.speeds) - len(self.measured))
        left = max(work / self.cores, longest) + speeds
        kinds = {kind for key, step in unfinished.items() for kind, tokens in _rest(step, done[key]) if tokens}
        about = "about" if evaluated and kinds <= self.rates.keys() else "at least"
        return (
            f"{about} {left / 60:.0f} min left" if left >= 90 else f"{about} {max(5, round(left / 5) * 5):.0f} s left"
        )

    def _measure(self, key: str, step: Step) -> int:
        """The tokens that a stage has trained; what its journal says of the rates is kept."""
        lines, begun = read_journal(self.store.folder(key)), 0
        for kind, tokens in step.stretches:
            rates = [e["metrics"]["tokens_per_s"] for e in lines if begun < e["tokens"] <= begun + tokens][-9:]
            if rates:
                self.rates[kind] = sorted(rates)[len(rates) // 2]
            begun += tokens
        return int(lines[-1]["tokens"]) if lines else 0

    def _seconds(self, step: Step, done: int) -> float:
        """Of training what is left of a stage; a kind that nothing has measured is taken for as slow as the slowest."""
        slowest = min(self.rates.values(), default=1.0)
        left = [tokens / self.rates.get(kind, slowest) for kind, tokens in _rest(step, done)]
        return sum(left) + (BEGINNING if step.own_tokens else 0.0)

    def _median(self, keys: Iterable[str]) -> float | None:
        """Of the seconds that finished stages took."""
        times = []
        for key in keys:
            with contextlib.suppress(OSError, ValueError):  # not finished, or damaged
                times.append(float(self.store.done(key)["seconds"]))
        return statistics.median(times) if times else None

    def _done_line(self, name: str, step: Step) -> str:
        quality = self.store.result(step.evaluate.key)
        trained = self.store.result(step.train.key)
        told = f"perplexity {quality['perplexity']:.2f}, ratio {quality['perplexity_ratio']:.3f}"
        told += f", agreement {quality['agreement']:.3f}"
        if step.own_tokens and "rest_trainable" in trained:
            operator, rest = trained["operator_trainable"], trained["rest_trainable"]
            told += f" ({operator / 1e6:.2f} M operator and {rest / 1e6:.2f} M other parameters trained)"
        if trained.get("resumed_at"):
            told += f", resumed at step {trained['resumed_at']}"
        return f"done   {name}: {told}"

    def _say(self, text: str) -> None:
        self.told = time.monotonic()
        passed = int(self.told - self.began)
        print(f"[{passed // 60:3d}:{passed % 60:02d}] {text}", file=self.out, flush=True)


def _rest(step: Step, done: int) -> list[tuple[str, int]]:
    """The stretches of a stage without the tokens that it has trained."""
    left, begun = [], 0
    for kind, tokens in step.stretches:
        left.append((kind, max(0, min(tokens, begun + tokens - done))))
        begun += tokens
    return left


def distinct_steps(plan: Plan) -> dict[str, tuple[str, Step]]:
    """Key of every distinct trained stage -> a name for people and the step."""
    found: dict[str, tuple[str, Step]] = {plan.teacher.train.key: ("teacher", plan.teacher)}
    for trial in plan.trials:
        for index, step in enumerate(trial.steps):
            label = "joint" if step.joint else f"stage {index + 1}/{len(trial.steps)}"
            layers = ",".join(map(str, getattr(step.train, "layers", ())))
            found.setdefault(step.train.key, (f"{trial.name} {label} layers {layers}", step))
    for name, step in plan.controls.items():
        found.setdefault(step.train.key, (f"control {name}", step))
    return found
