"""Trackers beside MLflow: told the same runs and numbers, each once, with nobody waiting for them."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.record.tracking import beside as beside_module
from orchestrator.record.tracking import boards
from orchestrator.record.tracking.beside import Beside
from orchestrator.record.tracking.identity import home_id
from orchestrator.record.tracking.recorder import Recorder
from orchestrator.study.loader import StudyError, load_study
from tests.record.handmade import RATIOS, START, STUDY, Hand, put
from tests.waiting import wait_until

TENSORBOARD = "record={tensorboard: {}}"
WANDB = "record={wandb: {project: swaps, entity: us, mode: offline}}"
HEADS = ("heads 0", "heads 1", "heads joint")
TRIAL = "hyena-2h"
STAGE = "hyena-2h · 1/3 layers 0"


def sync(name: str, hand: Hand) -> None:
    """Keep a board in step once, as a process of its own."""
    beside = Beside(name, hand.home, hand.plan, hand.speeds)
    beside.sync()
    assert beside.board is not None
    beside.board.close()


def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it not be installed, whether it is or not."""
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else real(name, *more))


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """By metric, step, value and time of every point in the event files of a run, read by their format."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        raw = path.read_bytes()
        while raw:
            length = int.from_bytes(raw[:8], "little")  # then 4 bytes of a checksum, the event, 4 more
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found


def test_tensorboard_has_the_curves_of_stages_and_of_trials(tmp_path: Path) -> None:
    hand = Hand(tmp_path, TENSORBOARD)
    hand.finish(*HEADS)
    hand.measure("heads 0", "heads 1")
    sync("tensorboard", hand)
    folder = hand.home.study("handmade") / "tensorboard"
    assert {path.name for path in folder.iterdir()} == {
        TRIAL, "hyena-2h · 1 of 3 layers 0", "hyena-2h · 2 of 3 layers 1", "hyena-2h · 3 of 3 joint layers 0,1"
    }  # fmt: skip
    stage = scalars(folder / STAGE.replace("/", " of "))
    assert stage["loss/kl"] == [(5, 0.5, START + 1.5), (10, 0.25, START + 3.25)]
    assert stage["stage_tokens"] == [(5, 80.0, START + 1.5), (10, 160.0, START + 3.25)]
    assert stage["perplexity_ratio"] == [(10, pytest.approx(RATIOS["heads 0"]), START + 12.0)]
    assert stage["decode_ratio/length_32"] == [(10, pytest.approx(1.3), START + 105.0)]
    trial = scalars(folder / TRIAL)
    ratios = [(at, pytest.approx(RATIOS[name])) for at, name in zip((160, 320, 640), HEADS, strict=True)]
    assert [point[:2] for point in trial["perplexity_ratio"]] == ratios
    assert [point[:2] for point in trial["swapped_layers"]] == [(160, 1.0), (320, 2.0), (640, 2.0)]


def test_nothing_is_sent_twice_and_nothing_is_forgotten(tmp_path: Path) -> None:
    hand = Hand(tmp_path, TENSORBOARD)
    hand.attempt(hand.key("heads 0"))
    hand.journal(hand.key("heads 0"), (5, 80, START + 1.5, {"loss/kl": 0.5}))
    folder = hand.home.study("handmade") / "tensorboard" / STAGE.replace("/", " of ")
    for _ in range(2):
        sync("tensorboard", hand)
    assert {name: len(points) for name, points in scalars(folder).items()} == {"loss/kl": 1, "stage_tokens": 1}
    hand.finish("heads 0")
    for measured in (False, True, True):
        if measured:
            hand.measure("heads 0")
        sync("tensorboard", hand)
        told = {name: len(points) for name, points in scalars(folder).items()}
        assert (told["loss/kl"], told["perplexity_ratio"]) == (2, 1)
        assert told.get("train_ratio", 0) == measured


class FakeRun:
    """What the program uses of a run of Weights & Biases."""

    def __init__(self, **options: Any) -> None:
        self.options, self.step, self.summary = options, 0, dict[str, float]()
        self.points: list[tuple[int, dict[str, float]]] = []
        self.code: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "a curve takes none but the newest step"
        self.points.append((step, values))
        self.step = step

    def finish(self, exit_code: int = 0) -> None:
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that a module in the place of wandb was asked for."""
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        before = [run.step for run in runs if run.options["id"] == options["id"]]
        runs.append(FakeRun(**options))
        runs[-1].step = max(before, default=-1) + 1  # a run that is resumed goes on behind its last step
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.init, module.Settings = init, lambda **options: SimpleNamespace(**options)
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_weights_and_biases_has_a_run_for_each_run(tmp_path: Path, wandb: list[FakeRun]) -> None:
    hand = Hand(tmp_path, WANDB)
    hand.finish("heads 0")
    hand.attempt(hand.key("heads 1"))
    put(hand.store.folder(hand.key("heads 1")) / "failure.json", {"error": "ValueError: no"})
    hand.journal(hand.key("heads 1"), (5, 80, START + 1.5, {"loss/kl": 0.5}))
    board = Beside("wandb", hand.home, hand.plan, hand.speeds)
    board.finish()  # the end of a run that failed
    stage, failed, trial = wandb
    assert (stage.options["project"], stage.options["entity"], stage.options["mode"]) == ("swaps", "us", "offline")
    assert (stage.options["name"], stage.options["group"], stage.options["job_type"]) == (STAGE, "handmade", "stage")
    assert stage.options["id"] == f"{home_id(hand.home)[:8]}-stage-{hand.key('heads 0')}"
    assert stage.options["resume"] == "allow"
    assert stage.options["config"]["optimizer.lr"] == "0.003"
    assert trial.options["config"]["operator.heads"] == "2"
    assert [step for step, _ in stage.points] == [5, 10]
    assert stage.points[0][1]["loss/kl"] == 0.5
    assert (stage.points[1][1]["loss/kl"], stage.points[1][1]["perplexity_ratio"]) == (0.25, 1.2)
    assert (failed.code, stage.code, trial.code) == (1, 0, 0)
    hand.measure("heads 0")  # later, when the curve is at its end: speed counts as its summary
    sync("wandb", hand)
    again = wandb[3]
    assert (again.options["id"], again.code) == (stage.options["id"], 0)
    assert again.points == []
    assert again.summary["decode_ratio/length_32"] == 1.3 and "loss/kl" not in again.summary


