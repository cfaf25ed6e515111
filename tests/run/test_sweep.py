"""What a sweep asks for, reports and judges, with a broker and a tuner that are made here: no cluster is started."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune

from orchestrator.distill.context import RunContext
from orchestrator.run import sweep as module
from orchestrator.run.broker import from_the_start
from orchestrator.run.cluster import Cluster, Node
from orchestrator.run.growing import Growing
from orchestrator.run.preflight import free_for_stages
from orchestrator.run.request import Request, read_request
from orchestrator.run.sweep import Outcome, missing, run_plan
from orchestrator.study.plan import Plan
from tests.record.handmade import RATIOS, Hand

NODES = (Node("a", 2, 0, "node:a"), Node("b", 3, 0, "node:b"))
PATHS = {
    "trial-00": ["two 0", "two 1", "two joint"],
    "trial-01": ["two 0", "two 1", "two mixed"],
    "trial-02": ["heads 0", "heads 1", "heads joint"],
}
STOPPING = "search.early_stopping={grace_layers: 1, reduction_factor: 2}"


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    return Hand(tmp_path)


class Broker:
    """Answers with the key that was asked for; remembers all it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = 0
        self.plan: Plan | None = None
        self.settled = 0
        self.want = SimpleNamespace(remote=lambda key: self.asked.append(key) or key)
        self.begin = SimpleNamespace(remote=self._begin)
        self.step = SimpleNamespace(remote=self._step)
        self.settle = SimpleNamespace(remote=self._settle)
        self.goes_on = SimpleNamespace(remote=lambda trial, evaluation: (trial, evaluation) not in self.stops)
        self.stops: list[tuple[str, str]] = []  # trial and evaluation after which it does not go on

    def _begin(self) -> None:
        self.begun += 1

    def _step(self, trial: str, index: int) -> tuple[str, str, int, int] | None:
        assert self.plan is not None
        steps = next(each.steps for each in self.plan.trials if each.name == trial)
        if index == len(steps):
            return None
        step = steps[index]
        return step.train.key, step.evaluate.key, len(step.swapped), step.tokens

    def _settle(self) -> str:
        self.settled += 1
        return "settled"


def stages(hand: Hand, *names: str) -> list[str]:
    """The keys of stages and of their evaluations, in turn."""
    return [key for name in names for key in (hand.key(name), hand.steps[name].evaluate.key)]


def test_what_is_missing_is_what_the_plan_wants_and_the_store_lacks(hand: Hand) -> None:
    measured = list(dict.fromkeys(hand.speeds[hand.key(name)].key for name in hand.steps))
    everything = [hand.plan.tokens.key, *stages(hand, *hand.steps), *measured]
    assert missing(hand.plan, hand.store, hand.speeds, {}) == everything
    assert missing(hand.plan, hand.store, {}, {}) == everything[: -len(measured)]
    hand.text()
    hand.train("two 1")
    hand.evaluate("heads 0")
    hand.measure("skip 0")
    there = {hand.plan.tokens.key, hand.key("two 1"), hand.steps["heads 0"].evaluate.key}
    there.add(hand.speeds[hand.key("skip 0")].key)
    assert missing(hand.plan, hand.store, hand.speeds, {}) == [key for key in everything if key not in there]
    found = missing(hand.plan, hand.store, {}, {"trial-02": 1, "trial-01": 0})
    last = stages(hand, "two mixed", "heads 1", "heads joint")
    assert found == [key for key in everything[: -len(measured)] if key not in there and key not in last]
    hand.all_done()
    assert missing(hand.plan, hand.store, hand.speeds, {}) == []


def test_without_early_stopping_all_of_every_path_is_begun(hand: Hand) -> None:
    names = ["two 0", "two 1", "two joint", "two mixed", "heads 0", "heads 1", "heads joint"]
    assert from_the_start(hand.plan) == stages(hand, *names)


@pytest.mark.parametrize(("grace", "names"), [(1, ["two 0", "heads 0"]), (2, ["two 0", "two 1", "heads 0", "heads 1"])])
def test_with_it_each_path_is_begun_up_to_its_first_judgement(tmp_path: Path, grace: int, names: list[str]) -> None:
    hand = Hand(tmp_path, f"search.early_stopping={{grace_layers: {grace}}}")
    assert from_the_start(hand.plan) == stages(hand, *names)


