"""What MLflow holds of a store with known numbers, read back by MLflow's own client from a database."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from mlflow.entities import Run

from orchestrator.record.remembered import identity
from orchestrator.record.tracking.entry import SUMMARY
from orchestrator.record.tracking.experiment import describe
from orchestrator.record.tracking.identity import home_id
from orchestrator.record.tracking.runs import Runs
from orchestrator.record.tracking.tracker import Tracker
from orchestrator.study.spec import short
from tests.record.handmade import RATIOS, SPEEDS, START, Hand, put, quality

FIRST = int(START * 1000)
NAMES = {  # of the runs of steps, and of the runs that they stand below
    "teacher": ("teacher", "study"),
    "scratch": ("scratch hyena-2", "study"),
    "skip 0": ("skip 0", "study"),
    "skip 1": ("skip 1", "study"),
    "skip all": ("skip all", "study"),
    "two 0": ("hyena-2 · 1/3 layers 0", "study"),  # of two trials
    "two 1": ("hyena-2 · 2/3 layers 1", "study"),
    "two joint": ("hyena-2 · kl 1 · 3/3 joint layers 0,1", "trial-00"),
    "two mixed": ("hyena-2 · ce 0.5 · 3/3 joint layers 0,1", "trial-01"),
    "heads 0": ("hyena-2h · 1/3 layers 0", "trial-02"),
    "heads 1": ("hyena-2h · 2/3 layers 1", "trial-02"),
    "heads joint": ("hyena-2h · 3/3 joint layers 0,1", "trial-02"),
}
TRIALS = {
    "trial-00": ["two 0", "two 1", "two joint"],
    "trial-01": ["two 0", "two 1", "two mixed"],
    "trial-02": ["heads 0", "heads 1", "heads joint"],
}
LIKE = {"two joint": "two 1", "two mixed": "two 1", "heads joint": "heads 1", "scratch": "two 1"}


class Told:
    """The runs of a study: of steps by the names of `handmade`, of trials by theirs, and the study's own."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.runs = Runs(hand.home, "handmade", live=False)
        found = self.runs.client.search_runs([self.runs.experiment], max_results=100)
        names = {hand.key(name): name for name in NAMES}
        self.all: dict[str, Run] = {}
        for run in found:
            tags = run.data.tags
            name = names.get(tags.get("layerswap.stage"), tags.get("layerswap.trial", "study"))
            assert name not in self.all
            self.all[name] = run

    def __getitem__(self, name: str) -> Run:
        return self.all[name]

    def history(self, name: str, metric: str) -> list[tuple[float, int, int]]:
        """Value, step and milliseconds after the first stage's begin of every point."""
        points = self.runs.client.get_metric_history(self[name].info.run_id, metric)
        return [(point.value, point.step, point.timestamp - FIRST) for point in points]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Told:
    """What one run of a complete study left."""
    hand = Hand(tmp_path_factory.mktemp("told"))
    shutil.copy(empty_database, hand.home.root / "mlflow.db")
    hand.all_done()
    tracker = Tracker(hand.home, hand.plan, hand.speeds)
    tracker.sync()
    tracker.finish({}, {}, {"best_perplexity_ratio": 1.1})
    report = hand.home.root / "report.md"
    report.write_text("# handmade")
    tracker.add_files([report])
    return Told(hand)


def test_every_step_and_trial_has_a_run_below_the_right_one(told: Told) -> None:
    assert told.all.keys() == {*NAMES, *TRIALS, "study"}
    assert "mlflow.parentRunId" not in told["study"].data.tags
    ids = {name: run.info.run_id for name, run in told.all.items()}
    for name, (shown, parent) in NAMES.items():
        assert told[name].info.run_name == shown
        assert told[name].data.tags["mlflow.parentRunId"] == ids[parent]
    for name, shown in (("trial-00", "hyena-2 · kl 1"), ("trial-01", "hyena-2 · ce 0.5"), ("trial-02", "hyena-2h")):
        assert told[name].info.run_name == shown
        assert told[name].data.tags["mlflow.parentRunId"] == ids["study"]
    assert told["study"].info.run_name == "handmade"
    assert told.runs.client.get_experiment(told.runs.experiment).name == "handmade"


