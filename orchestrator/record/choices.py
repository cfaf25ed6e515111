"""What choices of layers found and cost, and what gates made of stages: plain data from plan and store.

Place in the flow: the report's tables, MLflow's `choices.json` and `layerswap regret` tell these. Invariant: what is
not finished is not told, and a decision that several trials rest on is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.run.store import Store
from orchestrator.study.decision import Decision
from orchestrator.study.names import operator_name
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ScoreSpec
from orchestrator.study.stages import Step, stretches_of

EXCESS = {"loss": "excess_loss", "hits": "excess_hit_loss"}  # measures that are told as what is more than the teacher's
TEACHER = "teacher"  # the student that a decision is made at, before any is trained
GATE = "gate"  # the measure of a blend: a number from 0, attention, to 1, the operator


@dataclasses.dataclass(frozen=True)
class Cost:
    """What choosing took."""

    scores: int = 0  # students that were scored
    trained: int = 0  # tokens that students trained on to be scored
    read: int = 0  # tokens of held-out text, by all scores together
    seconds: float = 0.0  # of all stages, one after the other


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A decision that was made.

    Attributes:
        trials: that rest on it, and `number` is which of their decisions it is, from 1.
        student: at which it was made, for people.
        measure: kl, loss, hits or gate; `scores` are by layer score and standard error, of loss and hits what is more
            than the teacher's own, `teacher`; of gates without errors.
        ascending: whether what costs least goes first: of layers swapped alone.
        order: the candidates; `tied` those that could as well be first. `operators` has what each is swapped by, by
            name, where there were several to choose from.
        tau: mean, low and high of Kendall's tau over windows; None where it has none.
    """

    key: str
    trials: tuple[str, ...]
    number: int
    student: str
    measure: str
    ascending: bool
    order: tuple[int, ...]
    scores: dict[int, tuple[float, float | None]]
    operators: dict[int, str]
    teacher: tuple[float, float] | None
    tied: tuple[int, ...]
    tau: tuple[float, float, float] | None
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Gated:
    """What became of the layers of a stage, by what its students' perplexity was over the teacher's.

    `ratios` has one more number for every time that it was trained on; `limit` is the gate's, or else what its path
    goes on until; `outcome` is None as long as nothing is decided.
    """

    trials: tuple[str, ...]
    stage: int
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    limit: float
    outcome: str | None


@dataclasses.dataclass(frozen=True)
class Decided:
    """All that results have decided of a study."""

    choices: tuple[Chosen, ...] = ()
    gates: tuple[Gated, ...] = ()


def decided_of(plan: Plan, store: Store) -> Decided:
    """What the store knows of it."""
    return Decided(tuple(choices_of(plan, store)), tuple(gates_of(plan, store)))


def choices_of(plan: Plan, store: Store, trials: Iterable[Trial] | None = None) -> list[Chosen]:
    """The decisions that were made, in the order of trials, or of those that are given."""
    users: dict[str, list[str]] = {}
    found: dict[str, tuple[Trial, int, Decision]] = {}
    for trial in plan.trials if trials is None else trials:
        for number, decision in enumerate(trial.path.decisions, 1):
            if store.finished(decision.spec.key):
                users.setdefault(decision.spec.key, []).append(trial.name)
                found.setdefault(decision.spec.key, (trial, number, decision))
    return [_chosen(store, tuple(users[key]), *told) for key, told in found.items()]


