"""The other side of the tree benchmark: the same trials by plain Ray Tune, each trial alone.

`python -m tests.benchmarks.plain STUDY GIVEN OUT`: every trial computes its whole path inside its own trainable, with
the very stage functions of the tree; only the text and the teacher are given to it. OUT/NAME is the store of a trial.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.cli import PROCESS
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan
from orchestrator.study.sources import resolve

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    **PROCESS,
}


def load(study: Path) -> tuple[Plan, Any]:
    """The plan of a study file, and where its text lies."""
    document = read_document(study, ())
    valid = validate(document)
    resolved = resolve(valid, study.parent)
    return make_plan(document, valid, resolved), resolved.locations


def give(plan: Plan, given: Path, store: Path) -> None:
    """Put the text and the teacher of the store `given` into `store`, by link."""
    for key in (plan.tokens.key, plan.teacher.train.key):
        (store / key[:2]).mkdir(parents=True, exist_ok=True)
        place = store / key[:2] / key
        if not place.exists():
            place.symlink_to(given / key[:2] / key)


def main(study: Path, given: Path, out: Path) -> None:
    """Run all trials of a study; what it prints is for whoever looks into a failure."""
    os.environ.update(ENVIRONMENT)
    import ray
    from ray import tune

    plan, locations = load(study)
    paths = {
        trial.name: [(step.train.model_dump_json(), step.evaluate.model_dump_json()) for step in trial.steps]
        for trial in plan.trials
    }
    for name in paths:
        give(plan, given, out / name)

    def trainable(config: dict[str, Any]) -> None:
        from orchestrator.distill.context import RunContext
        from orchestrator.run.compute import compute

        context = RunContext(str(out / config["trial"]), locations=locations)
        for train, evaluate in paths[config["trial"]]:
            compute(train, context)
            tune.report({"perplexity_ratio": compute(evaluate, context)["perplexity_ratio"]})

    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _temp_dir=tempfile.mkdtemp(prefix="plain-"),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"trial": tune.grid_search(list(paths))},
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(prefix="plain-"), verbose=0),
    )
    results = tuner.fit()
    ray.shutdown()
    for result in results:
        if result.error is not None:
            raise result.error


if __name__ == "__main__":
    main(*(Path(word).resolve() for word in sys.argv[1:]))
