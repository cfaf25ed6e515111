"""The plan and its state for people and scripts: what will run, what is shared, what is there."""

from __future__ import annotations

import json
import statistics
from typing import Any

from orchestrator.distill.journal import read_journal
from orchestrator.record.progress import distinct_steps
from orchestrator.run.store import Store, tree_bytes
from orchestrator.study.plan import Plan, Step
from orchestrator.study.spec import short


def plan_summary(plan: Plan, store: Store) -> dict[str, Any]:
    """Counts and every trial's path, JSON values only."""
    users = plan.users()
    paths = [
        {"trial": trial.name, "values": trial.values, "stages": [_stage(step, store, users) for step in trial.steps]}
        for trial in plan.trials
    ]
    asked = sum(len(trial.steps) for trial in plan.trials)
    budgets = {step.train.key: step.own_tokens for step in plan.steps}
    return {
        "study": plan.study.study,
        "trials": len(plan.trials),
        "stages": asked,
        "distinct": len(users),
        "done": sum(store.finished(key) for key in users),
        "sharing": asked / max(1, len(users)),
        "tokens_to_train": sum(tokens for key, tokens in budgets.items() if not store.finished(key)),
        "estimate": estimate(plan, store),
        "controls": list(plan.controls),
        "paths": paths,
    }


def plan_text(plan: Plan, store: Store) -> str:
    """The tree as lines."""
    summary = plan_summary(plan, store)
    lines = []
    for path in summary["paths"]:
        lines.append(f"{path['trial']}  {json.dumps(path['values'])}")
        for stage in path["stages"]:
            shared = f", shared by {stage['trials']} trials" if stage["trials"] > 1 else ""
            lines.append(
                f"    {'done' if stage['done'] else '    '} {short(stage['key'])}  layers {stage['swapped']}, "
                f"{stage['tokens']:,} tokens on the path{shared}"
            )
    lines.append(f"controls: {', '.join(summary['controls']) or 'none'}")
    lines.append(
        f"{summary['trials']} trials, {summary['stages']} stages asked for, {summary['distinct']} distinct, "
        f"{summary['done']} in the store; sharing factor {summary['sharing']:.2f}; "
        f"{summary['tokens_to_train'] / 1e6:.2f} M tokens to train, teacher and controls included"
    )
    if summary["tokens_to_train"] and summary["estimate"]:
        cost = summary["estimate"]
        lines.append(f"about {cost['core_seconds'] / 60:.0f} core-minutes of training and {cost['megabytes']:.0f} MB")
    elif summary["tokens_to_train"]:
        lines.append("time and disk: known once a stage has been measured in this store")
    return "\n".join(lines)


def gc_text(store: Store, kept: set[str], delete: bool) -> str:
    """The stages outside `kept` with their sizes, deleted if asked; a stage that is being computed stays."""
    lines, total = [], 0
    for key in store.all_keys():
        if key in kept:
            continue
        size = store.remove(key) if delete else tree_bytes(store.folder(key))
        total += size
        kind = "finished" if store.finished(key) else "deleted" if delete and size else "unfinished"
        lines.append(f"{short(key)}  {size / 2**20:8.1f} MB  {kind}")
    verb = "freed" if delete else "would be freed by --delete"
    return "\n".join([*lines, f"{len(lines)} stages that no given study needs, {total / 2**20:.1f} MB {verb}"])


def estimate(plan: Plan, store: Store) -> dict[str, float] | None:
    """Core-seconds and megabytes of what is left to do, from the rates that the store's stages were measured at.

    None until a stage of each kind that is left, or of any kind that trains, was measured.
    """
    rates: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for key in store.all_keys():
        if store.finished(key):
            done = store.done(key)
            sizes.setdefault(done["kind"], []).append(tree_bytes(store.folder(key)) / 2**20)
            if done["result"].get("tokens_per_s"):
                rates.setdefault(done["kind"], []).append(done["result"]["tokens_per_s"])
    if not rates:
        return None
    slowest = min(statistics.median(values) for values in rates.values())
    seconds = megabytes = 0.0
    for step in {step.train.key: step for step in plan.steps if not store.finished(step.train.key)}.values():
        kind = str(getattr(step.train, "kind", ""))
        rate = statistics.median(rates[kind]) if kind in rates else slowest
        seconds += step.train.cores * step.own_tokens / rate
        megabytes += statistics.median(sizes.get(kind) or [0.0])
    return {"core_seconds": seconds, "megabytes": megabytes}


def status_text(plan: Plan, store: Store) -> str:
    """One line a stage: finished, failed, begun or not."""
    lines = []
    for key, (name, step) in distinct_steps(plan).items():
        failure = store.failure(key) or store.failure(step.evaluate.key)
        if store.finished(step.evaluate.key):
            state = f"finished, perplexity ratio {store.result(step.evaluate.key)['perplexity_ratio']:.3f}"
        elif failure is not None:
            state = f"failed: {failure['error']}"
        elif store.attempt(key) is not None:
            journal = read_journal(store.folder(key))
            state = f"begun, {journal[-1]['tokens'] if journal else 0:,} of {step.own_tokens:,} tokens"
        else:
            state = "not begun"
        lines.append(f"{short(key)}  {name:40} {state}")
    return "\n".join(lines)


def _stage(step: Step, store: Store, users: dict[str, list[str]]) -> dict[str, Any]:
    key = step.train.key
    return {
        "key": key,
        "swapped": list(step.swapped),
        "tokens": step.tokens,
        "trials": len(users[key]),
        "done": store.finished(step.evaluate.key),
    }
