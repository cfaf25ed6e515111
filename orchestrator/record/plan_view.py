"""The plan and its state for people and scripts: what will run, what is shared, what is there."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.distill.journal import read_journal
from orchestrator.record.progress import distinct_steps
from orchestrator.run.store import Store
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
    return "\n".join(lines)


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
