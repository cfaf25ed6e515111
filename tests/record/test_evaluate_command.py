"""`layerswap evaluate` on a study that ran and on the folder of its student: what is asked, kept and told."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.distill.measuring import tasks as asking
from orchestrator.record import evaluating
from orchestrator.record.home import Home
from orchestrator.record.remembered import variant_of
from orchestrator.record.task_results import task_numbers, task_results
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.recipe import Numerics
from tests.conftest import TEXT
from tests.test_export_command import STUDY, computed

pytest.importorskip("lm_eval")
TASKS = Path(__file__).resolve().parents[1] / "data" / "tasks"
ALL = "choice,rolling"


class Ran(NamedTuple):
    """A study file, its home, its plan."""

    file: Path
    home: Home
    plan: Plan

    @property
    def store(self) -> Store:
        return Store(self.home.store)

    def key(self, place: int) -> str:
        """Of the student after so many stages; 0 is the teacher."""
        return (self.plan.teacher if place == 0 else self.plan.trials[0].steps[place - 1]).train.key

    def asked(self) -> dict[str, set[str]]:
        """By stage, the tasks that it was asked to the end."""
        found: dict[str, set[str]] = {}
        for path in self.home.store.glob("??/*/DONE.json"):
            spec = json.loads((path.parent / "spec.json").read_text())
            if spec["kind"] == "tasks":
                found.setdefault(spec["subject"] or spec["folder"], set()).add(spec["task"])
        return found


def call(*words: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def evaluate(ran: Ran, *words: str | Path, model: Path | None = None, code: int = 0) -> Any:
    limited = () if "--limit" in words else ("--limit", "4")
    named = () if "--tasks" in words else ("--tasks", ALL)
    place = ["--home", ran.home.root, "--task-path", TASKS]
    return call("evaluate", model or ran.file, *place, *named, *limited, *words, code=code)


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> None:
    """Stages collect garbage when they end: what lm-eval's libraries hold is not looked through, then and later."""
    gc.freeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Ran:
    root = tmp_path_factory.mktemp("ran")
    (root / "study.yaml").write_text(
        STUDY.replace("skip: true", "skip: false").replace("max_length: 32", "max_length: 96")
    )
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    plan = computed(root / "study.yaml", root / "home")
    shutil.copy(empty_database, root / "home" / "mlflow.db")
    return Ran(root / "study.yaml", Home(root / "home"), plan)


@pytest.fixture
def ran(finished: Ran, tmp_path: Path) -> Ran:
    """A copy of it, for a test to write into."""
    shutil.copytree(finished.file.parent, tmp_path / "ran")
    return Ran(tmp_path / "ran" / "study.yaml", Home(tmp_path / "ran" / "home"), finished.plan)


@pytest.fixture
def asks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The tasks that a model is asked, with the places of those after which the machine is to break down."""
    seen: list[tuple[str, int]] = []
    ask = asking.ask

    def counted(asked: Any, *words: Any, **more: Any) -> Any:
        seen.append((asked.name, asked.items))
        return ask(asked, *words, **more)

    monkeypatch.setattr(asking, "ask", counted)
    return seen


@pytest.fixture
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is a matter of other tests, and takes seconds."""
    monkeypatch.setattr("orchestrator.record.evaluating.report", lambda *_: None)


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    """The lines of the table by task and metric."""
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {(line[0], line[1]): line[2:] for line in cells if len(line) == 6 and line[2].isdecimal()}


def test_a_study_is_told_in_a_table_in_the_report_and_in_mlflow(ran: Ran, asks: list[tuple[str, int]]) -> None:
    done = evaluate(ran)
    key = ran.key(2)
    head = f"trial-00 stage 2 ({key[:16]}) beside teacher, on cpu"
    assert done.stdout.startswith(f"{head}\n  choice first 4: 4 items, 16 requests, nothing known yet\n")
    assert asks == [("choice", 4), ("choice", 4), ("rolling", 4), ("rolling", 4)]
    told = rows(done.stdout)
    assert list(told) == [
        ("choice first 4", "acc"), ("choice first 4", "acc_norm"), ("rolling first 4", "bits_per_byte"),
        ("rolling first 4", "byte_perplexity"), ("rolling first 4", "word_perplexity"),
    ]  # fmt: skip
    records = json.loads((variant_of(ran.home, ran.plan).folder / "records.json").read_text())["records"]
    (row,) = (row for row in records if row["stage_key"] == key)
    numbers = row["tasks"]["rolling first 4"]["metrics"]["byte_perplexity"]
    _, student, teacher, relative = told["rolling first 4", "byte_perplexity"]
    assert student == f"{numbers['value']:.1f} ± {numbers['stderr']:.1f}"
    assert teacher == f"{numbers['teacher']:.1f} ± {numbers['teacher_stderr']:.1f}"
    assert relative == f"ratio {numbers['ratio']:.3f} ± {numbers['ratio_stderr']:.3f}"
    assert numbers["ratio"] == pytest.approx(numbers["value"] / numbers["teacher"]) and numbers["chance"] is None
    assert row["tasks"]["choice first 4"]["metrics"]["acc"]["chance"] == 0.25
    assert not any(name.startswith("tasks") for name in row["metrics"])
    report = (variant_of(ran.home, ran.plan).folder / "report.md").read_text()
    assert "\n## Tasks\n" in report
    assert (
        f"| trial-00 stage 2 | rolling first 4 | byte_perplexity | 4 | {student} | {teacher} | {relative} |" in report
    )
    client = MlflowClient(ran.home.database)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (run,) = (run for run in runs if run.data.tags.get("layerswap.stage") == key)
    assert run.data.metrics["tasks/rolling first 4/byte_perplexity"] == pytest.approx(numbers["value"])
    assert run.data.metrics["tasks/rolling first 4/byte_perplexity_ratio"] == pytest.approx(numbers["ratio"])
    assert run.data.metrics["tasks/choice first 4/acc_stderr"] >= 0