def test_an_experiment_says_what_its_study_asks_until_a_person_says_something_else(told: Told) -> None:
    runs, kept = told.runs, "mlflow.note.content"

    def description() -> str | None:
        found: str | None = runs.client.get_experiment(runs.experiment).tags.get(kept)
        return found

    assert description() == "Which of two operators costs less?"
    describe(runs.client, runs.experiment, "Which? " * 2_000)  # longer than MLflow takes
    assert description() == ("Which? " * 2_000)[:7_500]
    describe(runs.client, runs.experiment, "Which costs least?")
    assert description() == "Which costs least?"
    for mine in ("mine", ""):
        runs.client.set_experiment_tag(runs.experiment, kept, mine)
        describe(runs.client, runs.experiment, "Which costs more?")
        assert description() == mine


def test_a_run_lasts_as_long_as_its_work(told: Told) -> None:
    """Stage n begins n minutes after the first, trains for ten seconds and is evaluated in two."""
    assert {run.info.status for run in told.all.values()} == {"FINISHED"}
    for index, name in enumerate(told.hand.steps):
        info = told[name].info
        assert (info.start_time - FIRST, info.end_time - FIRST) == (60_000 * index, 60_000 * index + 12_000)
    spans = {name: (told[name].info.start_time - FIRST, told[name].info.end_time - FIRST) for name in TRIALS}
    assert spans == {"trial-00": (300_000, 432_000), "trial-01": (300_000, 492_000), "trial-02": (540_000, 672_000)}
    study = told["study"].info
    assert FIRST + 672_000 < study.start_time <= study.end_time <= time.time() * 1000


