"""Run a plan: Ray Tune coordinates the trials, the broker computes their stages, speed is measured at the end.

A trial is a coordinator without a core: it wants its stages in turn and reports after each, where a scheduler may stop
it. Invariant: the store decides what is left to do, so a plan that is done starts nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.distill.context import RunContext
from orchestrator.run.guard import guarded
from orchestrator.run.store import Disturbed, Store, compute
from orchestrator.study.plan import Plan, Trial
from orchestrator.study.spec import ThroughputSpec

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
OBJECT_STORE_BYTES = 100 * 1024 * 1024


class ClusterError(ValueError):
    """The cluster cannot hold a stage of the plan."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What to run on: an address of a Ray cluster, or none to start one on this machine with `cpus` cores."""

    address: str | None = None
    cpus: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))


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
    wanted = [spec.key for step in steps for spec in (step.train, step.evaluate)]
    wanted += [speeds[step.train.key].key for step in steps if step.train.key in speeds]
    return [key for key in dict.fromkeys(wanted) if not store.finished(key)]


def run_plan(plan: Plan, context: RunContext, speeds: dict[str, ThroughputSpec], cluster: Cluster) -> Outcome:
    """Compute everything the plan asks for and the store lacks; a failed trial does not stop the others.

    Raises `ClusterError` where a stage asks for more cores than the cluster has. On `KeyboardInterrupt` with the
    context's stop file in place it lets training stages write a checkpoint first; what does not train is cancelled.
    """
    outcome = Outcome()
    with _ray(cluster) as cores:
        _check_resources(plan, cores)
        from orchestrator.run.broker import start_broker

        broker = start_broker({key: spec.model_dump_json() for key, spec in plan.specs.items()}, context)
        try:
            controls = _start_controls(plan, broker)
            _run_trials(plan, broker, outcome, cores)
            _collect(controls, outcome)
            _measure(broker, context, speeds, cores, outcome)
        except KeyboardInterrupt:
            if context.stopping():
                _settle(broker)
            raise
    return outcome


@contextmanager
def _ray(cluster: Cluster) -> Iterator[int]:
    os.environ.update(QUIET)
    import ray

    local: dict[str, Any] = {}
    temporary = tempfile.mkdtemp(prefix="layerswap-")
    if not _writable(Path.home()):  # Ray keeps a token there, and dies where it cannot
        os.environ["HOME"] = temporary
    if cluster.address is None:
        local = {
            "num_cpus": cluster.cpus,
            "resources": {"trial_slot": 2 * cluster.cpus},
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": temporary,
        }
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told once, at the end
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with guarded(temporary):
        try:
            with _own_sigterm():
                ray.init(address=cluster.address, namespace="layerswap", **quiet, **local)
            yield int(ray.cluster_resources().get("CPU", 0))
        finally:
            ray.shutdown()


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: `ray.init` replaces it by one that exits with the number of the signal."""
    handler = signal.getsignal(signal.SIGTERM)
    terminated = False
    try:
        yield
    except SystemExit:
        terminated = True
    finally:
        signal.signal(signal.SIGTERM, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def _settle(broker: Any) -> None:
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(broker.settle.remote())


def _check_resources(plan: Plan, cores: int) -> None:
    for spec in plan.specs.values():
        threads = spec.numerics.threads if hasattr(spec, "numerics") else 1
        if threads > cores:
            kind = type(spec).__name__.removesuffix("Spec").lower()
            raise ClusterError(f"a {kind} stage asks for {threads} threads but there are {cores} cores: lower threads")


def _start_controls(plan: Plan, broker: Any) -> dict[str, Any]:
    """Ask for the teacher's evaluation and the controls; what needs no teacher trains meanwhile on a free core."""
    wanted = {"teacher": plan.teacher, **plan.controls}
    return {name: broker.want.remote(step.evaluate.key) for name, step in wanted.items()}


def _run_trials(plan: Plan, broker: Any, outcome: Outcome, cores: int) -> None:
    from ray import tune

    if not plan.trials:
        return
    ahead = plan.study.search.early_stopping is None  # then the next stage need not wait for this one's evaluation
    paths = {
        trial.name: [(step.train.key, step.evaluate.key, len(step.swapped), step.tokens) for step in trial.steps]
        for trial in plan.trials
    }

    def coordinate(config: dict[str, Any]) -> None:
        import ray

        path = paths[config["trial"]]
        for index, (_, evaluate, swapped, tokens) in enumerate(path):
            quality = broker.want.remote(evaluate)
            if ahead and index + 1 < len(path):
                broker.want.remote(path[index + 1][0])
            result = ray.get(quality)
            tune.report(
                {
                    "perplexity_ratio": result["perplexity_ratio"],
                    "swapped_layers": swapped,
                    "student_tokens": tokens,
                    "steps_done": index + 1,
                }
            )

    storage = tempfile.mkdtemp(prefix="layerswap-tune-")
    try:
        tuner = tune.Tuner(
            tune.with_resources(coordinate, tune.PlacementGroupFactory([{"CPU": 0, "trial_slot": 1}])),
            param_space={"trial": tune.grid_search([trial.name for trial in plan.trials])},
            tune_config=tune.TuneConfig(scheduler=_scheduler(plan), max_concurrent_trials=2 * cores),
            run_config=tune.RunConfig(
                storage_path=storage, verbose=0, failure_config=tune.FailureConfig(max_failures=1)
            ),
        )
        results = tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    for index in range(len(results)):
        _judge(plan, results[index], outcome)


def _scheduler(plan: Plan) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    stopping = plan.study.search.early_stopping
    if stopping is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="swapped_layers",
        metric="perplexity_ratio",
        mode="min",
        grace_period=stopping.grace_layers,
        reduction_factor=stopping.reduction_factor,
        max_t=plan.total_layers + 1,
    )


def _judge(plan: Plan, result: Any, outcome: Outcome) -> None:
    name = result.config["trial"]
    trial: Trial = next(trial for trial in plan.trials if trial.name == name)
    if result.error is not None:
        outcome.failures[name] = _reason(result.error)
        return
    finished = int((result.metrics or {}).get("steps_done", 0))
    outcome.stopped.pop(name, None)
    if finished < len(trial.steps):
        outcome.stopped[name] = finished


def _collect(controls: dict[str, Any], outcome: Outcome) -> None:
    import ray

    for name, reference in controls.items():
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            outcome.failures[name] = _reason(error)


def _measure(broker: Any, context: RunContext, speeds: dict[str, ThroughputSpec], cores: int, outcome: Outcome) -> None:
    """Measure speed when all training is over, one architecture at a time, with every core of the machine reserved."""
    import ray

    store = Store(Path(context.store))
    finished = [spec for trained, spec in speeds.items() if store.finished(trained)]
    for spec in {spec.key: spec for spec in finished}.values():
        if store.finished(spec.key):
            continue
        task = ray.remote(compute).options(name=f"throughput-{spec.key[:8]}", num_cpus=cores, max_retries=1)
        for again in (True, False):
            try:
                ray.get([broker.want.remote(parent) for parent in spec.parents.values()])
                ray.get(task.remote(spec.model_dump_json(), context))
            except ray.exceptions.RayError as error:
                if again and isinstance(getattr(error, "cause", None), Disturbed):
                    continue
                outcome.failures[f"throughput {spec.key[:8]}"] = _reason(error)
            break


def _reason(error: BaseException) -> str:
    """The line of an error that says why, without the traces of the machinery around it."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    told = [line for line in lines if "StageFailed" in line]
    line = (told or lines or [type(error).__name__])[-1]
    return line.split("StageFailed: ", 1)[-1]