def test_what_is_known_is_read(ran: Ran, asks: list[tuple[str, int]], no_mlflow: None) -> None:
    first = evaluate(ran, "--tasks", "choice")
    assert len(asks) == 2
    again = evaluate(ran, "--tasks", f"{TASKS / 'choice.yaml'}")
    assert len(asks) == 2 and rows(again.stdout) == rows(first.stdout)
    assert f"known of trial-00 stage 2 ({ran.key(2)[:16]}) and teacher" in again.stdout
    earlier = evaluate(ran, "--tasks", "choice", "--trial", "trial-00", "--stage", "1")
    assert len(asks) == 3 and "16 requests, known of teacher" in earlier.stdout  # the teacher of both
    assert ran.asked() == {ran.key(place): {"choice"} for place in range(3)}
    evaluate(ran, "--tasks", "choice", "--limit", "5")
    assert asks[3:] == [("choice", 5), ("choice", 5)]


def test_the_folder_of_a_student_gives_its_numbers(ran: Ran, no_mlflow: None, tmp_path: Path) -> None:
    study = rows(evaluate(ran).stdout)
    call("export", ran.file, "--home", ran.home.root, "--to", tmp_path / "student")
    teacher = tmp_path / "teacher"
    shutil.copytree(ran.store.artefacts(ran.key(0)), teacher)
    shutil.copytree(ran.store.artefacts(ran.plan.tokens.key) / "tokenizer", teacher, dirs_exist_ok=True)
    alone = evaluate(ran, model=tmp_path / "student")
    assert "no teacher beside it" in alone.stdout
    assert rows(alone.stdout) == {name: [*told[:2], "-", "-"] for name, told in study.items()}
    beside = evaluate(ran, "--teacher", teacher, model=tmp_path / "student")
    assert rows(beside.stdout) == study and "known of" in beside.stdout
    new = ["--home", tmp_path / "new", "--tasks", "rolling", "--task-path", TASKS, "--limit", "4"]
    assert list(rows(call("evaluate", tmp_path / "student", *new).stdout)) == list(study)[2:]