def test_controls_are_wanted_with_their_evaluations(hand: Hand) -> None:
    wanted = module._start_controls(hand.plan, Broker())
    assert wanted == {
        "text": [hand.plan.tokens.key],
        "teacher": stages(hand, "teacher"),
        "scratch hyena-2": stages(hand, "scratch"),
        **{name: stages(hand, name) for name in ("skip 0", "skip 1", "skip all")},
    }


class Result:
    """How a trial ended, as Tune says it: without a report it does not know the configuration."""

    def __init__(self, trial: str, steps: int | None, error: BaseException | None = None) -> None:
        self.path, self.error = f"/somewhere/{trial}", error
        self.metrics = None if steps is None else {"steps_done": steps}
        self.config = None if steps is None else {"trial": trial}


class Tuner:
    """Runs every trial in turn, in this process, and keeps what it was made with; some `die` before they report."""

    made: Tuner
    die: dict[str, BaseException] = {}  # noqa: RUF012

    def __init__(self, coordinate: Any, *, param_space: Any, tune_config: Any, run_config: Any) -> None:
        self.coordinate, self.trials = coordinate, param_space["trial"]["grid_search"]
        self.tune_config, self.run_config = tune_config, run_config
        self.reports: dict[str, list[dict[str, Any]]] = {}
        Tuner.made = self

    def fit(self) -> list[Result]:
        for trial in self.trials:
            named = self.tune_config.trial_dirname_creator(SimpleNamespace(config={"trial": trial}))
            self.reports[named] = []
            if trial not in self.die:
                self.coordinate({"trial": trial})
        return [Result(trial, len(told) or None, self.die.get(trial)) for trial, told in self.reports.items()]


