"""Where a home's things lie, and who uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.record.home import Home, default_home


def test_everything_lies_below_the_root(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.store == tmp_path / "store"
    assert home.study("smoke") == tmp_path / "studies" / "smoke"
    assert home.tracking_uri == home.database == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    assert home.artefacts == f"file://{tmp_path.resolve()}/mlartifacts"


@pytest.mark.parametrize("uri", ["http://there:5000", "https://there"])
def test_a_server_keeps_files_where_it_likes(tmp_path: Path, uri: str) -> None:
    home = Home(tmp_path, uri)
    assert home.tracking_uri == uri and home.database.startswith("sqlite:///")
    assert home.artefacts is None


def test_a_database_of_the_user_has_its_files_beside_the_store(tmp_path: Path) -> None:
    assert Home(tmp_path, "sqlite:///elsewhere.db").artefacts == f"file://{tmp_path.resolve()}/mlartifacts"


def test_a_home_is_used_as_long_as_a_run_goes_on(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert not home.used  # nobody ever ran here
    with home.in_use():
        assert home.used
        with home.in_use():  # two may run at a time
            assert home.used
        assert home.used
    assert not home.used


def test_the_kernel_takes_the_use_of_a_killed_run_back(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.record.home import Home\n"
        "with Home(Path(sys.argv[1])).in_use(): print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "here\n"
    assert Home(tmp_path).used
    run.kill()
    run.communicate()
    assert not Home(tmp_path).used


@pytest.mark.parametrize("marker", [".git", "pyproject.toml"])
def test_the_default_is_beside_the_studies_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str
) -> None:
    inner = tmp_path / "repository" / "studies" / "mine"
    inner.mkdir(parents=True)
    (tmp_path / "repository" / marker).mkdir()
    monkeypatch.chdir(tmp_path)
    assert default_home(inner / "s.yaml") == tmp_path.resolve() / "repository" / "runs"
    (inner / marker).mkdir()  # the nearest one
    assert default_home(inner / "s.yaml") == inner.resolve() / "runs"


def test_outside_of_any_repository_it_is_beside_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # whatever lies above the tests' own directory
    assert default_home(Path("/far/away/s.yaml")) == Path("/far/away/runs")
    assert default_home(Path("s.yaml")) == tmp_path.resolve() / "runs"
