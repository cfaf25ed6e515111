"""The tree of a run as lines for a terminal: what is done, running, waiting and failed, cut to the room there is.

A pure function of the plan, of what a look at the store found, of the time and the size. Place in the flow: `terminal`
draws what this gives. Invariant: no line is wider and no frame higher than asked; where not all fits, the time left
stays to the last, then what runs and what has failed, and the rest is counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping

from rich.text import Text

from orchestrator.record.screen.facts import Facts, Stage, State, stage_names
from orchestrator.record.screen.plan_view import layer_ranges
from orchestrator.record.screen.time_left import clock
from orchestrator.study.names import operator_name
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ThroughputSpec
from orchestrator.study.stages import Step

STYLES: dict[State, str] = {"done": "green", "running": "bold cyan", "failed": "bold red", "waiting": "dim"}
STATES: tuple[State, ...] = ("done", "running", "failed", "waiting")
BARS = (30, 20, 10)  # columns of a bar, the widest that there is room for


@dataclasses.dataclass(frozen=True)
class Signs:
    """What states, branches and bars are drawn with."""

    marks: Mapping[State, str]
    fork: str
    last: str
    line: str
    then: str
    full: str
    empty: str
    more: str
    dot: str


FANCY = Signs(
    {"done": "✓", "running": "▸", "failed": "✗", "waiting": ""}, "├─ ", "└─ ", "│  ", " → ", "━", "─", "…", " · "
)
PLAIN = Signs(
    {"done": "+", "running": ">", "failed": "x", "waiting": ""}, "|- ", "`- ", "|  ", " > ", "#", "-", "...", ", "
)


@dataclasses.dataclass(frozen=True)
class Item:
    """A step on its branch: a short label, and the keys that decide its state."""

    label: str
    train: str
    evaluate: str
    tokens: int

    def state(self, facts: Facts) -> State:
        """Done when it is evaluated as well."""
        both = {facts[self.train].state, facts[self.evaluate].state}
        return next(
            (state for state in ("failed", "running") if state in both), "done" if both == {"done"} else "waiting"
        )


@dataclasses.dataclass(frozen=True)
class Branch:
    """A stretch of steps without a fork, or steps side by side."""

    indent: str  # before its first line
    below: str  # before the lines below it
    name: str
    items: tuple[Item, ...]
    ends: str  # the trial that ends here
    path: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the frame: the lower the rank, the longer it stays."""

    text: Text
    rank: int
    states: Counter[State] = dataclasses.field(default_factory=Counter)