@pytest.fixture
def tuner(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune and Ray's `get` without a cluster: a stage's result is its perplexity ratio."""
    ratios = {hand.steps[name].evaluate.key: ratio for name, ratio in RATIOS.items()}

    def report(told: dict[str, Any]) -> None:
        list(Tuner.made.reports.values())[-1].append(told)

    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune, "report", report)
    monkeypatch.setattr(tune, "with_resources", lambda coordinate, group: coordinate)
    monkeypatch.setattr(
        ray, "get", lambda of: [{"perplexity_ratio": ratios.get(k)} for k in of] if isinstance(of, list) else of
    )


def test_a_trial_wants_its_stages_in_turn_and_reports_after_each(hand: Hand, tuner: None) -> None:
    broker, outcome = Broker(), Outcome()
    broker.plan = hand.plan
    module._run_trials(growing_of(hand), broker, outcome, NODES)
    assert broker.asked == [key for names in PATHS.values() for key in stages(hand, *names)]
    assert Tuner.made.reports == {
        trial: [
            {"perplexity_ratio": RATIOS[name], "swapped_layers": layers, "student_tokens": tokens, "steps_done": done}
            for name, layers, tokens, done in zip(names, (1, 2, 2), (160, 320, 640), (1, 2, 3), strict=True)
        ]
        for trial, names in PATHS.items()
    }
    assert outcome == Outcome({}, {})
    made = Tuner.made.tune_config
    assert made.scheduler is None and made.max_concurrent_trials == 1 and made.reuse_actors
    assert Tuner.made.run_config.failure_config.max_failures == 1


def test_a_trial_whose_process_dies_before_its_first_report_is_told_by_its_name(
    hand: Hand, tuner: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "die", {"trial-01": RuntimeError("The actor died: the node was low on memory")})
    outcome, broker = Outcome(), Broker()
    broker.plan = hand.plan
    module._run_trials(growing_of(hand), broker, outcome, NODES)
    assert outcome == Outcome({}, {"trial-01": "The actor died: the node was low on memory"})


def test_a_trial_of_which_tune_says_nothing_never_began(
    hand: Hand, tuner: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "fit", lambda self: [Result("trial-00", 3), Result("trial-02", 3)])
    outcome = Outcome()
    module._run_trials(growing_of(hand), Broker(), outcome, NODES)
    assert outcome == Outcome({}, {"trial-01": "it never began"})


def test_a_trial_that_does_not_go_on_is_stopped_after_that_stage(hand: Hand, tuner: None) -> None:
    """After the last stage there is nothing left to stop."""
    broker, outcome = Broker(), Outcome()
    broker.plan = hand.plan
    broker.stops = [("trial-00", stages(hand, "two 1")[1]), ("trial-02", stages(hand, "heads joint")[1])]
    module._run_trials(growing_of(hand), broker, outcome, NODES)
    assert outcome == Outcome({"trial-00": 2}, {})
    assert [report["steps_done"] for report in Tuner.made.reports["trial-00"]] == [1, 2]
    assert hand.key("two joint") not in broker.asked and hand.key("two mixed") in broker.asked


def test_a_plan_without_trials_starts_no_tuner(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "Tuner", None)
    empty = growing_of(hand)
    empty.plan = dataclasses.replace(empty.plan, trials=())
    module._run_trials(empty, Broker(), Outcome(), NODES)


@pytest.mark.parametrize(("cpus", "trials"), [((2, 3), 10), ((0.25,), 2)])
def test_early_stopping_has_two_trials_a_core_at_a_time(tmp_path: Path, cpus: tuple[float, ...], trials: int) -> None:
    plan = Hand(tmp_path, STOPPING).plan
    assert module._at_once(plan, tuple(Node(str(n), n, 0, "") for n in cpus)) == trials  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "error", "stopped", "failures"),
    [
        (3, None, {}, {}),
        (2, None, {"trial-01": 2}, {}),
        (None, None, {"trial-01": 0}, {}),
        (2, RuntimeError("it broke"), {"trial-01": 7}, {"trial-01": "it broke"}),
    ],
)
def test_how_a_trial_ended(
    hand: Hand, steps: int | None, error: Exception | None, stopped: dict[str, int], failures: dict[str, str]
) -> None:
    outcome = Outcome({"trial-01": 7})
    module._judge("trial-01", hand.plan.trials[1], Result("trial-01", steps, error), outcome)
    assert outcome == Outcome(stopped, failures)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("it broke", "it broke"),
        ("Traceback\n  File x\nValueError: no\n\n", "ValueError: no"),
        ("a\norchestrator.run.broker.StageFailed: NonFiniteLoss: step 4\n  of machinery\n", "NonFiniteLoss: step 4"),
        ("StageFailed: first\nStageFailed: last", "last"),
        ("", "ArithmeticError"),
    ],
)
def test_the_line_of_an_error_that_says_why(text: str, told: str) -> None:
    assert module._reason(ArithmeticError(text)) == told


def test_measured_is_what_is_finished_each_architecture_once(hand: Hand) -> None:
    assert module._measurable(hand.store, hand.speeds) == {}
    for name in ("two 1", "two joint", "teacher"):
        hand.train(name)
    keys = {hand.speeds[hand.key(name)].key for name in ("two 1", "teacher")}
    assert module._measurable(hand.store, hand.speeds) == {f"throughput {key[:8]}": key for key in sorted(keys)}


def test_what_fails_beside_the_trials_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: str) -> None:
        if reference == "bad":
            raise ray.exceptions.RaySystemError("StageFailed: it diverged")

    monkeypatch.setattr(ray, "get", get)
    outcome = Outcome()
    module._collect({"skip 0": "good", "skip 1": "bad", "skip 2": "good"}, outcome)  # type: ignore[dict-item]
    assert outcome.stopped == {} and list(outcome.failures) == ["skip 1"]
    assert "it diverged" in outcome.failures["skip 1"]


class Machine:
    """A cluster of two nodes and a broker on it, without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trials: Any) -> None:
        self.broker = Broker()
        self.request: Request | None = None
        self.checked: list[str] = []
        self.got: list[Any] = []

        @contextlib.contextmanager
        def connected(_: Cluster) -> Iterator[tuple[Node, ...]]:
            yield NODES

        def start(request: Path, context: RunContext, nodes: tuple[Node, ...]) -> Broker:
            self.request = read_request(request)
            return self.broker

        from orchestrator.run import broker

        monkeypatch.setattr(module, "connected", connected)
        monkeypatch.setattr(module, "check_resources", lambda specs, *_: self.checked.extend(s.key for s in specs))
        monkeypatch.setattr(broker, "start_broker", start)
        monkeypatch.setattr(module, "_run_trials", trials)
        monkeypatch.setattr(ray, "get", self.got.append)


