"""What a stage is expected to take, from what stages like it took: its own rate, else that of the nearest kind.

Place in the flow: the estimate of the time left asks for every stage that is not done. All cost is told in seconds for
each unit of work, a token that is trained or as much as one token costs a forward pass, so that one kind can stand in
for another before that is measured. Invariant: a pure function of specifications and of what was found of the stages.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator.record.screen.facts import Stage
from orchestrator.study.spec import CHEAP_SECONDS, BlendSpec, EvaluateSpec, ProbesSpec, ScoreSpec, Spec, ThroughputSpec
from orchestrator.study.stages import stretches_of

Kind = tuple[Any, ...]  # from the general, what is done with which teacher, to the particular: operator and layers
NEWEST = 9  # measurements of a kind whose middle counts
GENERAL = 2  # parts of a kind that must agree: what is done, and the teacher
# Before a kind is measured: what it costs for each token that is trained on the text alone. A forward pass is a third
# of a step, and less where a stage has the machine alone. Beside a frozen teacher, whose pass is another third, an
# operator trains: of the default study's 37 stages 1.4 to 2.4 times as long as its teacher's attention, the middle one
# 1.7 times. A blend has the layers' attention as well.
SHARES = {
    "blend": 2.5, "beside": 1.7, "layers": 1.5, "alone": 1.0,
    "evaluate": 1 / 3, "score": 1 / 3, "probes": 1 / 3, "throughput": 1 / 5,
}  # fmt: skip
# How much faster a stage is with more threads: by this power of their number; 2 are 1.7 times as fast as 1.
THREADS = 0.75
STEP = 32  # tokens of a forward pass that one decoding step costs, whatever the batch: it reads all weights
BESIDE = 1.0  # seconds beside a stage's work, to load models and to publish, before any is measured
TEXT = 10.0  # seconds of making the text, or of bringing a teacher
DEPTHS = 3  # at which the probes hide each key
KEYS = 12  # decoding steps that it takes to compare the keys of one text


class Model(NamedTuple):
    """What the cost of a model depends on: its teacher, what takes attention's place, and in how many layers."""

    teacher: str
    operator: str
    layers: int


Models = dict[str, Model]  # by key of the stage that computes with it


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one unit of a kind of work, or one stage beside its work, took."""

    kind: Kind
    seconds: float
    fresh: bool  # in this run


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that are expected, and the kinds of work in them that nothing has measured."""

    seconds: float
    guessed: frozenset[str] = frozenset()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.guessed | other.guessed)


class Costs:
    """Expectations from observations. Those of this run win over older ones of a kind, the nearer kind over both."""

    def __init__(self, observations: Iterable[Observation]) -> None:
        self.fresh: defaultdict[Kind, list[float]] = defaultdict(list)
        self.old: defaultdict[Kind, list[float]] = defaultdict(list)
        for each in (seen := tuple(observations)):
            table = self.fresh if each.fresh else self.old
            table[each.kind[:GENERAL]].append(each.seconds * _speedup(each.kind))  # as on one thread
            for length in range(GENERAL + 1, len(each.kind) + 1):
                table[each.kind[:length]].append(each.seconds)
        whole = {each.kind for each in seen}
        both = [(self.fresh[kind], self.old[kind]) for kind in self.fresh.keys() & self.old.keys() & whole]
        # How much slower this run is than earlier ones: on another machine, or with more beside it.
        slower = [_middle(new) / _middle(old) for new, old in both if _middle(old)]
        self.slower = statistics.median(slower) if slower else 1.0

    def unit(self, kind: Kind) -> tuple[float, bool] | None:
        """Seconds for each unit of work of a kind, and whether that kind was measured; None where nothing is known."""
        known = self._known(kind)
        if known is not None:
            return known, True
        for other in ("alone", "beside", "layers"):
            known = self._known((other, *kind[1:]))
            if known is not None:
                return known * SHARES[str(kind[0])] / SHARES[other], False
        return None

    def beside(self, kind: Kind) -> float:
        """Seconds that a stage which trains takes beside that."""
        known = self._known(kind)
        return BESIDE if known is None else known

    def _known(self, kind: Kind) -> float | None:
        for length in range(len(kind), GENERAL - 1, -1):
            threads = 1.0 if length > GENERAL else _speedup(kind)
            if self.fresh.get(kind[:length]):
                return _middle(self.fresh[kind[:length]]) / threads
            if self.old.get(kind[:length]):
                return _middle(self.old[kind[:length]]) * self.slower / threads
        return None


def _speedup(kind: Kind) -> float:
    """Of the threads of a kind, over one."""
    how = kind[GENERAL] if len(kind) > GENERAL else ()
    return float((how[0] if how else 1) ** THREADS)


def _middle(values: list[float]) -> float:
    return statistics.median(values[-NEWEST:])