def test_a_board_that_fails_is_told_once_and_gets_the_rest_later(
    tmp_path: Path, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(beside_module, "EVERY", 0.02)
    hand = Hand(tmp_path, WANDB)
    hand.finish("heads 0")
    tries: list[int] = []

    def failing(**_: Any) -> Any:
        tries.append(1)
        raise ConnectionError("no route to https://ann:secret@host\nmore")

    init, sys.modules["wandb"].init = sys.modules["wandb"].init, failing  # type: ignore[attr-defined]
    board = Beside("wandb", hand.home, hand.plan, hand.speeds)
    board.start()
    wait_until(lambda: len(tries) > 3)
    sys.modules["wandb"].init = init  # type: ignore[attr-defined]
    wait_until(lambda: board.trouble is None)
    board.finish()
    assert not board.thread.is_alive()
    assert {run.options["job_type"] for run in wandb} == {"stage", "trial"}
    assert capsys.readouterr().err == (
        "wandb is behind, nothing is lost, the study goes on: ConnectionError: no route to https://ann:***@host\n"
    )


def test_nobody_waits_for_a_board_that_hangs(
    tmp_path: Path, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside_module, "PATIENCE", 0.05)
    hand = Hand(tmp_path, WANDB)
    hand.finish("heads 0")
    free = threading.Event()
    sys.modules["wandb"].init = lambda **_: free.wait()  # type: ignore[attr-defined]
    board = Beside("wandb", hand.home, hand.plan, hand.speeds)
    board.finish()
    assert board.thread.is_alive()
    free.set()
    board.thread.join()


def test_a_run_has_the_boards_that_its_study_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recorder(Hand(tmp_path).home, Hand(tmp_path).plan, {}).boards == []
    plan = Hand(tmp_path, "record={tensorboard: {}, wandb: {project: p}}").plan
    without_wandb(monkeypatch)
    told = "record.wandb: wandb is not installed: pip install 'layerswap[wandb]', or take the key out"
    assert boards.lacking(boards.asked(plan.study)) == told
    with pytest.raises(ImportError, match=re.escape(told)):
        boards.board_of("wandb", Hand(tmp_path).home, plan.study)
    live, report = (Recorder(Hand(tmp_path).home, plan, {}, live) for live in (True, False))
    assert [board.name for board in live.boards] == ["wandb", "tensorboard"]
    assert [board.name for board in report.boards] == ["tensorboard"]  # it may be read where a run may not be made


def test_a_run_is_refused_where_a_board_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Hand(tmp_path, WANDB).file
    file.write_text(f"{STUDY}record: {{wandb: {{project: swaps}}}}\n")
    monkeypatch.setattr("orchestrator.record.given.check_files", lambda *_: None)  # there is one document
    without_wandb(monkeypatch)
    done = CliRunner().invoke(app, ["run", str(file), "--home", str(tmp_path / "none")])
    assert (done.exit_code, done.stderr.split(":")[0]) == (2, "record.wandb")
    assert not (tmp_path / "none").exists()


def test_no_stage_depends_on_where_runs_are_told(tmp_path: Path) -> None:
    assert Hand(tmp_path).plan.specs.keys() == Hand(tmp_path, TENSORBOARD).plan.specs.keys()


def test_what_a_board_must_be_told_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    with pytest.raises(StudyError, match=r"record.wandb.project: this key is missing"):
        load_study(tmp_path / "s.yaml", ("record={wandb: {}}",))
