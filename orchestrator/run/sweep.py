"""Run a plan: Ray Tune coordinates the trials, the broker computes their stages, speed is measured at the end.

A trial is a coordinator without a core: it wants its stages in turn, reports after each, and asks whether it goes on.
Invariant: the store decides what is left to do, so a plan that is done starts nothing.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext
from orchestrator.run.cluster import Cluster, Node, check_resources, connected
from orchestrator.run.growing import Growing
from orchestrator.run.preflight import free_for_stages
from orchestrator.run.request import Request
from orchestrator.run.store import Store
from orchestrator.run.temporary import temporary_directory
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ThroughputSpec

TRIAL_SLOT = 0.001  # of a resource that is there in plenty: nothing but a number of processes bounds the trials


@dataclasses.dataclass
class Outcome:
    """How a run ended: the reason of every failed trial, control or measurement, and trials stopped early."""

    stopped: dict[str, int] = dataclasses.field(default_factory=dict)  # trial -> steps it finished
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


def missing(plan: Plan, store: Store, speeds: dict[str, ThroughputSpec], stopped: dict[str, int]) -> list[str]:
    """Keys that the plan wants and the store lacks, measurements included; `stopped` trials want their first steps."""
    steps = [plan.teacher, *plan.controls.values()]
    for trial in plan.trials:
        steps += trial.steps[: stopped.get(trial.name, len(trial.steps))]
    wanted = [plan.tokens.key, *(spec.key for step in steps for spec in (step.train, step.evaluate))]
    wanted += [spec.key for step in steps for spec in step.probed]
    wanted += [spec.key for trial in plan.trials for spec in trial.path.specs]
    wanted += [spec.key for spec in (*plan.drawing.rounds, *plan.drawing.measured)]
    wanted += [speeds[step.train.key].key for step in steps if step.train.key in speeds]
    return [key for key in dict.fromkeys(wanted) if not store.finished(key)]


def run_plan(growing: Growing, context: RunContext, cluster: Cluster) -> Outcome:
    """Compute everything the plan asks for and the store lacks; a failed trial does not stop the others.

    Where results decide what comes next, the plan has grown by that when this returns.

    Raises `ClusterError` where a stage asks for more than the cluster has. On `KeyboardInterrupt` with the
    context's stop file in place it lets training stages write a checkpoint first; what does not train is cancelled.
    """
    outcome = Outcome()
    free = free_for_stages(context, cluster)
    with connected(cluster) as nodes, temporary_directory("plan") as folder:
        check_resources(growing.specs.values(), context, nodes)
        from orchestrator.run.broker import start_broker

        request = Request(growing.planner, free)
        broker = start_broker(request.write(folder / "request"), context, nodes)
        try:
            controls = _start_controls(growing.plan, broker)
            broker.begin.remote()
            _run_trials(growing, broker, outcome, nodes)
            controls |= _start_controls(growing.plan, broker)
            _collect(controls, outcome)
            probes = _probeable(growing.store, growing.plan)
            _collect({name: [broker.want.remote(key)] for name, key in probes.items()}, outcome)
            # Speed is measured when all training is over: each measurement asks for every core, so one runs at a time.
            measurements = _measurable(growing.store, growing.speeds)
            _collect({name: [broker.want.remote(key)] for name, key in measurements.items()}, outcome)
        except KeyboardInterrupt:
            if context.stopping():
                _settle(broker)
            raise
    return outcome


def _settle(broker: Any) -> None:
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(broker.settle.remote())


def _start_controls(plan: Plan, broker: Any) -> dict[str, list[Any]]:
    """Ask for the teacher's evaluation and the controls; what needs no teacher trains meanwhile on a free core."""
    wanted = {"teacher": plan.teacher, **plan.controls}
    started = {name: _want(broker, step.train.key, step.evaluate.key) for name, step in wanted.items()}
    return {"text": [broker.want.remote(plan.tokens.key)], **started}


def _want(broker: Any, train: str, evaluate: str) -> list[Any]:
    """The futures of a stage and of its evaluation: the store may have lost either without the other."""
    return [broker.want.remote(train), broker.want.remote(evaluate)]


def _run_trials(growing: Growing, broker: Any, outcome: Outcome, nodes: tuple[Node, ...]) -> None:
    from ray import tune

    plan = growing.plan
    names = plan.names
    if not names:
        return

    def coordinate(config: dict[str, Any]) -> None:
        import ray

        index = 0
        while (step := ray.get(broker.step.remote(config["trial"], index))) is not None:
            train, evaluate, swapped, tokens = step
            _, result = ray.get(_want(broker, train, evaluate))
            index += 1
            tune.report(
                {
                    "perplexity_ratio": result["perplexity_ratio"],
                    "swapped_layers": swapped,
                    "student_tokens": tokens,
                    "steps_done": index,
                }
            )
            if not ray.get(broker.goes_on.remote(config["trial"], evaluate)):
                return

    slot = {"CPU": 0, nodes[0].tag: TRIAL_SLOT}  # a trial is a process without a core, on the driver's machine
    with temporary_directory("tune") as storage:
        tuner = tune.Tuner(
            tune.with_resources(coordinate, tune.PlacementGroupFactory([slot])),
            param_space={"trial": tune.grid_search(names)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=_at_once(plan, nodes),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                storage_path=str(storage), verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        )
        results = tuner.fit()
    # A trial whose process died before its first report has a result without its configuration.
    ended = {Path(result.path).name: result for result in (results[index] for index in range(len(results)))}
    growing.grow()
    trials = {trial.name: trial for trial in growing.plan.trials}
    for name in names:
        _judge(name, trials.get(name), ended.get(name), outcome)


def _at_once(plan: Plan, nodes: tuple[Node, ...]) -> int:
    """Trials that have a coordinator at a time: a process each, which costs some seconds of a core to start.

    Without early stopping the broker has been asked for everything already and a coordinator only looks on.
    """
    return 1 if plan.study.search.early_stopping is None else max(2, int(2 * sum(node.cpus for node in nodes)))


def _judge(name: str, trial: Trial | None, result: Any, outcome: Outcome) -> None:
    """How a trial ended; of one that was never drawn, why."""
    if result is None or result.error is not None:
        outcome.failures[name] = _reason(result.error) if result else "it never began"
        return
    finished = int((result.metrics or {}).get("steps_done", 0))
    outcome.stopped.pop(name, None)
    if trial is not None and not trial.ruled and finished < len(trial.steps):
        outcome.stopped[name] = finished


def _probeable(store: Store, plan: Plan) -> dict[str, str]:
    """Name -> key of the probes whose model is finished and evaluated; what a trial was stopped before has none."""
    steps = [step for step in plan.steps if store.finished(step.train.key) and store.finished(step.evaluate.key)]
    keys = dict.fromkeys(spec.key for step in steps for spec in step.probed)
    return {f"probes {key[:8]}": key for key in keys}


def _measurable(store: Store, speeds: dict[str, ThroughputSpec]) -> dict[str, str]:
    """Name -> key of the measurements whose student is finished."""
    keys = {spec.key for trained, spec in speeds.items() if store.finished(trained)}
    return {f"throughput {key[:8]}": key for key in sorted(keys)}


def _collect(references: dict[str, list[Any]], outcome: Outcome) -> None:
    import ray

    for name, reference in references.items():
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            outcome.failures[name] = _reason(error)


def _reason(error: BaseException) -> str:
    """The line of an error that says why, without the traces of the machinery around it."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    told = [line for line in lines if "StageFailed" in line]
    line = (told or lines or [type(error).__name__])[-1]
    return line.split("StageFailed: ", 1)[-1]
