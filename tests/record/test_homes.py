"""Whose runs are whose, and what becomes of them when a study is edited or a person writes beside them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.record.home import Home
from orchestrator.record.provenance import Provenance
from orchestrator.record.tracking.client import still_running
from orchestrator.record.tracking.entry import path_entry
from orchestrator.record.tracking.experiment import NOTE
from orchestrator.record.tracking.identity import FILE, HOME, home_id
from orchestrator.record.tracking.runs import IDENTITY
from orchestrator.record.tracking.tracker import Tracker
from orchestrator.study.plan import Plan, throughput_specs
from tests.record.handmade import RATIOS, START, Hand, planned, put, quality

HEADS = ("heads 0", "heads 1", "heads joint")
SOURCE = Provenance(
    "layerswap run s.yaml --tracking-uri http://ann:secret@there", "ann", "node7", "a CPU", "3.11.7",
    {"torch": "2.13.0", "mlflow": "3.17.2"}, "1234abcd+changes",
)  # fmt: skip


@pytest.fixture
def shared(tmp_path: Path, empty_database: Path) -> str:
    """A database that is no home's own."""
    shutil.copy(empty_database, tmp_path / "shared.db")
    return f"sqlite:///{tmp_path}/shared.db"


def tracker(hand: Hand, plan: Plan | None = None, tracking: str | None = None, **more: Any) -> Tracker:
    plan = plan or hand.plan
    return Tracker(Home(hand.home.root, tracking), plan, throughput_specs(plan, "test"), **more)


def all_runs(told: Tracker) -> dict[str, Run]:
    """By name, all runs of the experiment, whosoever they are."""
    found = told.runs.client.search_runs([told.runs.experiment], max_results=100)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def own(told: Tracker) -> dict[str, tuple[str, str, dict[str, str], dict[str, float]]]:
    """By id, what the runs of a tracker's home are."""
    found = told.runs.client.search_runs([told.runs.experiment], f"tags.`{HOME}` = '{told.runs.home_id}'")
    return {run.info.run_id: (run.info.run_name, run.info.status, run.data.tags, run.data.metrics) for run in found}


@pytest.mark.parametrize("served", [True, False], ids=["server", "database"])
def test_two_homes_at_one_place_never_touch_each_others_runs(
    tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch, served: bool
) -> None:
    """A server has one experiment of a name, and decides where its files lie."""
    if served:
        monkeypatch.setattr(Home, "artefacts", None)
    hands = []
    for name in ("hers", "his"):
        (tmp_path / name).mkdir()
        hands.append(Hand(tmp_path / name))
    hers, his = hands
    assert hers.key("heads 0") == his.key("heads 0")
    hers.finish("heads 0", "heads 1")
    first = tracker(hers, tracking=shared, live=False)
    first.finish({"trial-02": 2}, {}, {"best_perplexity_ratio": 1.3})
    before = own(first)
    his.finish("heads 0")
    his.attempt(his.key("heads 1"))
    put(his.store.folder(his.key("heads 1")) / "failure.json", {"error": "OSError: no space left"})
    second = tracker(his, tracking=shared, live=False)
    assert (second.runs.experiment == first.runs.experiment) == served
    second.finish({}, {"trial-02": "no space left"}, {"best_perplexity_ratio": 9.0})
    assert own(first) == before
    assert len(before) == len(own(second)) == 4 and not before.keys() & own(second).keys()
    assert [status for _, status, _, _ in before.values()].count("FINISHED") == 3
    assert {name: status for name, status, _, _ in own(second).values()}["hyena-2h · 2/3 layers 1"] == "FAILED"
    for _ in range(2):  # and each finds its own again
        assert tracker(hers, tracking=shared).runs.ids == first.runs.ids
    if not served:
        place = second.runs.client.get_experiment(second.runs.experiment).artifact_location
        assert place.startswith((tmp_path / "his").as_uri())


