"""What the command says of other commands."""

from __future__ import annotations

import sqlite3
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.files import published_directory
from orchestrator.record.commands import commands_of
from tests.record.handmade import Hand

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--set", "a=b c", "--set", "d=1", "--device", "cuda", "--gpus-per-stage", "0.25", "--claims", "lease"]
PLACE = "s.yaml --set 'a=b c' --set d=1 --home 'my home'"


def commands(name: str, *options: str) -> dict[str, str]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return commands_of(command.make_context(name, ["s.yaml", *options]))


def test_the_commands_that_follow_have_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSWAP_HOME", "my home")
    assert commands("run", *OPTIONS) == {
        "run": f"layerswap run {PLACE} --device cuda --gpus-per-stage 0.25 --claims lease",
        "report": f"layerswap report {PLACE}",
        "export": f"layerswap export {PLACE}",
        "ui": "layerswap ui s.yaml --home 'my home'",
    }


def test_where_only_the_study_was_given_they_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAYERSWAP_HOME", raising=False)
    told = commands("report", "--tracking-uri", "http://here:5000")
    assert told["report"] == "layerswap report s.yaml --tracking-uri http://here:5000"
    assert told["ui"] == "http://here:5000"
    assert commands("run") == {
        "run": "layerswap run s.yaml",
        "report": "layerswap report s.yaml",
        "export": "layerswap export s.yaml",
        "ui": "make ui STUDY=s.yaml",
    }
    assert commands("evaluate", "--tasks", "a,b") == {
        "evaluate": "layerswap evaluate s.yaml --tasks a,b",
        "report": "layerswap report s.yaml",
        "export": "layerswap export s.yaml",
        "ui": "make ui STUDY=s.yaml",
    }


def test_numbers_are_written_as_people_write_them() -> None:
    told = commands("run", "--checkpoint-seconds", "15.0", "--gpus-per-stage", "1e-1")["run"]
    assert told == "layerswap run s.yaml --gpus-per-stage 0.1 --checkpoint-seconds 15"


def test_the_version_is_that_of_the_package_whatever_else_is_asked() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for words in (["--version"], ["--version", "run", "no.yaml"]):
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, done.output) == (0, f"layerswap {stated}\n")


@pytest.mark.parametrize(("word", "offered"), [("ex", ["export"]), ("re", ["report"]), ("no", [])])
def test_a_shell_completes_the_commands(word: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LAYERSWAP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"layerswap {word}")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = CliRunner().invoke(app, [], prog_name="layerswap")
    assert done.output.split() == offered


@pytest.fixture
def ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """A working directory with a home of that name; gets the commands that take the place of this process."""
    (tmp_path / "home").mkdir()
    with sqlite3.connect(tmp_path / "home" / "mlflow.db") as database:
        database.execute("CREATE TABLE experiments (name, artifact_location)")
    monkeypatch.chdir(tmp_path)
    commands: list[Sequence[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: commands.append(command))
    return commands


def test_the_ui_serves_the_database_of_a_home_that_is_named_from_here(ui: list[Sequence[str]], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["ui", "s.yaml", "--home", "home"]).exit_code == 0
    (command,) = ui
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert command[command.index("--default-artifact-root") + 1] == f"file://{tmp_path}/home/mlartifacts"
    assert Path.cwd() == tmp_path / "home"


def test_the_ui_of_what_is_no_database_says_so_in_a_line(ui: list[Sequence[str]], tmp_path: Path) -> None:
    (tmp_path / "home" / "mlflow.db").write_bytes(b"no database at all, but as long as one" * 100)
    result = CliRunner().invoke(app, ["ui", "s.yaml", "--home", "home"])
    assert (result.exit_code, ui) == (2, [])
    assert (
        result.stderr
        == "home/mlflow.db cannot be read (file is not a database): `layerswap doctor` says what to do about it\n"
    )


def refused(hand: Hand, to: Path) -> str:
    """What an export of the best student says that is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.record.given.check_files", lambda *_: None)  # there is one document
        words = ["export", str(hand.file), "--home", str(hand.home.root), "--to", str(to)]
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    return result.stderr.strip()


@pytest.mark.parametrize("name", ["two joint", "teacher"])
def test_an_export_of_what_is_damaged_says_what_computes_it_again(tmp_path: Path, name: str) -> None:
    hand = Hand(tmp_path)
    hand.all_done()
    key = hand.key(name)
    hand.write(hand.steps[name].train, {}, files={"weights": b"as they were"})
    (hand.store.artefacts(key) / "weights").write_bytes(b"as they are")
    told = f"stage {key[:16]}: weights is damaged or gone: run the study again, which computes it"
    assert refused(hand, tmp_path / "out") == told
    assert not (tmp_path / "out").exists()


def test_an_export_to_where_nothing_can_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(student: Path, teacher: Path, tokenizer: Path, target: Path, *_: str) -> None:
        with published_directory(target):
            pass

    monkeypatch.setattr("orchestrator.distill.models.export.export_student", write)
    monkeypatch.setattr("orchestrator.distill.models.export.swapped_layers", lambda _: [0, 1])  # files were not written
    hand = Hand(tmp_path)
    hand.all_done()
    to = hand.file / "in a file" / "out"
    assert refused(hand, to) == f"--to {to} cannot be written (Not a directory): give another folder"
