"""What the terminal shows while a study runs, read from the store: it stays true whoever computes, and needs no tty.

Place in the flow: a thread of the driver calls `tick` and `draw` every other second. On a terminal the tree of the run
stands below what has happened; elsewhere a summary comes every twenty seconds, whatever happens. Invariant: the time
left is told in every frame and every summary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.text import Text

from orchestrator.record.decisions import decided
from orchestrator.record.screen.costs import Observation
from orchestrator.record.screen.earlier import earlier_observations
from orchestrator.record.screen.facts import Facts, Look, Stage, distinct_steps, stage_names
from orchestrator.record.screen.terminal import Terminal, is_drawable
from orchestrator.record.screen.time_left import UNKNOWN, Work, clock, time_left
from orchestrator.record.screen.tree import FANCY, PLAIN, Tree
from orchestrator.run.log import LOG
from orchestrator.run.store import FAILURE, Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step

EVERY = 20.0  # seconds between summaries where no tree is drawn
LOW = 12  # lines of a terminal that the tree has alone


class Progress:
    """Tells events at once, and where the run stands: as a tree on a terminal, else by a summary every few seconds."""

    def __init__(
        self, plan: Plan, store: Store, speeds: dict[str, ThroughputSpec], cores: int, out: TextIO | None = None
    ):
        self.store, self.cores, self.out = store, cores, out or sys.stdout
        self.began = self.summed = time.monotonic()
        self.heard = store.said(0)[1]
        self._learn(plan, speeds)
        self.past: list[Observation] | None = None  # read by the thread that looks: it may be much
        self.looking = Look(store, self.work.specs)
        self.facts: Facts = self.looking.look(self.began)
        self.finished = {key for key, (_, step) in self.steps.items() if self._done(step)}
        self.started: set[str] = set()
        self.seen = {key for keys, _ in self.counted.values() for key in keys if self.facts[key].state == "done"}
        self.data_told = self.facts[plan.tokens.key].state == "done"
        self.failed: set[tuple[str, int]] = set()  # attempts whose failure was told
        self.terminal: Terminal | None = None
        self.left = UNKNOWN
        if is_drawable(self.out):
            self.terminal = Terminal(self.out, self._frame)

    def _learn(self, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        self.plan, self.users, self.steps = plan, plan.users(), distinct_steps(plan)
        self.work, self.names = Work.of(plan, speeds), stage_names(plan, speeds)
        self.counted = {
            "probes": ({spec.key for step in plan.steps for spec in step.probed}, "models"),
            "speed ": ({spec.key for spec in speeds.values()}, "architectures measured"),
        }
        if is_drawable(self.out):
            fancy = (self.out.encoding or "").lower().startswith("utf")
            self.tree = Tree(plan, speeds, FANCY if fancy else PLAIN)

    def replan(self, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        """Go on with a plan that has grown, and tell what was decided."""
        before = self.plan
        self._learn(plan, speeds)
        self.looking.add(self.work.specs)
        self.facts = self.looking.look(time.monotonic())
        for line in decided(before, plan, self.store):
            self.say(line)

    def begin(self) -> None:
        """Say what is there and what will be done."""
        if self.terminal is not None:
            self.terminal.start()
        total, shared = len(self.steps), sum(len(names) > 1 for names in self.users.values())
        asked = sum(len(trial.steps) for trial in self.plan.trials)
        tokens = sum(step.own_tokens for key, (_, step) in self.steps.items() if key not in self.finished)
        self.say(
            f"{len(self.plan.trials)} trials ask for {asked} stages{self._later()}, {len(self.users)} distinct "
            f"({shared} shared); with teacher and controls {total}: {len(self.finished)} finished before, "
            f"{total - len(self.finished)} to do, {tokens / 1e6:.2f} M tokens"
        )

    def _later(self) -> str:
        """Of stages that are not known yet, for results decide them."""
        return f" and at most {self.plan.rest} that are chosen on the way" if self.plan.rest else ""

    def end(self) -> None:
        """Leave the last frame behind; what still runs has been stopped."""
        if self.terminal is not None:
            states = [stage.state for stage in self.facts.values()]
            missing = sum(not self._done(step) for _, step in self.steps.values())
            failed = states.count("failed")
            self.left = "stopped" if "running" in states else f"over: {failed} failed" if failed else "over"
            self.left += f", {missing} of {len(self.steps)} stages are not done" if missing else ""
            self.terminal.stop()

    def tick(self) -> None:
        """Look at the store and say what is new."""
        now = time.monotonic()
        said, self.heard = self.store.said(self.heard)
        for line in said:
            self.say(line)
        self.facts = self.looking.look(now)
        self._tell_text()
        for key, (name, step) in self.steps.items():
            self._tell_step(key, name, step)
        self._tell_failures()
        for what, (keys, of) in self.counted.items():
            self._tell_count(what, keys, of)
        if self.terminal is None and now - self.summed < EVERY:
            return
        self.left = self._time_left(now)
        if self.terminal is None:
            self._summary(now)

    def draw(self) -> None:
        """Draw the tree as it is now, where one is drawn."""
        if self.terminal is not None:
            self.terminal.draw()

    def failures(self) -> list[str]:
        """What has failed in this run and is not made good: the stage, the cause, and where its log is."""
        failed = {key: stage for key, stage in self.facts.items() if stage.state == "failed"}
        return [self._failure(key, stage) for key, stage in failed.items()]

    def _tell_text(self) -> None:
        key = self.plan.tokens.key
        if not self.data_told and self.facts[key].state == "done":
            counts = self.store.result(key)
            self.data_told = True
            self.say(
                f"text ready: {counts['train_tokens']:,} training and {counts['valid_tokens']:,} validation tokens"
            )

    def _tell_step(self, key: str, name: str, step: Step) -> None:
        done = self._done(step)
        if key in self.finished:
            if not done:  # withdrawn, for it was damaged
                self.finished.discard(key)
                self.started.discard(key)
        elif done:
            line = self._done_line(name, step)
            self.finished.add(key)
            self.say(line)
        elif key not in self.started and self.facts[key].state == "running":
            self.started.add(key)
            if step.own_tokens and self.terminal is None:
                users = self.users.get(key, [])
                shared = f", for {len(users)} trials" if len(users) > 1 else ""
                self.say(f"start  {name}: {step.own_tokens:,} tokens{shared}")

    def _tell_failures(self) -> None:
        for key, stage in self.facts.items():
            if stage.state == "failed" and (key, stage.attempt) not in self.failed:
                self.failed.add((key, stage.attempt))
                self.say(f"FAILED {self._failure(key, stage)}")

    def _failure(self, key: str, stage: Stage) -> str:
        folder = self.store.folder(key)
        log = folder / LOG if (folder / LOG).exists() else folder / FAILURE
        return f"{self.names[key]}: {stage.error}\n          log: {log}"

    def _tell_count(self, what: str, keys: set[str], of: str) -> None:
        for key in sorted(keys - self.seen):
            if self.facts[key].state == "done":
                self.seen.add(key)
                if self.terminal is None:
                    self.say(f"{what} {len(self.seen & keys)} of {len(keys)} {of}")

    def _time_left(self, now: float) -> str:
        if self.past is None:
            self.past = earlier_observations(self.store, self.work.specs)
        left = time_left(self.work, self.facts, self.past, self.cores, now)
        return UNKNOWN if left is None else str(left)

    def _summary(self, now: float) -> None:
        self.summed = now
        later = f" (at most {self.plan.rest} to be chosen)" if self.plan.rest else ""
        self.say(f"{len(self.finished)} of {len(self.steps)}{later} stages done, {self.left}")
        for key, (name, step) in self.steps.items():
            stage = self.facts[key]
            if stage.state == "running" and stage.points:
                share = stage.tokens / max(1, step.own_tokens)
                rate = stage.points[-1][1]
                print(f"          {name}: {share:4.0%}  {_losses(stage.losses)}  {rate:,.0f} tokens/s", file=self.out)
        self.out.flush()

    def _frame(self, size: tuple[int, int]) -> Text:
        """The tree, on three quarters of a terminal that is not low: what has happened stays in sight above it."""
        now, size = time.monotonic(), (size[0], max(size[1] * 3 // 4, min(size[1], LOW)))
        return Text("\n").join(self.tree.frame(self.facts, (f"{clock(now - self.began):>6}", self.left), now, size))

    def _done(self, step: Step) -> bool:
        return all(self.facts[spec.key].state == "done" for spec in (step.train, step.evaluate))

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

    def say(self, text: str) -> None:
        print(f"[{clock(time.monotonic() - self.began):>6}] {text}", file=self.out, flush=True)


def _losses(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())
