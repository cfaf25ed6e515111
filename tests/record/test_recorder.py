"""MLflow may vanish: nobody waits, nothing is lost or doubled, and every run ends with its true status."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from werkzeug.serving import BaseWSGIServer, make_server

from orchestrator.distill.training.journal import Journal
from orchestrator.files import write_json
from orchestrator.record.home import Home
from orchestrator.record.tracking import recorder as recorder_module
from orchestrator.record.tracking import tracker as tracking_module
from orchestrator.record.tracking.recorder import Recorder
from orchestrator.record.tracking.runs import TOLD
from orchestrator.record.tracking.tracker import Tracker
from orchestrator.run.store import Store
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, make_plan, throughput_specs
from orchestrator.study.sources import resolve
from orchestrator.study.stages import Step
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
ONE_TRIAL = (
    "controls={skip: false, scratch: none}", "search.space=[{operator: [{kind: hyena, order: 2}]}]",
    "evaluation.probes=null",
)  # fmt: skip
LINES = 130  # of eight points each: more than one batch holds
AGAIN = "layerswap report smoke.yaml"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A teacher and one trial of three stages."""
    document = read_document(ROOT / "studies" / "smoke.yaml", ONE_TRIAL)
    study = validate(document)
    return make_plan(document, study, resolve(study, ROOT / "studies"))


class Scene:
    """A home whose stages are made by hand, and what MLflow holds of them."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.plan, self.home = plan, Home(root)
        self.store = Store(self.home.store)
        self.database = root / "mlflow.db"
        self.speeds = throughput_specs(plan, "test")
        self.students = [step for trial in plan.trials for step in trial.steps]

    def recorder(self, tracking: str | None = None, live: bool = True, patience: float = 250.0) -> Recorder:
        recorder = Recorder(Home(self.home.root, tracking), self.plan, self.speeds, live)
        recorder.patience = patience  # of its own it has a few seconds, which a busy machine may need for an answer
        return recorder

    def begin(self, step: Step, lines: int) -> None:
        """Let a stage have written so many lines of its journal."""
        folder = self.store.folder(step.train.key)
        write_json(folder / "attempt.json", {"pid": 1, "host": "here", "started": 1.0})
        journal = Journal(folder)
        for at in range(10, 10 * lines + 1, 10):
            journal.write(at, 100 * at, {f"loss/{name}": at / 7 for name in "abcdefg"})
        journal.close()

    def end(self, step: Step, finished: float = 1000.0) -> None:
        """Let a stage, its evaluation and its measurement of speed be finished."""
        result = {"perplexity": 8.0, "perplexity_ratio": 1.5, "prefill_ratio": {"64": 2.0}}
        for key in (step.train.key, step.evaluate.key, self.speeds[step.train.key].key):
            done = {"key": key, "kind": "", "result": result, "seconds": 1.0, "finished": finished, "files": {}}
            write_json(self.store.folder(key) / "DONE.json", done)

    def all_done(self) -> None:
        for step in self.plan.steps:
            self.begin(step, LINES)
            self.end(step)

    def query(self, text: str) -> list[Any]:
        with sqlite3.connect(self.database) as connection:
            return connection.execute(text).fetchall()

    def points(self) -> list[Any]:
        return sorted(self.query("SELECT run_uuid, key, timestamp, step, value FROM metrics"))

    def statuses(self) -> dict[str, str]:
        """Role and name of every run that is not deleted -> its status."""
        return dict(
            self.query(
                "SELECT t.value || ' ' || r.name, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
                "WHERE t.key = 'layerswap.role' AND r.lifecycle_stage = 'active'"
            )
        )

    def check_complete(self) -> None:
        """Every stage once, with every point once."""
        rows = self.query(
            "SELECT t.value, m.key, m.step, count(*) FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid "
            "JOIN runs r ON r.run_uuid = m.run_uuid "
            "WHERE t.key = 'layerswap.stage' AND r.lifecycle_stage = 'active' GROUP BY 1, 2, 3"
        )
        journal = {(f"loss/{name}", at) for name in "abcdefg" for at in range(10, 10 * LINES + 1, 10)}
        journal |= {("stage_tokens", at) for at in range(10, 10 * LINES + 1, 10)}
        for step in self.plan.steps:
            got = {(key, at): count for stage, key, at, count in rows if stage == step.train.key}
            assert journal <= got.keys()
            assert got.keys() - journal == {
                (name, 10 * LINES) for name in ("perplexity", "perplexity_ratio", "prefill_ratio/length_64")
            }
            assert [got[point] for point in journal] == [1] * len(journal)


@pytest.fixture
def scene(tmp_path: Path, plan: Plan, empty_database: Path) -> Scene:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Scene(tmp_path, plan)


@pytest.fixture
def server(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], str]]:
    """MLflow's own server on a port of this machine, to be put up (True) and down (False)."""
    for name, value in (("FILE_STORE", f"sqlite:///{scene.database}"), ("ARTIFACT_ROOT", str(scene.home.root / "art"))):
        monkeypatch.setenv(f"_MLFLOW_SERVER_{name}", value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what the server writes there is taken back at the end
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the server imports
        from mlflow.server import app, fastapi_app, handlers  # noqa: F401

    monkeypatch.setattr(handlers, "_tracking_store", None)
    running: list[BaseWSGIServer] = []
    held = socket.socket()  # it does not listen: it keeps the port ours while the server is down
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]

    def put(up: bool) -> str:
        if up:
            running.append(make_server("127.0.0.1", port, app, threaded=True))
            threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        else:
            running[-1].shutdown()
            running.pop().server_close()
        return f"http://127.0.0.1:{port}"

    yield put
    while running:
        put(False)
    held.close()