def test_runs_of_no_home_are_the_homes_whose_database_it_is(tracked: Hand) -> None:
    """As runs are that were made before homes had names."""
    tracked.finish("heads 0")
    made = tracker(tracked)
    made.sync()
    for run in made.runs.ids.values():
        made.runs.client.delete_tag(run, HOME)
    (tracked.home.root.parent / "other").mkdir()
    other = Hand(tracked.home.root.parent / "other")
    other.finish("heads 0")
    assert tracker(other, tracking=tracked.home.database).runs.ids == {}
    assert len(list(still_running(tracked.home))) == 2  # the study and the trial
    with sqlite3.connect(tracked.home.root / "mlflow.db") as database:  # nor had experiments
        database.execute("DELETE FROM experiment_tags WHERE key = ?", (HOME,))
    guest = tracker(other, tracking=tracked.home.database)
    guest.sync()
    assert guest.runs.experiment == made.runs.experiment
    again = tracker(tracked)
    assert again.runs.ids == made.runs.ids
    assert tracker(other, tracking=tracked.home.database).runs.ids == guest.runs.ids
    for run in guest.runs.ids.values():
        guest.runs.client.delete_run(run)
    again.sync()
    assert {run.data.tags[HOME] for run in all_runs(again).values()} == {home_id(tracked.home)}