def test_a_plan_is_run_controls_first_and_speeds_last(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def trials(growing: Growing, broker: Broker, outcome: Outcome, nodes: tuple[Node, ...]) -> None:
        asked.extend(broker.asked)
        assert broker.begun == 1 and nodes == NODES
        hand.train("two 0")  # what is finished by now is measured
        outcome.stopped["trial-00"] = 1

    machine = Machine(monkeypatch, trials)
    growing = growing_of(hand)
    outcome = run_plan(growing, RunContext(store=str(hand.home.store)), Cluster(cpus=2, gpus=0))
    assert outcome == Outcome({"trial-00": 1}, {})
    assert set(machine.checked) == {*hand.plan.specs, *(spec.key for spec in hand.speeds.values())}
    assert machine.request is not None and machine.request.planner == growing.planner
    assert 0 < (machine.request.free or 0) < 2**50
    controls = [hand.plan.tokens.key, *stages(hand, "teacher", "scratch", "skip 0", "skip 1", "skip all")]
    measured = hand.speeds[hand.key("two 0")].key
    assert sorted(asked) == sorted(controls)
    assert machine.broker.asked == [*asked, *asked, measured]  # what has become known meanwhile is asked for too
    assert [key for keys in machine.got for key in keys] == [*controls, measured]


def growing_of(hand: Hand) -> Growing:
    return hand.asked.growing(hand.store)


def test_memory_of_other_machines_is_not_counted() -> None:
    context = RunContext(store="s")
    assert free_for_stages(context, Cluster("10.0.0.1:6379", cpus=1, gpus=0)) is None
    assert free_for_stages(RunContext(store="s", device="cuda"), Cluster(cpus=1, gpus=1)) is None


@pytest.mark.parametrize("asked_to_stop", [True, False])
def test_stages_that_train_are_waited_for_when_a_run_is_asked_to_stop(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked_to_stop: bool
) -> None:
    def trials(*_: Any) -> None:
        raise KeyboardInterrupt

    machine = Machine(monkeypatch, trials)
    context = RunContext(store=str(hand.home.store), stop=str(tmp_path / "stop"))
    if asked_to_stop:
        (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run_plan(growing_of(hand), context, Cluster(cpus=2, gpus=0))
    assert machine.broker.settled == asked_to_stop
    assert machine.got == (["settled"] if asked_to_stop else [])


PROBES = "evaluation.probes={}"


def probes(hand: Hand, *names: str) -> list[str]:
    """The keys of the probes of stages."""
    return [spec.key for name in names if (spec := hand.steps[name].probes) is not None]


def test_probes_are_missing_until_they_are_there_and_only_of_what_was_not_stopped(tmp_path: Path) -> None:
    hand = Hand(tmp_path, PROBES)
    names = ["teacher", "skip all", "two 0", "two 1", "two joint", "two mixed", "heads 0", "heads 1", "heads joint"]
    hand.all_done()
    assert missing(hand.plan, hand.store, hand.speeds, {}) == probes(hand, *names)
    assert missing(hand.plan, hand.store, hand.speeds, {"trial-02": 1}) == probes(hand, *names[:-2])
    hand.probe("teacher", *names[2:])
    assert missing(hand.plan, hand.store, hand.speeds, {}) == probes(hand, "skip all")
    hand.probe("skip all")
    assert missing(hand.plan, hand.store, hand.speeds, {}) == []


def test_probes_come_between_trials_and_speeds_of_models_that_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(tmp_path, PROBES)
    asked: list[str] = []

    def trials(growing: Growing, broker: Broker, outcome: Outcome, nodes: tuple[Node, ...]) -> None:
        hand.finish("teacher", "two 0")
        hand.train("two 1")  # not evaluated, for the run was stopped
        asked.extend([*broker.asked, *from_the_start(growing.plan)])

    machine = Machine(monkeypatch, trials)
    run_plan(growing_of(hand), RunContext(store=str(hand.home.store)), Cluster(cpus=2, gpus=0))
    every = probes(hand, *hand.steps)
    assert not set(every) & set(asked) and set(every) <= set(machine.checked)
    measured = [key for keys in machine.got for key in keys][-5:]
    assert measured[:2] == probes(hand, "teacher", "two 0")
    assert sorted(measured[2:]) == sorted(hand.speeds[hand.key(name)].key for name in ("teacher", "two 0", "two 1"))