@pytest.mark.parametrize(("name", "tokens", "began"), [("teacher", 1_600, 0), ("two mixed", 320, 480_000)])
def test_the_curve_of_a_stage_is_its_journal_and_then_its_results(
    told: Told, name: str, tokens: int, began: int
) -> None:
    steps = (tokens // 32, tokens // 16)
    times = (began + 1_500, began + 3_250)
    for metric, values in {
        "loss/kl": (0.5, 0.25),
        "tokens_per_s": (40, 40),
        "stage_tokens": (tokens // 2, tokens),
    }.items():
        assert told.history(name, metric) == list(zip(values, steps, times, strict=True))
    prefill, decode = SPEEDS[LIKE.get(name, name)]
    speeds = {
        "prefill_ratio/length_16": prefill / 2, "prefill_ratio/length_32": prefill, "train_ratio": 0.8,
        "decode_ratio/length_16": decode / 2, "decode_ratio/length_32": decode,
    }  # fmt: skip
    for metric, value in quality(RATIOS[name]).items():
        assert told.history(name, metric) == [(value, steps[1], began + 12_000)]
    for metric, value in speeds.items():
        assert told.history(name, metric) == [(value, steps[1], 905_000)]
    known = {"loss/kl", "tokens_per_s", "stage_tokens", *quality(1.0), *speeds}
    assert told[name].data.metrics.keys() == known


def test_a_stage_that_trains_nothing_has_its_results_at_step_0(told: Told) -> None:
    assert told.history("skip all", "perplexity_ratio") == [(8.0, 0, 252_000)]
    assert told.history("skip all", "decode_ratio/length_32") == [(2.5, 0, 905_000)]
    assert "stage_tokens" not in told["skip all"].data.metrics


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_is_its_quality_over_the_tokens_of_its_path(told: Told, name: str) -> None:
    path = TRIALS[name]
    order = list(told.hand.steps)
    tokens = (160, 320, 640)
    times = [60_000 * order.index(step) + 12_000 for step in path]
    for metric in SUMMARY:
        values = [quality(RATIOS[step])[metric] for step in path]
        assert told.history(name, metric) == list(zip(values, tokens, times, strict=True))
    assert told.history(name, "swapped_layers") == list(zip((1, 2, 2), tokens, times, strict=True))
    speeds = {
        f"{kind}_ratio/length_{length}": [SPEEDS[LIKE.get(step, step)][at] / (32 // length) for step in path]
        for at, kind in enumerate(("prefill", "decode")) for length in (16, 32)
    }  # fmt: skip
    for metric, values in {**speeds, "train_ratio": [0.8, 0.8, 0.8]}.items():
        assert told.history(name, metric) == [(v, at, 905_000) for v, at in zip(values, tokens, strict=True)]
        assert told[name].data.metrics[metric] == values[-1]  # what tables and charts show
    assert told[name].data.metrics["perplexity_ratio"] == RATIOS[path[-1]]
    assert told[name].data.metrics.keys() == {*SUMMARY, "swapped_layers", "train_ratio", *speeds}
    assert {*SUMMARY} == {*quality(1.0)} - {"parameters"}
    links = [
        f"- layers {layers}: ratio {RATIOS[step]:.3f} ([stage {short(told.hand.key(step))}]"
        f"(#/experiments/{told.runs.experiment}/runs/{told[step].info.run_id}))"
        for step, layers in zip(path, ([0], [0, 1], [0, 1]), strict=True)
    ]
    assert told[name].data.tags["mlflow.note.content"] == "\n".join(links)


def tags(told: Told, name: str) -> dict[str, str]:
    """The tags of a run, without those that all have or that other tests look at; of results, how many were sent."""
    apart = (
        "layerswap.model",
        "layerswap.study",
        "layerswap.home",
        "layerswap.in_plan",
        "layerswap.name",
        "layerswap.note",
    )
    found = told[name].data.tags
    assert (found["layerswap.study"], found["layerswap.home"]) == ("handmade", home_id(told.hand.home))
    assert (found["layerswap.in_plan"], found["layerswap.name"]) == ("true", found["mlflow.runName"])
    sent = {"layerswap.told": str(len(found["layerswap.told"].split(",")))} if "layerswap.told" in found else {}
    rest = {key: value for key, value in found.items() if key not in apart and not key.startswith("mlflow.")}
    return {**rest, **sent}


def test_tags_say_what_a_run_is(told: Told) -> None:
    key = told.hand.key
    assert tags(told, "study") == {"layerswap.id": "study", "layerswap.role": "study"}
    experiment, view = told.runs.experiment, f"front-{home_id(told.hand.home)[:8]}"
    assert told["study"].data.tags["mlflow.note.content"] == (
        "Which of two operators costs less?\n\n[Quality against speed]"
        f"(#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={view})"
    )
    for name, role, layers in (("teacher", "teacher", ""), ("scratch", "control", "0,1"), ("skip 1", "control", "1")):
        assert tags(told, name) == {
            "layerswap.id": f"stage:{key(name)}", "layerswap.role": role, "layerswap.stage": key(name),
            "layerswap.layers": layers, "layerswap.told": "2",
        }  # fmt: skip
    for name, trials, layers, operator in (
        ("two 1", "trial-00,trial-01", "0,1", "hyena-2"), ("heads joint", "trial-02", "0,1", "hyena-2h"),
    ):  # fmt: skip
        assert tags(told, name) == {
            "layerswap.id": f"stage:{key(name)}", "layerswap.role": "stage", "layerswap.stage": key(name),
            "layerswap.layers": layers, "layerswap.told": "2", "layerswap.trials": trials,
            "layerswap.operator": operator, "layerswap.outcome": "kept",
        }  # fmt: skip
    assert tags(told, "trial-02") == {
        "layerswap.id": f"trial:{key('heads joint')}:3", "layerswap.role": "trial", "layerswap.trial": "trial-02",
        "layerswap.operator": "hyena-2h", "layerswap.told": "6", "layerswap.stopped_early": "false",
    }  # fmt: skip


def test_parameters_are_the_values_of_the_stage(told: Told) -> None:
    params, key = told["two mixed"].data.params, told.hand.key
    options = ("operator.", "optimizer.", "numerics.")
    assert {name: value for name, value in params.items() if not name.startswith(options)} == {
        "version": str(told.hand.steps["two mixed"].train.version), "kind": "distil",
        "tokens": told.hand.plan.tokens.key, "teacher": key("teacher"), "parent": key("two 1"), "layers": "[0, 1]",
        "new_layers": "[]", "phases.0.losses.mixer_mse": "0.0", "phases.0.losses.hidden_mse": "0.0",
        "phases.0.losses.kl": "1.0", "phases.0.losses.ce": "0.5", "phases.0.steps": "20", "batch_size": "2",
        "sequence_length": "8", "first_sequence": "40", "freeze": "[]", "checkpoint_activations": "False",
            "seed": "0", "stage_key": key("two mixed"),
    }  # fmt: skip
    assert {
        "operator.kind": "hyena", "operator.order": "2", "operator.heads": "None", "operator.filter.kind": "implicit",
        "numerics.dtype": "float32", "numerics.threads": "1", "optimizer.lr": "0.003",
    }.items() <= params.items()  # fmt: skip
    assert params["optimizer.betas"] == "[0.9, 0.98]"
    for trial, (operator, ce, heads) in {
        "trial-00": ("hyena-2", "0.0", "None"), "trial-01": ("hyena-2", "0.5", "None"),
        "trial-02": ("hyena-2h", "0.0", "2"),
    }.items():  # fmt: skip
        assert told[trial].data.params == {
            "operator": operator, "recipe.joint.0.losses.kl": "1.0", "recipe.joint.0.losses.ce": ce,
            "operator.kind": "hyena", "operator.heads": heads,
        }  # fmt: skip
    assert told["study"].data.params == {}


def test_a_view_shows_the_front_of_the_trials(told: Told) -> None:
    home = home_id(told.hand.home)
    tags = told.runs.client.get_experiment(told.runs.experiment).tags
    view = json.loads(tags[f"mlflow.sharedViewState.front-{home[:8]}"])
    assert view["searchFilter"] == (
        f"tags.`layerswap.role` = 'trial' and tags.`layerswap.in_plan` = 'true' and tags.`layerswap.home` = '{home}'"
    )
    found = told.runs.client.search_runs([told.runs.experiment], view["searchFilter"])
    assert {run.data.tags["layerswap.trial"] for run in found} == TRIALS.keys()
    prefill, decode, lines = view["compareRunCharts"]
    for chart, speed in ((prefill, "prefill_ratio/length_32"), (decode, "decode_ratio/length_32")):
        assert (chart["type"], chart["xaxis"]["key"], chart["yaxis"]["key"]) == ("SCATTER", speed, "perplexity_ratio")
        assert all(chart[axis]["key"] in run.data.metrics for run in found for axis in ("xaxis", "yaxis"))
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`perplexity_ratio`", True)
    assert lines["selectedParams"] == ["operator", "recipe.joint.0.losses.ce"]  # heads are None or a number
    assert "params.`operator.heads`" in view["selectedColumns"]
    assert all({*lines["selectedParams"]} <= run.data.params.keys() for run in found)


def test_the_study_has_its_score_its_files_and_a_model_for_every_student(told: Told) -> None:
    assert told["study"].data.metrics == {"best_perplexity_ratio": 1.1}
    client = told.runs.client
    folder = identity(told.hand.plan)  # of the variant
    files = client.list_artifacts(told["study"].info.run_id, folder)
    assert [file.path for file in files] == [f"{folder}/report.md", f"{folder}/resolved.yaml"]
    models = {model.name: model for model in client.search_logged_models([told.runs.experiment])}
    students = {name for name in NAMES if name.startswith(("two", "heads"))}
    assert models.keys() == {f"student-{short(told.hand.key(name))}" for name in students}
    for name in students:
        model = models[f"student-{short(told.hand.key(name))}"]
        assert model.source_run_id == told[name].info.run_id
        assert model.model_type == "layerswap-student"
        wanted = {
            "stage_key": told.hand.key(name),
            "artefacts": str(told.hand.store.artefacts(told.hand.key(name))),
            "stage": NAMES[name][0],
        }
        assert wanted.items() <= model.tags.items()


def test_a_resumed_stage_began_when_its_first_attempt_did(tracked: Hand) -> None:
    tracked.finish("heads 0", started=START)  # its journal begins a second and a half later
    tracked.attempt(tracked.key("heads 0"), started=START + 7.0, number=2)
    tracker = Tracker(tracked.home, tracked.plan, tracked.speeds)
    tracker.sync()
    told = Told(tracked)
    assert told["heads 0"].info.start_time == FIRST + 1_500
    assert told["trial-02"].info.start_time == FIRST + 1_500
    assert told["heads 0"].info.end_time == FIRST + 12_000
    assert told["trial-02"].info.status == told["study"].info.status == "RUNNING"
    assert told.all.keys() == {"study", "trial-02", "heads 0"}


def test_what_a_mirror_brought_has_runs_too(tracked: Hand) -> None:
    """It brings the journal and no attempt; a stage that trains nothing has no journal either."""
    for name in ("heads 0", "skip 0"):
        tracked.finish(name)
        (tracked.store.folder(tracked.key(name)) / "attempt.json").unlink()
    tracker = Tracker(tracked.home, tracked.plan, tracked.speeds)
    tracker.sync()
    told = Told(tracked)
    assert told.all.keys() == {"study", "trial-02", "heads 0", "skip 0"}
    assert (told["heads 0"].info.start_time, told["heads 0"].info.end_time) == (FIRST + 1_500, FIRST + 12_000)
    assert (told["skip 0"].info.start_time, told["skip 0"].info.end_time) == (FIRST, FIRST + 12_000)
    assert told.history("heads 0", "perplexity_ratio") == [(1.2, 10, 12_000)]


def test_status_of_trials_that_were_stopped_failed_or_are_not_over(tracked: Hand) -> None:
    tracked.finish("teacher", "scratch", "skip 0", "skip 1", "skip all", "two 0", "heads 0")
    tracked.attempt(tracked.key("two 1"))
    tracked.attempt(tracked.key("two joint"))
    put(tracked.store.folder(tracked.key("two joint")) / "failure.json", {"error": "NonFiniteLoss: step 4"})
    tracker = Tracker(tracked.home, tracked.plan, tracked.speeds)
    tracker.finish({"trial-02": 1}, {}, {})
    told = Told(tracked)
    status: dict[str, str] = {name: run.info.status for name, run in told.all.items()}
    assert {name: status[name] for name in (*TRIALS, "two 0", "two 1", "two joint", "heads 0", "study")} == {
        "trial-00": "FAILED", "trial-01": "KILLED", "trial-02": "FINISHED", "two 0": "FINISHED", "two 1": "KILLED",
        "two joint": "FAILED", "heads 0": "FINISHED", "study": "FAILED",
    }  # fmt: skip
    assert told["trial-00"].data.tags["layerswap.failure"] == "NonFiniteLoss: step 4"
    assert "layerswap.failure" not in told["trial-01"].data.tags
    early = {name: told[name].data.tags["layerswap.stopped_early"] for name in TRIALS}
    assert early == {"trial-00": "false", "trial-01": "false", "trial-02": "true"}
    assert told["trial-02"].info.end_time == FIRST + 12_000  # when its last evaluation ended
    for name in ("trial-00", "two 1", "two joint"):
        assert told[name].info.end_time > FIRST + 12_000


def test_a_failure_that_is_told_late_was_when_it_was(tracked: Hand) -> None:
    """A run that MLflow did not answer, and a report days later."""
    tracked.finish("teacher", "scratch", "skip 0", "skip 1", "skip all", "two 0", "two 1", "heads 0", "heads 1")
    for number, name in enumerate(("two joint", "heads joint")):
        failure = {"error": "NonFiniteLoss: step 4", "time": START + 1_000 * (number + 1)}
        tracked.attempt(tracked.key(name))
        put(tracked.store.folder(tracked.key(name)) / "failure.json", failure)
    Tracker(tracked.home, tracked.plan, tracked.speeds, live=False).finish({}, {}, {})
    told = Told(tracked)
    ended = {name: (told[name].info.status, told[name].info.end_time - FIRST) for name in (*TRIALS, "study")}
    assert ended == {
        "trial-00": ("FAILED", 1_000_000), "trial-01": ("KILLED", ended["trial-01"][1]),
        "trial-02": ("FAILED", 2_000_000), "study": ("FAILED", 2_000_000),
    }  # fmt: skip
    assert [told[name].info.end_time - FIRST for name in ("two joint", "heads joint")] == [1_000_000, 2_000_000]
    assert ended["trial-01"][1] > 2_000_000


def test_a_study_is_finished_once_all_that_was_not_stopped_is(tracked: Hand) -> None:
    tracked.finish("teacher", "scratch", "skip 0", "skip 1", "skip all", "heads 0", "two 0", "two 1", "two joint")
    stopped = {"trial-02": 1, "trial-01": 2}
    cases: list[tuple[dict[str, str], bool, str]] = [
        ({}, False, "FINISHED"), ({"text": "no text"}, False, "FAILED"), ({}, True, "KILLED")
    ]  # fmt: skip
    for failures, lacking, status in cases:
        if lacking:
            (tracked.store.folder(tracked.steps["skip all"].evaluate.key) / "DONE.json").unlink()
        tracker = Tracker(tracked.home, tracked.plan, tracked.speeds)
        tracker.finish(stopped, failures, {})
        assert Told(tracked)["study"].info.status == status