def test_what_a_slow_server_made_twice_is_there_once(tracked: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not answered in time is sent again below us, and a server that was away answers both."""
    create_run, create_model = MlflowClient.create_run, mlflow.create_external_model

    def two_runs(*words: Any, **more: Any) -> Run:
        create_run(*words, **more)
        return create_run(*words, **more)

    def two_models(**words: Any) -> Any:
        MlflowClient().create_logged_model(words["experiment_id"], words["name"], words["source_run_id"])
        return create_model(**words)

    monkeypatch.setattr(MlflowClient, "create_run", two_runs)
    monkeypatch.setattr(mlflow, "create_external_model", two_models)
    tracked.finish("heads 0")
    told = tracker(tracked)
    told.sync()
    known = dict(told.runs.ids)
    told.finish({}, {}, {})
    told.add_files([])
    assert {run.info.run_id for run in all_runs(told).values()} == {*known.values()}
    assert len(told.runs.client.search_logged_models([told.runs.experiment])) == 1


def test_runs_of_another_home_are_nobody_to_end(tracked: Hand) -> None:
    tracked.finish("heads 0")
    tracker(tracked).sync()
    (tracked.home.root / FILE).write_text("another home's")
    assert list(still_running(tracked.home)) == []


def test_a_home_has_one_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    found: list[str] = []
    with FileLock(home.root / f"{FILE}.lock"):
        second = threading.Thread(target=lambda: found.append(home_id(home)))
        second.start()
        second.join(0.2)
        assert found == []
        (home.root / FILE).write_text("made meanwhile")
    second.join()
    assert found == ["made meanwhile"] == [home_id(home)]
    assert len(home_id(Home(tmp_path / "new"))) == 32


def test_an_edit_renews_names_and_numbers_and_tells_what_is_no_longer_asked_for(tracked: Hand) -> None:
    root = tracked.home.root.parent
    tracked.finish("two 0", "two 1", "two joint", "two mixed", "heads 0")
    first = tracker(tracked)
    first.sync()
    ids = dict(first.runs.ids)
    names = ("hyena-2 · kl 1", "hyena-2 · ce 0.5", "hyena-2h", "hyena-2 · 1/3 layers 0")
    runs = all_runs(first)
    trial = {name: runs[name].info.run_id for name in names}
    # Of the losses one is left, and it comes last; the shared stages are no longer shared.
    plan = planned(root, "search.space=[{operator.order: [3]}, {recipe.joint.0.losses: [{kl: 1.0, ce: 0.5}]}]")
    second = tracker(tracked, plan)
    second.sync()
    runs = all_runs(second)
    assert {run.info.run_id for run in runs.values()} == set(ids.values())
    renewed = runs["ce 0.5"]
    assert renewed.info.run_id == trial["hyena-2 · ce 0.5"]
    assert (renewed.data.tags["layerswap.trial"], renewed.data.tags["layerswap.in_plan"]) == ("trial-01", "true")
    stage = runs["ce 0.5 · 1/3 layers 0"]
    assert stage.info.run_id == trial["hyena-2 · 1/3 layers 0"]
    assert stage.data.tags["layerswap.trials"] == "trial-01"
    assert stage.data.tags["mlflow.parentRunId"] == renewed.info.run_id
    for name in ("hyena-2 · kl 1", "hyena-2h"):
        aside = runs[f"{name} · another variant {trial[name][:6]}"]
        assert (aside.info.run_id, aside.info.status) == (trial[name], "KILLED")
        assert aside.data.tags["layerswap.in_plan"] == "false" and "layerswap.trial" not in aside.data.tags
        assert aside.data.metrics == first.runs.client.get_run(trial[name]).data.metrics
    tracker(tracked, plan).sync()
    assert all_runs(second).keys() == runs.keys()
    third = tracker(tracked)
    third.sync()  # the edit is taken back
    assert third.runs.ids == ids
    assert {name: all_runs(third)[name].info.run_id for name in names} == trial


def test_what_is_told_of_an_edited_study_counts(tracked: Hand) -> None:
    tracked.finish("heads 0", "heads 1", "heads joint")
    tracker(tracked).sync()
    plan = planned(tracked.home.root.parent, "evaluation.tokens=128")
    assert [step.train.key for step in plan.trials[2].steps] == [tracked.key(name) for name in HEADS]
    for name, step in zip(HEADS, plan.trials[2].steps, strict=True):
        tracked.write(step.evaluate, quality(RATIOS[name] + 1.0), started=START - 500.0)  # by a clock that is behind
    for more, at in ((1.0, plan), (0.0, tracked.plan)):  # an edit, and the edit taken back
        told = tracker(tracked, at)
        told.sync()
        for name, step in (("hyena-2h · 1/3 layers 0", "heads 0"), ("hyena-2h", "heads joint")):
            assert all_runs(told)[name].data.metrics["perplexity_ratio"] == RATIOS[step] + more


def test_parameters_that_an_edit_changes_are_another_runs(tracked: Hand) -> None:
    """MLflow changes no parameter of a run."""
    tracked.finish("heads 0")
    first = tracker(tracked)
    first.sync()
    run = first.runs.ids[f"trial:{tracked.key('heads joint')}:3"]
    path = first.shown.paths[2]
    entry = dataclasses.replace(path_entry(path), parameters=path.parameters | {"operator.heads": "2 | 4"})
    new = first.runs.open(entry)
    assert new != run
    again = tracker(tracked)
    assert again.runs.ids[entry.identity] == new
    assert again.runs.client.get_run(run).data.tags[IDENTITY] == f"{entry.identity}:{run}"
    assert again.runs.client.get_run(run).info.lifecycle_stage == "active"


def test_what_a_person_writes_stays(tracked: Hand) -> None:
    tracked.finish("heads 0", "heads 1")
    first = tracker(tracked)
    first.sync()
    client, ids = first.runs.client, dict(first.runs.ids)
    trial, stage = ids[f"trial:{tracked.key('heads joint')}:3"], ids[f"stage:{tracked.key('heads 1')}"]
    client.set_tag(trial, NOTE, "my own words")
    client.set_tag(ids["study"], NOTE, "")
    client.set_tag(trial, "verdict", "keep")
    client.update_run(stage, name="my favourite")
    tracked.finish("heads joint")  # while that tracker is at work
    first.sync()
    plan = planned(tracked.home.root.parent, "search.space=[{operator.heads: [2]}]", "question=Another?")
    for told in (tracker(tracked, plan), tracker(tracked)):
        told.finish({}, {}, {})
        after = client.get_run(trial).data.tags
        assert (after[NOTE], after["verdict"]) == ("my own words", "keep")
        assert client.get_run(ids["study"]).data.tags[NOTE] == ""
        assert client.get_run(stage).info.run_name == "my favourite"


def test_a_note_of_ours_is_renewed(tracked: Hand) -> None:
    tracker(tracked).sync()
    told = tracker(tracked, planned(tracked.home.root.parent, "question=Another?"))
    told.sync()
    assert all_runs(told)["handmade"].data.tags[NOTE].startswith("Another?\n\n[Quality against speed](#/experiments/")


def test_runs_say_who_made_them_from_what(tracked: Hand) -> None:
    tracked.finish("heads 0")
    told = tracker(tracked, provenance=SOURCE)
    told.sync()
    told.add_files([])
    for name in ("handmade", "hyena-2h", "hyena-2h · 1/3 layers 0"):
        run = all_runs(told)[name]
        assert {
            "mlflow.user": "ann", "mlflow.source.name": "layerswap", "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": "1234abcd", "mlflow.source.git.dirty": "true", "layerswap.host": "node7",
            "layerswap.command": "layerswap run s.yaml --tracking-uri http://ann:***@there",
            "layerswap.hardware": "a CPU", "layerswap.python": "3.11.7",
            "layerswap.versions": "mlflow 3.17.2, torch 2.13.0",
        }.items() <= run.data.tags.items()  # fmt: skip
        (data,) = run.inputs.dataset_inputs
        fingerprint = tracked.plan.tokens.train.fingerprint
        assert (data.dataset.name, data.dataset.digest) == ("text.txt", fingerprint[:36])
        assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "training, validation")]
    experiment = told.runs.client.get_experiment(told.runs.experiment)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    text = told.runs.client.download_artifacts(told.runs.ids["study"], f"{told.variant.id}/resolved.yaml")
    assert "question: Which of two operators costs less?\n" in Path(text).read_text()
    # Whoever reports of it later says who ran it.
    variant = told.variant
    put(variant.folder / "runs" / "0001.json", {**dataclasses.asdict(SOURCE), "status": "finished", "started": START})
    assert tracker(tracked, live=False).source == told.source
    # Another person goes on with it: the study says so, what the first one made does not.
    tracker(tracked, provenance=dataclasses.replace(SOURCE, user="bob")).sync()
    users = {name: run.data.tags["mlflow.user"] for name, run in all_runs(told).items()}
    assert users == {"handmade": "bob", "hyena-2h": "ann", "hyena-2h · 1/3 layers 0": "ann"}


def test_a_study_of_before_its_records_began_with_its_first_run(tracked: Hand) -> None:
    tracked.finish("heads 0", started=START + 30.0)
    told = tracker(tracked, live=False)
    told.finish({}, {}, {})
    info = all_runs(told)["handmade"].info
    assert (info.start_time, info.end_time) == (int(1000 * START) + 30_000, int(1000 * START) + 42_000)
    put(told.variant.folder / "asked.json", {})
    put(told.variant.folder / "runs" / "0001.json", {"started": START + 5.0, "status": "finished"})
    assert tracker(tracked)._study_began() == int(1000 * START) + 5_000


def test_a_failure_has_its_traceback_until_it_is_made_good(tracked: Hand) -> None:
    tracked.finish("heads 0")
    tracked.attempt(tracked.key("heads 1"), number=3)
    folder = tracked.store.folder(tracked.key("heads 1"))
    put(folder / "failure.json", {"error": "ValueError: no", "traceback": "Traceback ...\nValueError: no\n"})
    first = tracker(tracked)
    for _ in range(2):
        first.finish({}, {}, {})
        first.add_files([])
    names = ("hyena-2h", "hyena-2h · 2/3 layers 1")
    for name in names:
        assert all_runs(first)[name].data.tags["layerswap.failure"] == "ValueError: no"
    run = all_runs(first)[names[1]].info.run_id
    assert [file.path for file in first.runs.client.list_artifacts(run)] == ["failure-3.txt"]
    assert Path(first.runs.client.download_artifacts(run, "failure-3.txt")).read_text().startswith("Traceback ...\n")
    (folder / "failure.json").unlink()
    tracked.finish("heads 1", "heads joint")
    tracked.measure("heads 0", "heads 1")
    again = tracker(tracked)
    again.finish({}, {}, {})
    for name in names:
        run_now = all_runs(again)[name]
        assert run_now.info.status == "FINISHED" and "layerswap.failure" not in run_now.data.tags


def test_a_model_of_another_home_of_the_same_name_stays(
    tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Home, "artefacts", None)
    monkeypatch.chdir(tmp_path)  # files of such an experiment go below the working directory
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    for name in ("hers", "his"):
        (tmp_path / name).mkdir()
        hand = Hand(tmp_path / name)
        hand.finish("heads 0")
        told = tracker(hand, tracking=shared)
        told.sync()
        stage = told.runs.ids[f"stage:{hand.key('heads 0')}"]
        told.runs.add_model(stage, "student", "key", "there")
    models = told.runs.client.search_logged_models([told.runs.experiment])
    assert [model.name for model in models] == ["student", "student"]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://elsewhere"  # where the next command reads it