def expected(spec: Spec, stage: Stage, models: Models, costs: Costs) -> Cost | None:
    """The seconds of a stage without the tokens that it has trained; None where nothing is known to tell them from."""
    name, stretches = kind_name(spec), stretches_of(spec)
    if name in ("tokens", "import", "choice", "draw"):
        return Cost(TEXT)
    if not hasattr(spec, "optimizer"):
        found = costs.unit(kind_of(name, spec, models))
        if found is None:
            return None
        seconds = found[0] * units(spec)
        return Cost(seconds) if found[1] else Cost(max(seconds, _least(spec)) + BESIDE, frozenset({name}))
    total = Cost(costs.beside(kind_of(name, spec, models)))
    own, begun = own_units(spec, stage), 0
    for stretch, tokens in stretches:
        rest = max(0, min(tokens, begun + tokens - stage.tokens))
        begun += tokens
        known = (own[stretch], True) if stretch in own else costs.unit(kind_of(stretch, spec, models))
        if rest and known is None:
            return None
        if rest and known is not None:
            total += Cost(rest * known[0], frozenset() if known[1] else frozenset({stretch}))
    return total


def _least(spec: Spec) -> float:
    """Seconds that a stage takes however fast it computes: speeds are measured again while that is cheap."""
    if not isinstance(spec, ThroughputSpec) or spec.throughput.repeats == 1:
        return 0.0
    return CHEAP_SECONDS * (2 * len(spec.throughput.lengths) + 1)  # prefill and decode by length, and training


def own_units(spec: Spec, stage: Stage) -> dict[str, float]:
    """Seconds a token by stretch as a stage's own journal tells, the middle of its newest lines."""
    found, begun = {}, 0
    for stretch, tokens in stretches_of(spec):
        rates = [rate for at, rate in stage.points if begun < at <= begun + tokens and rate > 0]
        rates = rates[1:][-NEWEST:] or rates  # the first line has what is slow at the beginning
        if rates:
            found[stretch] = 1 / statistics.median(rates)
        begun += tokens
    return found


def observations(stages: Mapping[str, Stage], specs: Mapping[str, Spec], models: Models) -> Iterator[Observation]:
    """What was measured of these stages, done or not."""
    for key, stage in stages.items():
        if key not in models:
            continue
        spec = specs[key]
        for stretch, seconds in own_units(spec, stage).items():
            yield Observation(kind_of(stretch, spec, models), seconds, stage.fresh)
        kind = kind_of(kind_name(spec), spec, models)
        if stage.beside is not None:
            yield Observation(kind, stage.beside, stage.fresh)
        elif stage.seconds is not None:
            yield Observation(kind, stage.seconds / units(spec), stage.fresh)


def kind_name(spec: Spec) -> str:
    """What a stage does; of one that trains, what it does beside that."""
    kind = str(getattr(spec, "kind", ""))
    return f"beside {kind}" if stretches_of(spec) else "skip" if kind == "distil" else kind


def kind_of(name: str, spec: Spec, models: Models) -> Kind:
    """What is done, with which teacher, at which precision and width, by which operator in how many layers."""
    model = models[spec.key]
    numerics: Any = getattr(spec, "numerics", None)
    how = (numerics.threads, numerics.world_size, numerics.dtype, numerics.core) if numerics else ()
    return (name, model.teacher, how, model.operator, model.layers)


def models_of(specs: Mapping[str, Any]) -> Models:
    """The model that each of these stages computes with; none of a stage without one, or whose model is not here."""
    found: Models = {}

    def model(key: str) -> Model | None:
        if key not in found and key in specs:
            made = _model(specs[key], model)
            if made is None:
                return None
            found[key] = made
        return found.get(key)

    for key in specs:
        model(key)
    return found


def _model(spec: Any, model: Callable[[str], Model | None]) -> Model | None:
    match spec.kind:
        case "teacher":
            return Model(repr(spec.architecture), "", 0)
        case "scratch":
            return Model(repr(spec.architecture), repr(spec.operator), len(spec.layers))
        case "import":
            return Model(str(spec.fingerprint), "", 0)
        case "throughput":
            teacher = model(spec.teacher)
            return teacher and Model(teacher.teacher, repr(spec.operator), len(spec.layers))
        case "distil":
            before = model(spec.parent)
            return before and Model(before.teacher, repr(spec.operator), before.layers + len(spec.new_layers))
        case "evaluate" | "probes":
            return model(spec.subject)
        case "score" | "blend":
            before = model(spec.subject)
            return before and Model(before.teacher, repr(spec.operator), before.layers + len(spec.layers))
    return None


def units(spec: Any) -> float:
    """Tokens of a forward pass that a stage costs that does not distil, roughly; of a blend those that it trains on.

    What is measured is told for each of them, so that no more than the difference between settings hangs on it.
    """
    if isinstance(spec, EvaluateSpec):
        asked = spec.evaluation
        said = 2 * asked.new_tokens * (STEP + asked.prompts) if asked.prompts else 0
        return float((asked.tokens + said) * (1 if spec.reference else 2))
    if isinstance(spec, ScoreSpec):
        return float(spec.text * (1 if spec.reference else 2))
    if isinstance(spec, BlendSpec):
        return float(spec.steps * spec.batch_size * spec.sequence_length)
    if isinstance(spec, ProbesSpec):
        read = spec.windows * max(spec.lengths) * len(spec.lengths)
        return float(read + spec.needles * DEPTHS * (sum(spec.lengths) + len(spec.lengths) * KEYS * STEP))
    if isinstance(spec, ThroughputSpec):
        timed = spec.throughput
        decoded = timed.decode_tokens * (STEP + timed.batch_size)
        each = [2 * timed.batch_size * length + decoded for length in timed.lengths]
        trained = 3 * spec.train_batch_size * spec.sequence_length
        return float(2 * (timed.repeats + 1) * (sum(each) + trained))  # both models, and once to warm up
    return 1.0