def finish(recorder: Recorder, **failures: str) -> list[str]:
    recorder.finish({}, failures, {"best_perplexity_ratio": 1.5}, [])
    return recorder.behind(AGAIN)


def test_a_server_that_dies_on_the_way_gets_the_rest_when_it_is_back(
    scene: Scene, server: Callable[[bool], str], capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = scene.recorder(server(True))
    scene.begin(scene.plan.teacher, 5)
    recorder.catch_up()
    assert recorder.behind(AGAIN) == []
    run = recorder.run_id(scene.plan.teacher)
    assert run is not None
    server(False)
    scene.all_done()
    recorder.catch_up()
    [told] = recorder.behind(AGAIN)
    assert told.startswith("MLflow lacks 4 of 4 stages (") and told.endswith(f"the next run sends them, or {AGAIN}")
    server(True)
    recorder.catch_up()
    assert finish(recorder) == []
    assert recorder.run_id(scene.plan.teacher) == run
    scene.check_complete()
    assert set(scene.statuses().values()) == {"FINISHED"}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["MLflow is behind", "MLflow has caught up"]


def test_a_server_that_is_down_all_the_time_is_filled_by_the_report(
    scene: Scene, server: Callable[[bool], str]
) -> None:
    address = server(True)
    server(False)
    scene.all_done()
    recorder = scene.recorder(address)
    recorder.catch_up()
    assert "MLflow lacks 4 of 4 stages" in finish(recorder)[0]
    server(True)
    report = scene.recorder(address, live=False)
    report.catch_up()
    assert finish(report) == []
    scene.check_complete()
    assert set(scene.statuses().values()) == {"FINISHED"}


def test_a_server_that_never_answers_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "250")
    scene.begin(scene.plan.teacher, 5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        recorder = scene.recorder(f"http://127.0.0.1:{deaf.getsockname()[1]}", patience=0.3)
        recorder.catch_up()
        assert recorder.hopeless
        assert finish(recorder) == [
            f"MLflow lacks 1 of 1 stages (it does not answer); nothing is lost: the next run sends them, or {AGAIN}"
        ]
    recorder.thread.join(timeout=250)  # its request ends with the socket
    assert not recorder.thread.is_alive()


def test_a_locked_database_is_caught_up_with_when_it_is_free(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorder_module, "EVERY", 0.05)
    scene.all_done()
    recorder = scene.recorder()
    lock = sqlite3.connect(scene.database, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    recorder.start()
    wait_until(lambda: recorder.trouble is not None)
    assert "database is locked" in capsys.readouterr().err
    lock.rollback()
    lock.close()
    wait_until(lambda: recorder.trouble is None)
    assert finish(recorder) == []
    scene.check_complete()


def test_files_that_cannot_be_kept_come_later_and_models_are_there_once(scene: Scene) -> None:
    scene.all_done()
    (scene.home.root / "report.md").write_text("# report")
    Tracker(scene.home, scene.plan, scene.speeds)
    place = scene.home.root / "mlartifacts" / "smoke"
    if place.is_dir():
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    for live in (True, False):
        recorder = scene.recorder(live=live)
        recorder.finish({}, {}, {}, [scene.home.root / "report.md"])
        [told] = recorder.behind(AGAIN)
        assert told.startswith("MLflow lacks the study's files")
        assert set(scene.statuses().values()) == {"FINISHED"}
    place.unlink()
    for _ in range(2):
        recorder = scene.recorder(live=False)
        recorder.finish({}, {}, {}, [scene.home.root / "report.md"])
        assert recorder.behind(AGAIN) == []
    assert list(place.rglob("report.md"))
    models = scene.query("SELECT name, status FROM logged_models WHERE lifecycle_stage = 'active'")
    assert len(models) == len({name for name, _ in models}) == 3


def test_replay_by_a_new_run_and_recomputed_stages_double_nothing(scene: Scene) -> None:
    scene.all_done()
    assert finish(scene.recorder()) == []
    points = scene.points()
    scene.check_complete()
    for step in scene.plan.steps:
        scene.end(step, finished=2000.0)  # a stage that was damaged and computed again
    assert finish(scene.recorder()) == []
    assert scene.points() == points
    for step in scene.plan.steps:
        scene.end(step)
    scene.query(f"DELETE FROM tags WHERE key = '{TOLD}'")  # as if the answers had been lost
    assert finish(scene.recorder(live=False)) == []
    assert scene.points() == points
    assert set(scene.statuses().values()) == {"FINISHED"}


@pytest.mark.parametrize("lost", ["request", "answer"])
@pytest.mark.parametrize("call", ["create_run", "log_batch", "set_terminated"])
def test_any_lost_call_is_made_up_for(scene: Scene, monkeypatch: pytest.MonkeyPatch, call: str, lost: str) -> None:
    """Every third call of a kind is lost on its way there, or done with its answer lost."""
    scene.all_done()
    real, calls = getattr(MlflowClient, call), iter(range(10_000))

    def losing(*words: Any, **more: Any) -> Any:
        drop = next(calls) % 3 == 1
        result = None if drop and lost == "request" else real(*words, **more)
        if drop:
            raise ConnectionError(f"{call} lost")
        return result

    monkeypatch.setattr(MlflowClient, call, losing)
    recorder = scene.recorder()
    for _ in range(60):
        recorder.catch_up()
        if recorder.trouble is None:
            break
    monkeypatch.undo()
    assert finish(recorder) == []
    scene.check_complete()
    assert sorted(scene.statuses().values()) == ["FINISHED"] * 6


def test_what_a_stage_writes_while_it_is_looked_at_is_sent_too(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that write their last lines and finish right after their journal was read are told whole."""
    read = tracking_module.read_journal

    def read_then_finish(folder: Path, after: int = -1) -> Any:
        lines = read(folder, after)
        for step in scene.plan.steps:
            if scene.store.folder(step.train.key) == folder and not scene.store.finished(step.train.key):
                scene.begin(step, LINES)
                scene.end(step)
        return lines

    for step in scene.plan.steps:
        scene.begin(step, LINES - 5)
    monkeypatch.setattr(tracking_module, "read_journal", read_then_finish)
    tracker = Tracker(scene.home, scene.plan, scene.speeds)
    tracker.sync()
    tracker.sync()
    scene.check_complete()


def test_a_run_made_twice_is_kept_once(scene: Scene) -> None:
    scene.all_done()
    tracker = Tracker(scene.home, scene.plan, scene.speeds)
    tracker.sync()
    runs = tracker.runs
    twin = runs.client.create_run(runs.experiment, tags=runs.tags[runs.ids["study"]])
    assert finish(scene.recorder()) == []
    assert runs.client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"
    assert sorted(scene.statuses().values()) == ["FINISHED"] * 6


def test_a_study_has_one_recorder_at_a_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "EVERY", 1000.0)
    scene.all_done()
    first, second = scene.recorder(), scene.recorder()
    first.catch_up()
    second.catch_up()
    assert second.elsewhere and second.run_id(scene.plan.teacher) == first.run_id(scene.plan.teacher) is not None
    assert scene.statuses()["study smoke"] == "RUNNING"
    assert finish(first) == []
    scene.check_complete()
    scene.query("UPDATE runs SET status = 'RUNNING'")  # as a first one that was killed leaves them
    assert finish(second) == []
    assert not second.elsewhere
    assert set(scene.statuses().values()) == {"FINISHED"}


def test_a_database_of_another_version_is_told_once_and_nothing_is_promised(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(scene.database) as database:
        database.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    scene.all_done()
    recorder = scene.recorder()
    recorder.start()
    told = finish(recorder)
    command = f"mlflow db upgrade {scene.home.database}"
    assert len(told) == 1 and f"{command}; nothing is lost: after that, {AGAIN} sends them" in told[0]
    assert "the next run sends" not in told[0]
    assert capsys.readouterr().err.rstrip().endswith(command)


def test_no_password_is_told_where_mlflow_names_its_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("no answer from http://ann:s3/cr@et@here:5000/api?token=abc&x=1: gone\nand more")

    monkeypatch.setattr(recorder_module, "Tracker", refuse)
    recorder = scene.recorder()
    shown = "ConnectionError: no answer from http://ann:***@here:5000/api?token=***&x=1: gone"
    assert finish(recorder)[0].startswith(f"MLflow lacks the study's files ({shown}); nothing is lost")
    assert capsys.readouterr().err == f"MLflow is behind, nothing is lost, the study goes on: {shown}\n"


def test_status_is_what_happened(scene: Scene) -> None:
    first, second, _ = scene.students
    for step in (scene.plan.teacher, first):
        scene.begin(step, LINES)
        scene.end(step)
    scene.begin(second, 4)
    finish(scene.recorder())
    assert scene.statuses() == {
        "study smoke": "KILLED", "teacher teacher": "FINISHED", "trial hyena-2": "KILLED",
        "stage hyena-2 · 1/3 layers 0,1": "FINISHED", "stage hyena-2 · 2/3 layers 2": "KILLED",
    }  # fmt: skip
    running = scene.recorder()
    running.catch_up()
    assert scene.statuses()["study smoke"] == "RUNNING"
    write_json(scene.store.folder(second.train.key) / "failure.json", {"error": "NonFiniteLoss: step 4"})
    finish(running)
    assert {name for name, status in scene.statuses().items() if status == "FAILED"} == {
        "study smoke", "trial hyena-2", "stage hyena-2 · 2/3 layers 2"
    }  # fmt: skip
