"""What the command says of other commands."""

from __future__ import annotations

import configparser
import json
import os
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
from orchestrator.record.home import Home
from orchestrator.record.tracking.server import server_environment
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
    for name in ("LAYERSWAP_HOME", "LAYERSWAP_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
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


SECRET = "postgresql://ann:s3/cr@et@db:5432/records?password=two&x=1"


def test_passwords_are_never_told_and_what_the_environment_says_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = "postgresql://ann:***@db:5432/records?password=***&x=1"
    assert commands("report", "--tracking-uri", SECRET)["report"].endswith(f"--tracking-uri '{shown}'")
    assert commands("run", "--tracking-uri", SECRET)["ui"] == shown
    for name in ("MLFLOW_TRACKING_URI", "LAYERSWAP_TRACKING_URI"):
        monkeypatch.setenv(name, SECRET if name.startswith("L") else "http://other")
        told = commands("run")
        assert (told["run"], told["report"]) == ("layerswap run s.yaml", "layerswap report s.yaml")
    assert told["ui"] == shown
    assert commands("run", "--tracking-uri", "home")["ui"] == "make ui STUDY=s.yaml"


def test_mlflows_own_variable_says_where_records_go_unless_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    command = typer.main.get_command(app).commands["report"]  # type: ignore[attr-defined]

    def chosen(*words: str) -> object:
        return command.make_context("report", ["s.yaml", *words]).params["tracking_uri"]

    monkeypatch.delenv("LAYERSWAP_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs")
    assert chosen() == "http://theirs"
    monkeypatch.setenv("LAYERSWAP_TRACKING_URI", "http://ours")
    assert chosen() == "http://ours"
    assert chosen("--tracking-uri", "home") == "home"


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "databricks"])
def test_what_is_no_server_or_database_is_refused_with_where_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    hand = Hand(tmp_path)
    monkeypatch.setattr("orchestrator.record.given.check_files", lambda *_: None)  # there is one document
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    result = CliRunner().invoke(app, ["report", str(hand.file), "--home", str(hand.home.root)])
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"--tracking-uri {uri} (of the environment): no URI of a server or database; write "
    )
    assert result.stderr.endswith("or home for the one in the home\n")


def test_records_go_to_the_terminal_alone_where_their_file_is_called_minus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(tmp_path)
    hand.all_done()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.record.given.check_files", lambda *_: None)  # there is one document
    monkeypatch.setattr("orchestrator.record.driver.report", lambda *_: ([{"swapped": 2}], "the answer"))
    words = ["report", str(hand.file), "--home", str(hand.home.root), "--tracking-uri", "home", "--json"]
    alone = CliRunner().invoke(app, [*words, "-"])
    assert alone.exit_code == 0, alone.output
    told = json.loads(alone.stdout)
    assert told["records"] == [{"swapped": 2}] and told["study"] == "handmade" and not Path("-").exists()
    beside = CliRunner().invoke(app, [*words, "found.json"])
    assert beside.stdout == "the answer\n" and json.loads(Path("found.json").read_text()) == told


def test_the_ui_of_a_home_needs_no_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Path] = []
    monkeypatch.setattr("orchestrator.record.tracking.server.serve", lambda home, *_: served.append(home.root))
    monkeypatch.chdir(tmp_path)
    for home in (tmp_path / "runs", tmp_path / "other"):
        home.mkdir()
        (home / "mlflow.db").touch()
    for words in ([], ["s.yaml"], ["--home", "other"], ["s.yaml", "--home", "other"]):
        assert CliRunner().invoke(app, ["ui", *words]).exit_code == 0
    assert [home.name for home in served] == ["runs", "runs", "other", "other"]


def test_numbers_are_written_as_people_write_them() -> None:
    told = commands("run", "--checkpoint-seconds", "15.0", "--gpus-per-stage", "1e-1")["run"]
    assert told == "layerswap run s.yaml --gpus-per-stage 0.1 --checkpoint-seconds 15"


