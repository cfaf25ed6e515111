"""The plan and its state for people and scripts: what will run, what is shared, what is there.

Invariant: looking changes nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from orchestrator.distill.training.journal import read_journal
from orchestrator.record.records import trial_words
from orchestrator.record.screen.estimate import estimate
from orchestrator.record.screen.facts import distinct_steps
from orchestrator.record.speeds import measured_again
from orchestrator.record.task_results import tasks_of
from orchestrator.run.hardware import accelerators
from orchestrator.run.limits import cores
from orchestrator.run.store import Store, tree_bytes
from orchestrator.study.names import operator_name, schedule_name
from orchestrator.study.plan import Plan, Trial, stage_memory
from orchestrator.study.spec import ThroughputSpec, short

KINDS = 5  # of stages that a line tells the memory of
Node = dict[str, Any]  # a stage of the tree: key, swapped layers, state, trials that end here, children


def plan_summary(plan: Plan, store: Store, speeds: dict[str, ThroughputSpec]) -> dict[str, Any]:
    """Counts, costs and the tree, JSON values only. `sharing` compares with each trial computing all its own stages."""
    users = plan.users()
    own = {step.train.key: step.own_tokens for step in plan.steps}
    asked = [step.train.key for trials in plan.paths.values() for step in trials[0].steps]  # of one path once
    asked_tokens = sum(own[key] for key in asked)
    distinct_tokens = sum(own[key] for key in users)
    steps = distinct_steps(plan)
    return {
        "study": plan.study.study,
        "trials": len(plan.trials),
        "paths": len(plan.paths),
        "stages": len(asked),
        "distinct": len(users),
        "done": sum(store.finished(key) for key in users),
        "sharing": len(asked) / max(1, len(users)),
        "tokens": asked_tokens,
        "distinct_tokens": distinct_tokens,
        "sharing_tokens": asked_tokens / max(1, distinct_tokens),
        "all_stages": len(steps),  # with the teacher and the controls
        "all_done": sum(store.finished(key) and store.finished(step.evaluate.key) for key, (_, step) in steps.items()),
        "tokens_to_train": sum(tokens for key, tokens in own.items() if not store.finished(key)),
        "estimate": estimate(plan, store, speeds, _units(plan.device)),
        "memory": {
            key: {"kind": memory.spec.model_dump()["kind"], "name": memory.name, "megabytes": round(memory.bytes / 1e6)}
            for key, memory in stage_memory(plan, speeds, plan.device).items()
        },
        "notes": plan.notes,
        "later": {trial.name: later(trial) for trial in plan.trials if trial.open},
        "most": plan.rest,  # stages that results decide, at most
        "controls": list(plan.controls),
        "values": {trial.name: trial.values for trial in plan.trials},
        "words": trial_words(plan),
        "teacher": {"key": plan.teacher.train.key, "tokens": plan.teacher.own_tokens, "state": _state(plan, store)},
        "tree": _tree(list(plan.trials), 0, store),
    }


def plan_text(plan: Plan, store: Store, speeds: dict[str, ThroughputSpec]) -> str:
    """The tree as lines, a line for every stretch of stages without a fork, and what it costs."""
    summary = plan_summary(plan, store, speeds)
    teacher = summary["teacher"]
    trained = f", {_tokens(teacher['tokens'])} tokens" if teacher["tokens"] else ""
    rows = list(_rows(summary["tree"], "", "", summary["words"]))
    wide = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"{summary['study']}: {plan.study.question}".strip(": "), ""]
    lines += [f"teacher  {plan.total_layers} layers{trained}{_mark(teacher['state'])}"]
    lines += [f"{a:{wide[0]}}  {b:>{wide[1]}}  {c:{wide[2]}}  {d}".rstrip() for a, b, c, d in rows]
    skipped = sum(name.startswith("skip") for name in summary["controls"])
    controls = [name for name in summary["controls"] if not name.startswith("skip")]
    controls += [f"skip ({skipped})"] if skipped else []
    lines += [
        f"controls: {', '.join(controls) or 'none'}",
        *(f"note: {note}" for note in summary["notes"]),
        *(f"{name} {told}" for name, told in summary["later"].items()),
        "",
        f"{_trials(summary)} ask for {summary['stages']} stages{_chosen(summary)}, {summary['distinct']} distinct: "
        f"sharing factor {summary['sharing']:.2f} in stages, {summary['sharing_tokens']:.2f} in tokens",
        f"in the store: {summary['done']} of them; with teacher and controls {summary['all_done']} of "
        f"{summary['all_stages']}",
        *_memory_lines(
            (told for key, told in summary["memory"].items() if not store.finished(key)),
            "memory of a stage:" if plan.device == "cpu" else "GPU memory of a stage:",
        ),
        _cost_text(summary),
    ]
    return "\n".join(lines)


def gc_text(store: Store, kept: set[str], delete: bool) -> str:
    """The stages outside `kept` with their sizes, deleted if asked; a stage that is being computed stays, and so do
    what a kept one was asked by `layerswap evaluate` and its later measurements."""
    lines, total = [], 0
    kept = kept | tasks_of(store, kept) | measured_again(store, kept)
    for key, claim in store.states(key for key in store.all_keys() if key not in kept).items():
        size, finished = tree_bytes(store.folder(key)), store.finished(key)
        if claim == "held" or (delete and not store.remove(key)):
            lines.append(f"{short(key)}  {size / 2**20:8.1f} MB  stays: it is being computed")
            continue
        total += size
        state = "finished" if finished else "unfinished"
        lines.append(f"{short(key)}  {size / 2**20:8.1f} MB  {'deleted' if delete else state}")
    verb = "freed" if delete else "would be freed by --delete"
    return "\n".join([*lines, f"{len(lines)} stages that no given study needs, {total / 2**20:.1f} MB {verb}"])


def status_text(plan: Plan, store: Store) -> str:
    """One line a stage: finished, failed, begun or not."""
    lines = []
    for key, (name, step) in distinct_steps(plan).items():
        failure = store.failure(key) or store.failure(step.evaluate.key)
        unprobed = step.probes and store.failure(step.probes.key)
        if store.finished(key) and store.finished(step.evaluate.key):
            state = f"finished, perplexity ratio {store.result(step.evaluate.key)['perplexity_ratio']:.3f}"
            state += f"; probes failed: {unprobed['error']}" if unprobed else ""
        elif failure is not None:
            state = f"failed: {failure['error']}"
        elif store.attempt(key) is not None:
            journal = read_journal(store.folder(key))
            state = f"begun, {journal[-1]['tokens'] if journal else 0:,} of {step.own_tokens:,} tokens"
        else:
            state = "not begun"
        lines.append(f"{short(key)}  {name:40} {state}")
    return "\n".join(lines)


def _tree(trials: list[Trial], depth: int, store: Store) -> list[Node]:
    """The stages at `depth` of these trials, which share all before, each with what follows it."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if depth < len(trial.steps):
            groups.setdefault(trial.steps[depth].train.key, []).append(trial)
    nodes = []
    for key, group in groups.items():
        step: Any = group[0].steps[depth]
        nodes.append(
            {
                "key": key,
                "operator": operator_name(step.operator),
                "layers": list(step.train.layers),
                "joint": step.joint,
                "tokens": step.own_tokens,
                "trials": len(group),
                "state": _stage_state(key, step.evaluate.key, store),
                "ends": [trial.name for trial in group if len(trial.steps) == depth + 1],
                "children": _tree(group, depth + 1, store),
            }
        )
    return nodes