def test_finished_tasks_stay_when_one_is_interrupted(
    ran: Ran, asks: list[tuple[str, int]], no_mlflow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = asking.ask

    def interrupted(asked: Any, *words: Any, **more: Any) -> Any:
        if len(asks) == 3:
            signal.raise_signal(signal.SIGINT)
        return ask(asked, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(asking, "ask", interrupted)
        evaluate(ran, code=130)
    assert ran.asked() == {ran.key(0): {"choice", "rolling"}, ran.key(2): {"choice"}}
    evaluate(ran)
    assert len(asks) == 4


def test_a_task_that_fails_is_told_and_the_others_are_asked(ran: Ran, no_mlflow: None, tmp_path: Path) -> None:
    """The teacher sees 96 positions; a task that lets it write 99 tokens cannot be asked."""
    text = (TASKS / "generate.yaml").read_text().replace("max_gen_toks: 16", "max_gen_toks: 99")
    (tmp_path / "long.yaml").write_text(text)
    shutil.copy(TASKS / "generate.jsonl", tmp_path)
    done = evaluate(ran, "--tasks", f"{tmp_path / 'long.yaml'},choice", code=1)
    assert "failed: generate first 4 of teacher: TaskError: an option of task generate" in done.stderr
    assert "is longer than the 96 positions of the model: leave it out" in done.stderr
    assert ("choice first 4", "acc") in rows(done.stdout) and "Traceback" not in done.output


def test_gc_keeps_what_students_were_asked_and_doctor_knows_it(
    ran: Ran, asks: list[tuple[str, int]], no_mlflow: None
) -> None:
    evaluate(ran, "--tasks", "choice")
    place = ["--home", ran.home.root]
    before = ran.store.all_keys()
    assert "0 stages that no given study needs" in call("gc", ran.file, *place, "--delete").stdout
    assert ran.store.all_keys() == before
    (done,) = (path for path in ran.home.store.glob("??/*/artefacts/items.json") if ran.key(2) in _spec(path))
    done.write_text("{}")
    told = call("doctor", ran.file, *place, code=1).stdout
    assert "items.json is damaged or gone" in told
    done.unlink()
    assert task_results(ran.store).keys() == {ran.key(0)}  # what is left of it is not told
    assert "`layerswap evaluate` with --tasks choice asks it again" in told
    again = evaluate(ran, "--tasks", "choice")
    assert "items.json is damaged or gone: the stage is computed again" in again.stderr and len(asks) == 3
    (ran.file.parent / "other.yaml").write_text(
        ran.file.read_text().replace("study: exported", "study: other\nseed: 1")
    )
    freed = call("gc", ran.file.parent / "other.yaml", *place).stdout
    assert f"{len(before) - 1} stages that no given study needs" in freed  # the text is the same


def test_metrics_have_names_that_mlflow_takes() -> None:
    told = {"metrics": {"pass@1 first,last": {"value": 0.5, "stderr": None, "refused": "teacher at chance"}}}
    assert task_numbers({"code+ first 2": told}) == {"tasks/code. first 2/pass.1 first.last": 0.5}


def _spec(path: Path) -> str:
    return (path.parents[1] / "spec.json").read_text()


def test_what_cannot_be_asked_is_told_before_anything_is_computed(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.tasks.__file__", str(tmp_path / "empty" / "few.py"))  # to read them all takes seconds
    (tmp_path / "hub.yaml").write_text(
        (TASKS / "choice.yaml")
        .read_text()
        .replace("path: json", "path: nobody/nothing")
        .replace("task: choice", "task: hub")
    )
    (tmp_path / "torn.yaml").write_text("task: [")
    before = ran.store.all_keys()
    for words, told in [
        (["--tasks", "choise"], "--tasks choise: no task of that name in"),
        (["--tasks", "choise"], "did you mean choice"),
        (["--tasks", ","], "--tasks names no task: give names, separated by commas"),
        (["--tasks", str(tmp_path / "none.yaml")], "none.yaml: there is no such file"),
        (["--tasks", str(tmp_path / "torn.yaml")], "torn.yaml cannot be read"),
        (["--tasks", str(tmp_path / "hub.yaml")], "if its data is on the hub it needs the network"),
        (["--task-path", str(tmp_path / "none")], "none is no folder: give one that holds files of tasks"),
        (["--limit", "0"], "--limit 0 must be 1 or more: leave it out for all"),
        (["--batch-size", "0"], "--batch-size 0 must be 1 or more\n"),
        (["--device", "tpu"], "--device tpu is not known: give one of cpu, cuda"),
        (["--stage", "ffff"], "--stage ffff: 0 finished students begin so"),
        (["--teacher", str(tmp_path)], "the teacher of a study's student is the study's: leave it out"),
    ]:
        done = evaluate(ran, *words, code=2)
        assert told in done.stderr and "Traceback" not in done.output, words
    shutil.copytree(ran.store.artefacts(ran.key(0)), tmp_path / "mute")
    shutil.copytree(tmp_path / "mute", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    for name, told in [
        ("mute", "mute holds no tokenizer: save it there"),
        ("torn", "torn holds no weights: save them"),
    ]:
        assert evaluate(ran, model=tmp_path / name, code=2).stderr.startswith(f"{tmp_path}/{told}")
    for words, told in [
        ([], "empty holds no config.json: give the folder of a saved model, or a study file"),
        (["--trial", "trial-00"], "--trial belongs to a study, and this is the folder of a model: leave it out"),
    ]:
        assert told in evaluate(ran, *words, model=tmp_path / "empty", code=2).stderr
    assert ran.store.all_keys() == before


def test_a_study_that_did_not_run_says_so(ran: Ran, tmp_path: Path) -> None:
    words = ["evaluate", ran.file, "--tasks", "choice", "--task-path", TASKS, "--home"]
    assert "holds nothing yet: run the study first" in call(*words, tmp_path / "none", code=2).stderr
    Store(tmp_path / "empty" / "store")
    assert "no student is finished yet: run the study first" in call(*words, tmp_path / "empty", code=2).stderr


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            None,
            "tasks are asked by lm-eval, which is not installed: pip install 'layerswap[eval]' brings lm-eval 0.4.13",
        ),
        ("0.4.9", "lm-eval 0.4.9 is installed, and its tasks are not those of 0.4.13: pip install 'layerswap[eval]'"),
    ],
)
def test_another_lm_eval_is_refused(
    finished: Ran, monkeypatch: pytest.MonkeyPatch, found: str | None, told: str
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("orchestrator.distill.measuring.harness.version", version)
    assert told in evaluate(finished, code=2).stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_on_a_device_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    asked: list[Any] = []

    def enough(spec: Any, *_: Any) -> None:
        asked.append(spec)
        raise InterruptedError

    monkeypatch.setattr(evaluating, "accelerators", lambda: 1)
    monkeypatch.setattr(evaluating, "_compute", enough)
    identity = {"tokens": None, "teacher": None, "subject": None, "folder": "f", "numerics": Numerics()}
    question = evaluating.Question((str(TASKS / "choice.yaml"),), None, 1, False, 1, device)
    with pytest.raises(InterruptedError):
        evaluating.evaluate(question, [evaluating.Model("m", identity)], Store(tmp_path), None)
    assert [spec.processor for spec in asked] == [device]
