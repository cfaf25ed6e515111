"""What a run remembers, prints and exits with, its computing done by hand instead of Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.distill.context import RunContext
from orchestrator.record import driver, remembered
from orchestrator.record.answer import report
from orchestrator.record.driver import cost_of, run_study
from orchestrator.record.job import Job
from orchestrator.record.provenance import Provenance
from orchestrator.record.screen.progress import Progress
from orchestrator.run.cluster import Cluster
from orchestrator.run.interrupt import Interrupt
from orchestrator.run.store import StoreError
from orchestrator.run.sweep import Outcome
from tests.record.handmade import Hand

COMMANDS = {"run": "layerswap run S", "report": "layerswap report S", "export": "layerswap export S", "ui": "make ui"}


class Quiet:
    """A recorder that sends nothing and keeps what it was given."""

    lines: list[str] = []  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        self.given: list[Any] = []
        Quiet.last = self

    last: Quiet

    def start(self) -> None: ...

    def replan(self, *given: Any) -> None:
        self.given.append(given)

    def catch_up(self) -> None: ...

    def finish(self, *given: Any) -> None:
        self.given.append(given)

    def run_id(self, step: Any) -> str:
        return f"run of {step.train.key}"

    def behind(self, command: str) -> list[str]:
        return [line.format(command) for line in self.lines]


class Scene:
    """A job whose stages `compute` makes, and the parts of a run that need no Ray."""

    def __init__(self, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hand = hand
        self.job = Job(hand.asked.growing(hand.store), hand.home, COMMANDS, hand.asked)
        self.interrupt = Interrupt.__new__(Interrupt)
        self.interrupt.number = 0
        self.computed = 0
        self.compute: Callable[[], Outcome] = Outcome
        monkeypatch.setattr(driver, "Recorder", Quiet)
        monkeypatch.setattr(driver, "run_plan", self._run_plan)
        for name in ("draw_pareto", "draw_curves", "draw_speed"):
            monkeypatch.setattr(report, name, lambda one, two, path: path.write_bytes(b"a picture") > 0)
        monkeypatch.setattr(report, "page", lambda *_: "a page")

    def _run_plan(self, *_: Any) -> Outcome:
        self.computed += 1
        return self.compute()

    def run(self) -> int:
        return run_study(self.job, RunContext(store=str(self.hand.home.store)), Cluster(cpus=2, gpus=0), self.interrupt)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What the home remembers."""
        return self.job.variant.runs()


