"""What the command says of other commands."""

from __future__ import annotations

import pytest
import typer

from orchestrator.cli import app
from orchestrator.record.commands import commands_of

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


def test_numbers_are_written_as_people_write_them() -> None:
    told = commands("run", "--checkpoint-seconds", "15.0", "--gpus-per-stage", "1e-1")["run"]
    assert told == "layerswap run s.yaml --gpus-per-stage 0.1 --checkpoint-seconds 15"
