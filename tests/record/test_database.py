"""MLflow's database of a home: made whole, by one process."""

from __future__ import annotations

import multiprocessing
import shlex
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from orchestrator.record.doctor import examine
from orchestrator.record.home import Home, sqlite_uri
from orchestrator.record.tracking import recorder as recorder_module
from orchestrator.record.tracking.client import AnotherVersionError, make_database
from orchestrator.record.tracking.entry import Entry
from orchestrator.record.tracking.runs import Runs
from tests.record.handmade import Hand


def test_two_makers_and_a_torn_beginning_give_one_whole_database(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "mlflow.db.part").write_bytes(b"half a database")
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make_database, args=(home,)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(100)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert [e.name for e in MlflowClient(tracking_uri=home.database).search_experiments()] == ["Default"]
    assert not (tmp_path / "mlflow.db.part").exists()


@pytest.mark.parametrize(("making", "hopeless"), [(250.0, False), (0.1, True)])
def test_a_run_that_ends_waits_for_a_database_that_takes_long_to_make(
    making: float, hopeless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would leave half made the next run begins anew, so that it might never be there."""
    hand = Hand(tmp_path)

    class Slow:
        heard = 0.0

        def __init__(self, *_: Any) -> None:
            self.closed: set[str] = set()
            time.sleep(2.0)
            (hand.home.root / "mlflow.db").touch()

        def replan(self, *_: Any) -> None: ...

        def sync(self) -> None: ...

    monkeypatch.setattr(recorder_module, "Tracker", Slow)
    monkeypatch.setattr(recorder_module, "MAKING", making)
    recorder = recorder_module.Recorder(hand.home, hand.plan, hand.speeds)
    recorder.patience = 0.5
    recorder.catch_up()
    assert recorder.hopeless == hopeless
    recorder.asked.put(None)
    recorder.thread.join()


@pytest.fixture
def home(tmp_path: Path, empty_database: Path) -> Home:
    """A home with an empty database."""
    root = tmp_path / "old"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    return Home(root)


def artefact(runs: Runs, name: str) -> str:
    """Give the study's run a file of this name, as a process of its own would; returns the run."""
    _artifact_repos_cache.clear()
    run = runs.open(Entry("study", "study"))
    path = runs.home.root / name
    path.write_text(name)
    runs.add_file(run, path)
    return run


@pytest.mark.parametrize("name", ["h?x", "h%41", "h#x", "100%", "a b", "é", "plain"])
def test_the_database_and_the_files_of_a_home_of_any_name_lie_in_it(
    tmp_path: Path, empty_database: Path, name: str
) -> None:
    home = Home(tmp_path / name)
    home.root.mkdir()
    shutil.copy(empty_database, home.root / "mlflow.db")
    run = artefact(Runs(home, "s"), "report.md")
    with sqlite3.connect(home.root / "mlflow.db") as database:
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run,)]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (home.root / "mlartifacts" / "s" / run / "artifacts" / "report.md").read_text() == "report.md"


def test_a_plain_path_is_its_own_uri(tmp_path: Path) -> None:
    assert sqlite_uri(tmp_path / "mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("copied", [False, True])
def test_files_of_a_home_that_was_moved_go_below_its_new_place(home: Home, tmp_path: Path, copied: bool) -> None:
    one, other = Runs(home, "one"), Runs(home, "other")
    run, run_of_other = artefact(one, "first"), artefact(other, "first")
    one.tags[run]["mlflow.runName"] = "stage"
    one.add_model(run, "student", "key", str(home.root / "store" / "ab" / "key"))
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file() and path.suffix != ".db"}
    moved = Home(tmp_path / "a new % place")
    shutil.copytree(home.root, moved.root)
    if not copied:
        shutil.rmtree(home.root)
    assert artefact(Runs(moved, "one"), "second") == run
    assert artefact(Runs(moved, "other"), "second") == run_of_other
    for study, its in (("one", run), ("other", run_of_other)):
        folder = moved.root / "mlartifacts" / study / its / "artifacts"
        assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    client = MlflowClient(tracking_uri=moved.database)
    model = client.search_logged_models([Runs(moved, "one").experiment])[0]
    assert model.tags["artefacts"] == str(moved.root / "store" / "ab" / "key")
    assert str(model.artifact_location).startswith((moved.root / "mlartifacts").as_uri())
    if copied:  # and the one that it was copied from is as it was
        after = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file() and path.suffix != ".db"}
        assert after == before
    else:
        assert not home.root.exists()


def with_schema(home: Home, version: str) -> None:
    with sqlite3.connect(home.root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))


def test_a_database_of_an_older_mlflow_is_told_with_the_whole_command(home: Home) -> None:
    with_schema(home, "bd07f7e963c5")
    with pytest.raises(AnotherVersionError) as caught:
        Runs(home, "one")
    command = shlex.join([sys.executable, "-m", "mlflow", "db", "upgrade", home.database])
    assert str(caught.value).startswith("the database is of an older MLflow than ")
    assert str(caught.value).endswith(f": make a copy of it, then run {command}")


def test_a_database_of_an_mlflow_that_is_not_known_is_told_so(home: Home) -> None:
    with_schema(home, "ffffffffffff")
    with pytest.raises(AnotherVersionError, match=r"of another MLflow than .* its schema ffffffffffff: install the"):
        Runs(home, "one")


def test_doctor_says_what_is_wrong_with_a_database(home: Home) -> None:
    (home.root / "store").mkdir()
    with_schema(home, "bd07f7e963c5")
    found = [one for one in examine(home, None) if "MLflow" in one.what]
    assert [one.what.split(" than ")[0] for one in found] == ["MLflow: the database is of an older MLflow"]
    assert found[0].remedy.endswith(f"mlflow db upgrade {home.database}")
    (home.root / "mlflow.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)
    found = [one for one in examine(home, None) if "MLflow" in one.what]
    assert [one.remedy for one in found] == ["move it away: `layerswap report STUDY` makes it again from the store"]
