"""What results have decided of a study: the layers that were chosen, by which scores, and what gates made of stages.

Place in the flow: read from plan and store; the terminal, the report and MLflow tell it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.record.records import trial_words
from orchestrator.run.store import Store
from orchestrator.study.names import operator_name
from orchestrator.study.path import Path
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.stages import Step

SHOWN = 8  # layers of an order that a line tells
OUTCOMES = {
    "extended": "trained on, for its gate wants more",
    "given_back": "given back: they stay attention",
    "last": "the end of its path",
}


def decided(before: Plan, after: Plan, store: Store) -> Iterator[str]:
    """A line for everything that was decided between two states of a plan, equal decisions of trials once."""
    known = {trial.name: trial for trial in before.trials}
    said: set[str] = set()
    words = trial_words(after)
    for trial in after.trials:
        if trial.name not in known:
            yield f"drawn  {trial.name}: {words[trial.name]}"
        before_it = known[trial.name].path if trial.name in known else Path(())
        for line in _news(before_it, trial, store):
            if line not in said:
                said.add(line)
                yield line


def _news(before: Path, after: Trial, store: Store) -> Iterator[str]:
    told = len([each for each in before.decisions if each.spec.key != before.waits])
    for decision in after.path.decisions[told:]:
        if decision.spec.key != after.path.waits and store.finished(decision.spec.key):
            yield f"chosen for {after.name}: {choice_text(store.result(decision.spec.key), _names(after))}"
    outcomes = [step.outcome for step in before.steps]
    for index, step in enumerate(after.steps):
        was = outcomes[index] if index < len(outcomes) else "kept"
        if step.outcome != was:
            yield outcome_text(after.name, index, step)


def _names(trial: Trial) -> list[str]:
    operators = trial.study.operator
    return [operator_name(each) for each in operators] if isinstance(operators, tuple) else []


def choice_text(result: dict[str, Any], names: Sequence[str] = ()) -> str:
    """The order of a choice with the scores, the cheapest first; `names` are those of operators that it chose from."""
    scores, operators = result["scores"], result.get("operators", {})
    told = []
    for layer in map(str, result["order"][:SHOWN]):
        by = f"{names[operators[layer]]}, " if names and layer in operators else ""
        told.append(f"{layer} ({by}{scores[layer]['score']:.3g})")
    more = len(result["order"]) - SHOWN
    return "layers by cost " + ", ".join(told) + (f" and {more} more" if more > 0 else "")


def outcome_text(trial: str, index: int, step: Step) -> str:
    """What became of a stage by its gate, or by what its path goes on until."""
    layers = ",".join(map(str, getattr(step.train, "layers", ())))
    return f"{trial} stage {index + 1}, layers {layers}: {OUTCOMES.get(step.outcome, step.outcome)}"