def test_the_version_is_that_of_the_package_whatever_else_is_asked() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for words in (["--version"], ["--version", "run", "no.yaml"]):
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, done.output) == (0, f"layerswap {stated}\n")


@pytest.mark.parametrize(("word", "offered"), [("ex", ["export"]), ("re", ["regret", "report"]), ("no", [])])
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
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.environ", os.environ.copy())
    commands: list[Sequence[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: commands.append(command))
    return commands


def test_the_ui_serves_the_database_of_a_home_that_is_named_from_here(ui: list[Sequence[str]], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["ui", "s.yaml", "--home", "home"]).exit_code == 0
    (command,) = ui
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert command[command.index("--default-artifact-root") + 1] == f"file://{tmp_path}/home/mlartifacts"
    assert Path.cwd() == tmp_path / "home"
    # One process that runs no jobs: more of them never answer beside a study that keeps all cores busy.
    assert command[command.index("--workers") + 1] == "1"
    assert os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--app-name" not in command


def test_the_ui_for_others_warns_and_answers_to_the_names_of_the_machine(
    ui: list[Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "node7")
    result = CliRunner().invoke(app, ["ui", "s.yaml", "--home", "home", "--host", "0.0.0.0", "--port", "5999"])
    assert result.stderr.startswith("warning: --host 0.0.0.0: whoever reaches port 5999 may read, change and delete")
    assert result.stdout == (
        "MLflow UI on http://node7:5999/#/experiments?workflowType=machine_learning (Ctrl-C ends it)\n"
    )
    assert {"node7:5999", "localhost:5999"} <= set(os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    assert "http://node7:5999" in os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS")
    told = server_environment(Home(tmp_path), "10.1.2.3", 5998, auth=False)
    assert told["MLFLOW_SERVER_ALLOWED_HOSTS"] == "localhost:5998,127.0.0.1:5998,[::1]:5998,10.1.2.3:5998"
    assert told["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"]  # was set


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_the_ui_for_this_machine_warns_of_nothing(ui: list[Sequence[str]], host: str) -> None:
    result = CliRunner().invoke(app, ["ui", "s.yaml", "--home", "home", "--host", host])
    assert (result.exit_code, result.stderr, len(ui)) == (0, "", 1)
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ


def test_the_ui_with_a_password(ui: list[Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["ui", "s.yaml", "--home", "home", "--host", "0.0.0.0", "--auth"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, ui) == (2, [])
    assert result.stderr == "--auth needs an extra of MLflow: pip install 'layerswap[auth]'\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert ui[0][-2:] == ["--app-name", "basic-auth"]
    password = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert len(password) >= 12 and f"user admin, password {password} (told this once" in result.stdout
    assert len(os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"]) == 64
    told = configparser.ConfigParser()
    told.read(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
    assert told["mlflow"]["database_uri"] == f"sqlite:///{tmp_path}/home/mlflow-auth.db"
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD")
    (tmp_path / "home" / "mlflow-auth.db").touch()  # as MLflow makes it, with the administrator in it
    monkeypatch.chdir(tmp_path)
    assert "password" not in CliRunner().invoke(app, words).stdout
    assert "MLFLOW_AUTH_ADMIN_PASSWORD" not in os.environ


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


def test_the_log_of_a_stage_is_printed_and_what_names_none_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.record.given.check_files", lambda *_: None)  # there is one document
    hand = Hand(tmp_path)
    hand.attempt(hand.key("two 0"))
    (hand.store.folder(hand.key("two 0")) / "log.txt").write_text("a warning\n")

    def log(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["log", str(hand.file), *words, "--home", str(hand.home.root)])
        return result.exit_code, (result.stderr or result.stdout).splitlines()[-1]

    assert log() == log("trial-00:1") == log(hand.key("two 0")[:8]) == (0, "a warning")
    assert log("trial-05:1") == (2, "trial-05:1: trial-05 is no trial: the study has trial-00 to trial-02")