@pytest.fixture
def scene(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(hand, monkeypatch)


def test_what_a_run_remembers(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = scene.hand
    clock = iter([100.0, 100.0])
    monkeypatch.setattr(driver.time, "monotonic", lambda: next(clock, 190.0))
    hand.text()
    hand.finish("teacher", "two 0")

    def compute() -> Outcome:
        hand.all_done()
        return Outcome()

    scene.compute = compute
    began = time.time()
    assert scene.run() == 0
    [run] = scene.runs
    trained = [name for name in hand.steps if name not in ("teacher", "two 0")]
    assert run["trained"] == sorted(hand.key(name) for name in trained)
    assert run["reused"] == 2
    assert run["seconds"] == 90.0
    assert began <= run["started"] <= time.time()
    assert run["stopped"] == {}
    assert 1 < run["peak_rss_mb"] < 2**20
    assert (run["status"], run["failures"], run["command"]) == ("finished", {}, "layerswap run S")
    rows = json.loads((scene.job.variant.folder / "records.json").read_text())["records"]
    reused = {row["name"] for row in rows if row["reused"]}
    assert reused == {"teacher", "trial-00 stage 1", "trial-01 stage 1"}


def test_the_answer_names_the_files_and_the_commands(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.hand.all_done()
    assert scene.run() == 0
    assert scene.computed == 0  # nothing was missing
    page = scene.job.variant.folder / "report.html"
    assert page.read_text() == "a page"
    told = capsys.readouterr().out.splitlines()
    assert told[-4:] == [
        f"report:   {page}",
        "records:  layerswap report S --json records.json",
        "export:   layerswap export S --to student",
        "browse:   make ui",
    ]
    assert "0 stages trained, 12 reused" in told[-6]
    [(stopped, failures, summary, files)] = Quiet.last.given
    assert (stopped, failures, summary) == ({}, {}, {"best_perplexity_ratio": 1.1})
    assert files == sorted(
        page.parent / name
        for name in ("curves.png", "pareto.png", "records.csv", "records.json", "report.html", "report.md", "speed.png")
    )


def test_failures_end_in_an_exit_code_and_are_told(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.compute = lambda: Outcome({"trial-02": 1}, {"trial-00": "NonFiniteLoss: step 4"})
    # The text and ten trained stages (of 12, without those that trial-02 was stopped before), each evaluated, and the
    # six speeds of their architectures.
    left = 1 + 2 * 10 + 6
    assert scene.run() == 1
    assert scene.computed == 1  # a failed run is not tried again
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "trial-02 was stopped early after 1 stages"
    assert err.splitlines() == [
        "failed: trial-00: NonFiniteLoss: step 4",
        f"1 failed, {left} stages are not finished; go on with: layerswap run S",
    ]
    assert scene.runs[0]["stopped"] is None  # early stopping has decided nothing for good
    [(stopped, failures, summary, _)] = Quiet.last.given
    assert (stopped, failures, summary) == ({"trial-02": 1}, {"trial-00": "NonFiniteLoss: step 4"}, {})


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_stage_that_failed_is_told_again_at_the_end_with_its_log(
    interrupted: bool, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    hand, key = scene.hand, scene.hand.key("two 0")
    folder = hand.store.folder(key)

    def compute() -> Outcome:
        hand.attempt(key, number=2)
        (folder / "log.txt").write_text("...")
        (folder / "failure.json").write_text('{"error": "OSError: no space", "traceback": "..."}')
        if interrupted:
            scene.interrupt.number = 2
            raise KeyboardInterrupt
        return Outcome({}, {"trial-00": "OSError: no space", "trial-01": "OSError: no space", "store": "gone"})

    scene.compute = compute
    assert scene.run() == (130 if interrupted else 1)
    out, err = capsys.readouterr()
    failure = ["trial-00 stage 1/3 layers 0: OSError: no space", f"          log: {folder / 'log.txt'}"]
    assert [line.partition("FAILED ")[2] for line in out.splitlines() if "FAILED" in line] == failure[:1]
    told = err.splitlines()
    at = told.index(f"failed: {failure[0]}")
    assert told[at + 1] == failure[1]
    assert [line for line in told if line.startswith("failed: ")][1:] == (
        [] if interrupted else ["failed: store: gone"]
    )


@pytest.mark.parametrize("error", [AttributeError("'NoneType' has no 'x'"), ValueError("a store that cannot be used")])
def test_whatever_ends_the_computing_is_told_with_what_is_finished(
    scene: Scene, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    hand = scene.hand
    hand.all_done()
    (hand.store.folder(hand.key("two joint")) / "DONE.json").unlink()

    def compute() -> Outcome:
        raise error

    scene.compute = compute
    assert scene.run() == 1
    out, err = capsys.readouterr()
    assert "best path: trial-02" in out
    reason = f"{type(error).__name__}: {error}"
    assert err.splitlines()[-2:] == [
        f"failed: run: {reason}",
        "1 failed, 1 stages are not finished; go on with: layerswap run S",
    ]
    assert ("Traceback" in err) == isinstance(error, AttributeError)  # a fault of the program
    [(_, failures, _, _)] = Quiet.last.given  # MLflow's runs do not stay RUNNING
    assert failures == {"run": reason}


def test_an_error_that_a_signal_brought_about_is_no_failure(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    def compute() -> Outcome:
        scene.interrupt.number = 2
        raise ImportError("half a module")

    scene.compute = compute
    assert scene.run() == 128 + 2
    assert "half a module" not in capsys.readouterr().err


def test_what_vanished_is_computed_once_more_and_then_told(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    hand = scene.hand
    gone = hand.store.folder(hand.key("two 0")) / "DONE.json"

    def compute() -> Outcome:
        hand.all_done()
        if scene.computed == 1:
            gone.unlink()
        return Outcome()

    scene.compute = compute
    assert scene.run() == 0
    assert scene.computed == 2
    gone.unlink()
    scene.compute = Outcome
    assert scene.run() == 1
    assert scene.computed == 4
    told = capsys.readouterr().err.splitlines()[-2]
    assert told == f"failed: store: 1 stages were finished and are gone or damaged: look at {hand.home.store}"


def test_a_stopped_run_says_where_it_goes_on(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    hand = scene.hand
    hand.finish("teacher")

    def compute() -> Outcome:
        for step in (5, 10):
            (hand.store.folder(hand.key("two 0")) / "work" / f"step-{step:06d}").mkdir(parents=True)
        hand.journal(hand.key("two 0"), (5, 80, 1.0, {}), (10, 1_160, 2.0, {}))
        scene.interrupt.number = 15
        raise KeyboardInterrupt

    scene.compute = compute
    assert scene.run() == 128 + 15
    out, err = capsys.readouterr()
    assert "best path" not in out
    assert err.splitlines() == [
        "stopped; nothing finished is lost",
        "  trial-00 stage 1/3 layers 0 goes on after step 10, 1,160 of 160 tokens",
        "go on with: layerswap run S",
    ]
    assert scene.runs[0]["stopped"] is None


def test_trials_that_were_stopped_stay_so_for_the_same_plan(scene: Scene, tmp_path: Path) -> None:
    hand = scene.hand
    hand.all_done()
    (hand.store.folder(hand.key("heads joint")) / "DONE.json").unlink()
    scene.compute = lambda: Outcome({"trial-02": 2})
    assert scene.run() == 0
    assert scene.computed == 1
    assert scene.run() == 0
    assert scene.computed == 1  # not asked again
    assert [run["stopped"] for run in scene.runs] == [{"trial-02": 2}] * 2
    (tmp_path / "other").mkdir()
    other = Hand(tmp_path / "other", "search.early_stopping={grace_layers: 1}")
    assert Job(other.asked.growing(other.store), hand.home, COMMANDS, other.asked).variant.stopped() == {}


@pytest.mark.parametrize("name", ["write_text", "write_json", "holding"])
def test_a_disk_that_is_full_from_the_start_ends_a_run_before_it_begins(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered, name, full)
    with pytest.raises(StoreError, match=r"handmade/[0-9a-f]{8} cannot be written \(No space left on device\): free"):
        scene.run()
    assert scene.computed == 0


def test_damage_is_told_before_anything_is_computed(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    hand = scene.hand
    hand.all_done()
    (hand.store.artefacts(hand.key("two joint")) / "student.safetensors").write_text("other")
    (hand.store.folder(hand.key("two 1")) / "work").mkdir()
    scene.compute = lambda: (hand.train("two joint"), Outcome())[1]
    assert scene.run() == 0
    assert scene.computed == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[0]
        .endswith("student.safetensors is damaged or gone: the stage is computed again")
    )
    assert not (hand.store.folder(hand.key("two 1")) / "work").exists()
    assert scene.runs[0]["trained"] == [hand.key("two joint")] and scene.runs[0]["reused"] == 11


def test_what_mlflow_lacks_is_told_with_the_command_that_sends_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.hand.all_done()
    monkeypatch.setattr(Quiet, "lines", ["MLflow lacks something: {}"])
    assert scene.run() == 0
    assert capsys.readouterr().err == "MLflow lacks something: layerswap report S\n"


def test_a_report_that_cannot_be_written_stops_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/there/report.md")

    scene.hand.all_done()
    monkeypatch.setattr(driver, "write_report", full)
    assert scene.run() == 0
    out, err = capsys.readouterr()
    assert err == "cannot be written: /there/report.md: No space left on device\n"
    assert "best path: trial-00" in out
    assert Quiet.last.given[0][3] == []


def test_the_cost_is_that_of_all_runs_and_the_disk_the_studys_own(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hand = scene.hand
    assert cost_of(scene.job) == {"disk_mb": 0.0, "trained": [], "reused": 0, "peak_rss_mb": 0.0}
    hand.text()
    hand.finish("teacher")
    (hand.store.root / "ab" / "abc").mkdir(parents=True)
    (hand.store.root / "ab" / "abc" / "DONE.json").write_text("of another study")
    for seconds, peak, names in ((60.0, 300.0, ["two 0", "two 1"]), (30.0, 900.0, ["skip 0"]), (10.0, 100.0, [])):
        monkeypatch.setattr(driver, "_tree_rss_mb", lambda peak=peak: peak)
        clock = iter([0.0, 0.0])
        monkeypatch.setattr(driver.time, "monotonic", lambda clock=clock, seconds=seconds: next(clock, seconds))
        scene.compute = lambda names=names: (hand.finish(*names), Outcome())[1]
        scene.run()
    hand.finish("skip 1")  # by another study
    folders = [hand.store.folder(key) for key in scene.job.keys]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert cost_of(scene.job) == {
        "runs": 3,
        "seconds": 100.0,
        "trained": sorted(hand.key(name) for name in ("two 0", "two 1", "skip 0")),
        "reused": 2,
        "peak_rss_mb": 900.0,
        "disk_mb": size / 2**20,
    }


def test_memory_is_of_this_process_and_all_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, size: int = 3 * 2**20, gone: bool = False) -> None:
            self.size, self.gone = size, gone

        def children(self, recursive: bool) -> list[Process]:
            return [Process(2**20), Process(gone=True), Process(2**19)] if recursive else []

        def memory_info(self) -> Any:
            if self.gone:
                raise psutil.NoSuchProcess(1)
            return type("Info", (), {"rss": self.size})

    monkeypatch.setattr(psutil, "Process", Process)
    assert driver._tree_rss_mb() == 4.5


def test_a_look_that_fails_stops_neither_the_watch_nor_the_weighing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scene.job.variant.running(Provenance.of("run")) as run:
        watch = driver._Watch(scene.job, scene.hand.store, 2, run, Quiet())  # type: ignore[arg-type]
    weights = iter([3.0, 8.0, 5.0, *[0.0] * 9])
    monkeypatch.setattr(driver, "_tree_rss_mb", lambda: next(weights))

    def tick(_: Progress) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(Progress, "tick", tick)
    for _ in range(3):
        watch._look()
    assert watch.peak_mb == 8.0
    assert "cannot be told" not in capsys.readouterr().out  # a stage may be deleted under a look
    for _ in range(9):
        watch._look()
    assert capsys.readouterr().out.count("where the run stands cannot be told (KeyError: 'gone'); it goes on") == 1