def _chosen(store: Store, trials: tuple[str, ...], trial: Trial, number: int, decision: Decision) -> Chosen:
    spec, result = decision.spec, store.result(decision.spec.key)
    blended = spec.blend is not None
    scores = {int(layer): (told["score"], told.get("error")) for layer, told in result["scores"].items()}
    if spec.measure in EXCESS and not blended:
        best = {layer: result.get("operators", {}).get(str(layer), 0) for layer in scores}
        told = {each.layer: each.score for each in spec.candidates if best.get(each.layer) == each.operator}
        scores = {layer: _excess(store, key, EXCESS[spec.measure]) for layer, key in told.items()}
    teacher, tau = result.get("teacher"), result.get("tau")
    names = list(map(operator_name, asked)) if isinstance(asked := trial.study.operator, tuple) else []
    return Chosen(
        key=spec.key,
        trials=trials,
        number=number,
        student=_student(trial, spec.subject),
        measure=GATE if blended else spec.measure,
        ascending=spec.ascending and not blended,
        order=tuple(result["order"]),
        scores=scores,
        operators={int(layer): names[own] for layer, own in result.get("operators", {}).items() if names},
        teacher=None if teacher is None else (teacher["score"], teacher["error"]),
        tied=tuple(result.get("tied", ())),
        tau=None if tau is None else (tau["mean"], tau["low"], tau["high"]),
        cost=cost_of([decision], store),
    )


def _excess(store: Store, key: str, name: str) -> tuple[float, float | None]:
    """A score over the teacher's own, whose error is paired over windows."""
    told = store.result(key)
    return told[name], told[f"{name}_error"]


def _student(trial: Trial, subject: str) -> str:
    for index, step in enumerate(trial.steps, 1):
        if step.train.key == subject:
            return f"stage {index}"
    return TEACHER


def cost_of(decisions: Sequence[Decision], store: Store) -> Cost:
    """Of decisions together, what they share once; of what is finished."""
    specs = {spec.key: spec for each in decisions for spec in (*each.needs, each.spec) if store.finished(spec.key)}
    scores = [spec for spec in specs.values() if isinstance(spec, ScoreSpec)]
    return Cost(
        scores=sum(1 for spec in scores if spec.subject != spec.teacher or spec.layers),
        trained=sum(_trained(spec) for spec in specs.values()),
        read=sum(int(store.result(spec.key)["tokens"]) for spec in scores),
        seconds=sum(float(store.done(key)["seconds"]) for key in specs),
    )


def _trained(spec: Any) -> int:
    if hasattr(spec, "steps"):  # of a blend
        return int(spec.steps * spec.batch_size * spec.sequence_length)
    return sum(tokens for _, tokens in stretches_of(spec))


def gates_of(plan: Plan, store: Store) -> list[Gated]:
    """What became of every stage of the trials that have a gate, or that go on until a ratio; equal ones once."""
    found: dict[str, Gated] = {}
    for trial in plan.trials:
        schedule = trial.study.schedule
        until = None if schedule.choice is None or schedule.choice.until is None else schedule.choice.until.ratio
        limit = until if schedule.gate is None else schedule.gate.ratio
        if limit is None:
            continue
        for index, steps in _rounds(trial):
            ratios = [_ratio(store, step) for step in steps]
            known = tuple(ratio for ratio in ratios if ratio is not None)
            if not known:
                continue
            waits = trial.path.waits == steps[-1].evaluate.key
            outcome = None if waits else steps[-1].outcome
            if len(known) < len(steps):  # what is trained on now
                outcome = "extended"
            layers = tuple(getattr(steps[-1].train, "layers", ()))
            told = Gated((trial.name,), index, layers, known, limit, outcome)
            key = f"{steps[-1].train.key} {index} {limit} {outcome}"
            before = found.get(key)
            found[key] = told if before is None else dataclasses.replace(before, trials=(*before.trials, trial.name))
    return list(found.values())


def _rounds(trial: Trial) -> Iterator[tuple[int, list[Step]]]:
    """The stages of a trial, those that went on with the same layers together, with the number of the first."""
    several: list[Step] = []
    for index, step in enumerate(trial.steps, 1):
        if several and getattr(step.train, "layers", ()) == getattr(several[0].train, "layers", ()) and not step.joint:
            several.append(step)
            continue
        if several:
            yield index - len(several), several
        several = [] if step.joint else [step]
    if several:
        yield len(trial.steps) - len(several) + 1, several


def _ratio(store: Store, step: Step) -> float | None:
    key = step.evaluate.key
    return float(store.result(key)["perplexity_ratio"]) if store.finished(key) else None