class Tree:
    """The branches of a plan, laid out once."""

    def __init__(self, plan: Plan, speeds: Mapping[str, ThroughputSpec], signs: Signs = FANCY) -> None:
        self.signs, self.study = signs, plan.study.study
        self.names = stage_names(plan, speeds)
        self.text = plan.tokens.key
        self.beside = {
            "probes": list(dict.fromkeys(spec.key for step in plan.steps for spec in step.probed)),
            "speeds": list(dict.fromkeys(spec.key for spec in speeds.values())),
        }
        self.branches = [Branch("", "  ", "", (_item("teacher", plan.teacher),), "")]
        self.branches += _branches(list(plan.trials), 0, "", "", signs)
        controls = tuple(_item(name, step) for name, step in plan.controls.items())
        self.branches += [Branch("", "  ", "controls", controls, "", path=False)] if controls else []

    def frame(self, facts: Facts, times: tuple[str, str], now: float, size: tuple[int, int]) -> list[Text]:
        """The lines for a terminal of so many columns and lines; `times` are how long it has run and the time left."""
        width, height = size
        last = Text(f"[{times[0]}] {times[1]}", "bold")
        rows = list(self._rows(facts, now, width))
        lines = [self._first(facts, width), *self._fitting(rows, height - 2), last] if height >= 2 else [last]
        for line in lines:
            line.no_wrap = True
            if line.cell_len > width:
                line.truncate(max(0, width - len(self.signs.more)))
                line.append(self.signs.more[:width])
        return lines

    def _first(self, facts: Facts, width: int) -> Text:
        """The study and how many of its stages stand how; without its name, and what waits, where that is too wide."""
        distinct = {item.train: item for branch in self.branches for item in branch.items}  # a trial may be a control
        totals = Counter(item.state(facts) for item in distinct.values())
        done = f"{totals['done']} of {totals.total()} stages done"
        counts = [Text(f"{totals[state]} {state}", STYLES[state]) for state in STATES[1:] if totals[state]]
        named = Text(self.signs.dot).join([Text.assemble((self.study, "bold"), f"  {done}"), *counts])
        if named.cell_len <= width:
            return named
        return Text(self.signs.dot).join([Text(done), *counts[: len(counts) - (totals["waiting"] > 0)]])

    def _fitting(self, rows: list[Row], room: int) -> Iterator[Text]:
        """As many rows as there is room for, in their order, and the stages on the others counted."""
        if len(rows) <= room:
            yield from (row.text for row in rows)
            return
        kept = set(sorted(range(len(rows)), key=lambda index: (rows[index].rank, index))[: max(0, room - 1)])
        hidden = sum((row.states for index, row in enumerate(rows) if index not in kept), Counter[State]())
        yield from (rows[index].text for index in sorted(kept))
        told = ", ".join(f"{hidden[state]} {state}" for state in STATES if hidden[state])
        if room > 0:
            yield Text(f"{self.signs.more} {told or 'more'}", "dim")

    def _rows(self, facts: Facts, now: float, width: int) -> Iterator[Row]:
        if facts[self.text].state != "done":
            yield from self._busy("", "text", self.text, 0, facts, now, width)
        for branch in self.branches:
            states = Counter(item.state(facts) for item in branch.items)
            rank = 2 if states["running"] + states["failed"] else 5 if states["done"] == len(branch.items) else 4
            quiet = Counter(states)
            quiet["running"] = quiet["failed"] = 0  # what runs or failed has a row of its own
            yield Row(self._line(branch, facts, width), rank, quiet)
            for item in branch.items:
                name = item.label if item.label[0].isalpha() else f"layers {item.label}"
                yield from self._busy(branch.below, name, item.train, item.tokens, facts, now, width)
                yield from self._busy(branch.below, f"evaluation of {name}", item.evaluate, 0, facts, now, width)
        asked = {name: keys for name, keys in self.beside.items() if keys}
        if asked:
            told = [
                f"{name} {sum(facts[key].state == 'done' for key in keys)} of {len(keys)}"
                for name, keys in asked.items()
            ]
            yield Row(Text(self.signs.dot.join(told)), 3)
            for key in [key for keys in asked.values() for key in keys]:
                yield from self._busy("  ", self.names[key], key, 0, facts, now, width)

    def _line(self, branch: Branch, facts: Facts, width: int) -> Text:
        """A branch with the state of its steps; where that is too wide, those alike side by side are counted."""
        states = [item.state(facts) for item in branch.items]
        pieces = [self._piece(item.label, state) for item, state in zip(branch.items, states, strict=True)]
        line = self._joined(branch, pieces)
        if line.cell_len > width:
            pieces, alike = [], 0
            for index, (item, state) in enumerate(zip(branch.items, states, strict=True)):
                alike += 1
                if state in ("running", "failed"):
                    pieces.append(self._piece(item.label, state))
                elif states[index + 1 : index + 2] != [state]:
                    pieces.append(self._piece(f"{alike} steps", state) if alike > 1 else self._piece(item.label, state))
                else:
                    continue
                alike = 0
            line = self._joined(branch, pieces)
        if branch.ends and line.cell_len + len(branch.ends) + 2 <= width:
            line.append(f"  {branch.ends}", "dim")
        return line

    def _piece(self, label: str, state: State) -> Text:
        return Text(f"{label} {self.signs.marks[state]}".rstrip(), STYLES[state])

    def _joined(self, branch: Branch, pieces: list[Text]) -> Text:
        line = Text.assemble((branch.indent, "dim"), (f"{branch.name}  " if branch.name else ""))
        return line.append_text(Text(self.signs.then if branch.path else "  ", "dim").join(pieces))

    def _busy(
        self, indent: str, name: str, key: str, tokens: int, facts: Facts, now: float, width: int
    ) -> Iterator[Row]:
        """The line of a stage that runs or has failed; none for others."""
        stage = facts[key]
        if stage.state == "failed":
            told = f"{self.signs.marks['failed']} {name}: {' '.join(stage.error.split())}"
            yield Row(Text.assemble((indent, "dim"), (told, STYLES["failed"])), 1, Counter({stage.state: 1}))
        elif stage.state == "running":
            yield Row(self._running(indent, name, stage, tokens, now, width), 0, Counter({stage.state: 1}))

    def _running(self, indent: str, name: str, stage: Stage, tokens: int, now: float, width: int) -> Text:
        """With as much of bar, loss, rate and memory as there is room for."""
        head = Text.assemble((indent, "dim"), (f"{self.signs.marks['running']} {name}  ", STYLES["running"]))
        parts = []
        if tokens:
            parts.append(f"{stage.tokens / tokens:4.0%}")
            parts += [f"{stage.points[-1][1]:,.0f} tokens/s"] if stage.points else []
            parts += [" ".join(f"{loss} {value:.3f}" for loss, value in stage.losses.items() if loss != "total")]
        else:
            parts.append(clock(now - stage.since))
        parts += [f"{stage.memory_mb:,.0f} MB"] if stage.memory_mb is not None else []
        parts = [part for part in parts if part]
        for bar in (BARS, (0,)) if tokens else ((0,),):
            for count in range(len(parts), 0, -1):
                told = "  ".join(parts[:count])
                fits = [columns for columns in bar if head.cell_len + columns + 1 + len(told) <= width]
                if fits and fits[0]:
                    head.append_text(self._bar(stage.tokens / tokens, fits[0]))
                if fits:
                    return head.append(told)
        return head

    def _bar(self, share: float, columns: int) -> Text:
        full = round(min(1.0, share) * columns)
        return Text.assemble((self.signs.full * full, "cyan"), (self.signs.empty * (columns - full), "dim"), " ")


def _item(label: str, step: Step) -> Item:
    return Item(label, step.train.key, step.evaluate.key, step.own_tokens)


def _branches(trials: list[Trial], depth: int, indent: str, operator: str, signs: Signs) -> Iterator[Branch]:
    """Those of the steps at `depth` of these trials, which share all before, each with what follows it."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if depth < len(trial.steps):
            groups.setdefault(trial.steps[depth].train.key, []).append(trial)
    for number, group in enumerate(groups.values(), 1):
        end = depth + 1
        while len({trial.steps[end].train.key if end < len(trial.steps) else trial.name for trial in group}) == 1 and (
            end < len(group[0].steps)
        ):
            end += 1
        steps = group[0].steps[depth:end]
        own = operator_name(steps[-1].operator)
        items = tuple(
            _item("joint" if step.joint else layer_ranges(getattr(step.train, "layers", ())), step) for step in steps
        )
        below = indent + ("   " if number == len(groups) else signs.line)
        ends = ", ".join(trial.name for trial in group if len(trial.steps) == end)
        mark = signs.last if number == len(groups) else signs.fork
        yield Branch(indent + mark, below, own if own != operator else "", items, ends)
        yield from _branches(group, end, below, own, signs)