def _state(plan: Plan, store: Store) -> str:
    return _stage_state(plan.teacher.train.key, plan.teacher.evaluate.key, store)


def _stage_state(key: str, evaluate: str, store: Store) -> str:
    if store.finished(key) and store.finished(evaluate):
        return "done"
    return "new" if store.attempt(key) is None else "begun"


def _mark(state: str) -> str:
    return {"done": " ✓", "begun": " …", "new": ""}[state]


def _rows(nodes: list[Node], indent: str, operator: str, words: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Stages, tokens, trials and their words of every stretch below `indent`."""
    for index, node in enumerate(nodes):
        last = index == len(nodes) - 1
        stretch = [node]
        while len(stretch[-1]["children"]) == 1 and not stretch[-1]["ends"]:
            stretch += stretch[-1]["children"]
        names = ["joint" if stage["joint"] else layer_ranges(stage["layers"]) for stage in stretch]
        told = " → ".join(name + _mark(stage["state"]) for name, stage in zip(names, stretch, strict=True))
        end = stretch[-1]["operator"]
        own = f"{end}  " if end != operator else ""
        ends = stretch[-1]["ends"]
        tried = words[ends[0]] if ends else ""
        tokens = _tokens(sum(stage["tokens"] for stage in stretch))
        yield f"{indent}{'└─' if last else '├─'} {own}{told}", tokens, ", ".join(ends), tried
        yield from _rows(stretch[-1]["children"], indent + ("   " if last else "│  "), end, words)


def _memory_lines(memory: Iterable[dict[str, Any]], title: str) -> Iterator[str]:
    """What the process of a stage takes, by kind of stage, from the least to the most."""
    kinds: dict[str, list[int]] = {}
    for told in memory:
        kinds.setdefault(told["kind"], []).append(told["megabytes"])
    parts = []
    for kind, each in kinds.items():
        least = "" if min(each) == max(each) else f"{min(each)}-"
        parts.append(f"{kind} {least}{_megabytes(max(each))}")
    for start in range(0, len(parts), KINDS):
        line = ", ".join(parts[start : start + KINDS]) + ("," if start + KINDS < len(parts) else "")
        yield f"{'' if start else title:{len(title)}} {line}"


def _megabytes(count: int) -> str:
    return f"{count} MB" if count < 10_000 else f"{count / 1e3:.1f} GB"


def _cost_text(summary: dict[str, Any]) -> str:
    cost, left = summary["estimate"], summary["tokens_to_train"]
    if summary["all_done"] == summary["all_stages"] and not (cost["unknown"] or cost["unit_seconds"][1]):
        return "to do: nothing"
    told, near, unknown = f"to do: {_tokens(left)} tokens to train", ", ".join(cost["near"]), ", ".join(cost["unknown"])
    if cost["wall_seconds"] is None:
        return f"{told}; time and disk are unknown: nothing like it was measured here\n       (unknown: {unknown})"
    ends = slice(0, 1) if unknown else slice(0, 2)  # what is unknown comes on top
    wall, work = (_span(cost[name][ends], _minutes) for name in ("wall_seconds", "unit_seconds"))
    disk = _span(cost["megabytes"][ends], lambda size: f"{size:.0f} MB")
    unit = "core" if cost["device"] == "cpu" else "GPU"
    how = "at least" if unknown or summary["most"] else "about"
    told += f"; {how} {wall} on {cost['units']} {unit}{'s' * (cost['units'] > 1)}"
    lines = [f"{told} ({work} of {unit} time), {disk}"]
    lines += [f"       (by what others took, other models, operators, losses or lengths: {near})"] if near else []
    lines += [f"       (nothing like it was measured here, and it comes on top: {unknown})"] if unknown else []
    return "\n".join(lines)


def _span(ends: tuple[float, ...], say: Callable[[float], str]) -> str:
    return " to ".join(dict.fromkeys(map(say, ends)))


def _units(device: str) -> int:
    """How many cores, or GPUs, of this machine work at once; a GPU where it has none, for one elsewhere."""
    return cores() if device == "cpu" else max(1, accelerators())


def later(trial: Trial) -> str:
    """How far a path is known that results decide, and what comes after that at most."""
    path = trial.path
    made = sum(decision.spec.key != path.waits for decision in path.decisions)
    known = [f"{len(path.steps)} stages"] if path.steps else []
    known += [f"{made} choices"] if made else []
    told = f"{' and '.join(known)} known, " if known else ""
    more = f"at most {path.rest} stages {'more, ' if known else ''}chosen at run time"
    return f"{schedule_name(trial.study.schedule)}: {told}{more}"


def _chosen(summary: dict[str, Any]) -> str:
    return f" and at most {summary['most']} chosen at run time" if summary["most"] else ""


def _trials(summary: dict[str, Any]) -> str:
    trials, paths = summary["trials"], summary["paths"]
    return f"{trials} trials" if trials == paths else f"{trials} trials of {paths} different paths"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1_000_000 else f"{count / 1e3:.0f} k" if count >= 10_000 else str(count)


def layer_ranges(layers: Sequence[int]) -> str:
    """Layers as people write them: `0-3,5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
