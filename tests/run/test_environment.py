"""A run does not depend on where and in what environment it is started: modules, variables, directories, homes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.run import temporary
from orchestrator.run.environment import own_instance, own_process, paths_of_workers
from orchestrator.run.temporary import TemporaryError, abandoned_directories, temporary_directory, temporary_root

ROOT = Path(__file__).resolve().parents[2]
TINY = """\
study: tiny
teacher: {kind: pretrain, layers: 1, hidden: 32, heads: 4, max_length: 64, tokens: 512, batch_size: 2}
data:
  train: {source: jsonl, files: ["in/*.jsonl"]}
  validation: {source: parquet, files: [valid.parquet]}
  sequence_length: 16
  vocabulary: 300
operator: {kind: hyena, order: 2}
recipe: {batch_size: 2, phases: [{tokens: 128, losses: {kl: 1.0}}]}
evaluation: {tokens: 256, batch_size: 4, prompts: 4, prompt_tokens: 8, new_tokens: 8}
throughput: {lengths: [32], decode_tokens: 4, repeats: 1}
controls: {skip: false, scratch: none}
"""
# Names that the program imports, and that a user may have given to files of theirs.
NAMES = ("datasets", "tokenizers", "transformers", "psutil", "ray", "mlflow", "utils", "guard", "numpy")
TRAP = "raise SystemExit('a module of the working directory was imported')\n"
OTHERS = {
    "HOME": "/proc/nobody",  # cannot be written
    "RAY_ADDRESS": "127.0.0.1:9",
    "RAY_NAMESPACE": "another",
    "RAY_RUNTIME_ENV_HOOK": "no.such.hook",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": "{not json",
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 0}',
    "RAY_TMPDIR": "/proc/nobody",
    "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_EXPERIMENT_NAME": "another",
    "MLFLOW_RUN_ID": "0" * 32,
    "OMP_NUM_THREADS": "3",
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "PYTHONWARNINGS": "error",
    "PYTHONHASHSEED": "7",
}


def test_a_command_begins_without_what_a_users_file_could_stand_for() -> None:
    """The directory of the command is taken off the path before any of these is imported."""
    look = f"import sys, orchestrator.cli; print(*sorted(set({NAMES}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_in_an_odd_place_is_a_run_like_any_other(tmp_path: Path) -> None:
    """One run with every oddity at once: each of them alone once ended in a traceback, or left MLflow empty."""
    import pyarrow
    import pyarrow.parquet

    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(TRAP)
    for package in ("operators", "orchestrator", "orchestrator/run"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(TRAP)
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"text": f"the {i}th text is about {i * i} rivers and birds\n", "id": i}) for i in range(60)]
    (tmp_path / "in" / "part[0].jsonl").write_text("\n".join(rows[:30]))
    (tmp_path / "in" / "part?*.jsonl").write_text("\n".join(rows[30:]).replace('"id": 4', '"more": null, "id": 4'))
    texts = pyarrow.table({"text": [f"a text of {i} birds and {i + 1} stones\n".encode() for i in range(60)]})
    pyarrow.parquet.write_table(texts, tmp_path / "valid.parquet")
    (tmp_path / "tiny.yaml").write_text(TINY)
    long = tmp_path / "a directory for temporary files that is much too long é"
    long.mkdir()
    home = tmp_path / "h?x #%41 é"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.cli", "run", "tiny.yaml", "--home", home.name],
        capture_output=True, text=True, cwd=tmp_path, timeout=280,
        env={**os.environ, **OTHERS, "TMPDIR": str(long), "PYTHONPATH": f"{ROOT}::"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "MLflow" not in done.stderr
    assert (home / "studies" / "tiny" / "newest" / "report.md").is_file()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("h")} == {home.name}
    import sqlite3

    with sqlite3.connect(home / "mlflow.db") as database:
        runs = database.execute("SELECT status FROM runs").fetchall()
        place = database.execute("SELECT artifact_location FROM experiments WHERE name = 'tiny'").fetchone()[0]
    assert len(runs) == 4 and set(runs) == {("FINISHED",)}
    assert place == (home / "mlartifacts" / "tiny").as_uri()
    assert list(home.glob("mlartifacts/tiny/*/artifacts/*/report.md"))
    assert not list(long.glob("layerswap-*"))


def test_modules_of_the_working_directory_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = str(tmp_path / "other")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), ".", other, *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", other, ".", str(tmp_path)]))
    own_process()
    assert sys.path[0] == other
    assert os.environ["PYTHONPATH"] == other


def test_warnings_that_the_user_made_errors_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error")
        own_process()
        warnings.warn("of a library", DeprecationWarning, stacklevel=1)
        warnings.warn("of a user", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["of a user"]
    assert "PYTHONWARNINGS" not in os.environ


def test_the_program_itself_may_be_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = ["", *sys.path]
    monkeypatch.setattr(sys, "path", list(before))
    own_process()
    assert sys.path == before
    assert paths_of_workers() == [str(ROOT)]


def test_an_instance_of_our_own_knows_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTHERS:
        monkeypatch.setenv(name, "another")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # how Ray works is the user's to say
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "another")
    before = dict(os.environ)
    with own_instance():
        left = {name for name in os.environ if name.startswith("RAY_") and os.environ[name] == "another"}
        assert left == set()
        assert os.environ["RAY_memory_monitor_refresh_ms"] == "0"  # noqa: SIM112
    assert dict(os.environ) == before


def test_an_instance_of_our_own_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that nobody can guess, one for all instances of the process, and services on the loopback interface."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    tokens = []
    for _ in range(2):
        with own_instance():
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
            assert "RAY_AUTH_MODE" not in os.environ  # Ray asks for the token where nothing is said
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert tokens[0] == tokens[1] and len(tokens[0]) == 64
    other = "from orchestrator.run.environment import _token; print(_token())"
    told = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(told.stdout.strip()) == 64 and told.stdout.strip() != tokens[0]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_need_not_know_every_sign(tmp_path: Path, encoding: str) -> None:
    words = ["plan", str(ROOT / "studies" / "smoke.yaml"), "--home", str(tmp_path / "é→home")]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *words], cwd=ROOT, capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?? hyena" in done.stdout  # two signs of the tree


def test_the_guard_imports_nothing_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("psutil.py", "guard.py", "signal.py"):
        (tmp_path / name).write_text(TRAP)
    (tmp_path / "ours").mkdir()
    code = "from orchestrator.run.guard import guarded\nwith guarded('ours'): pass"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("system", "most"), [("linux", 107), ("darwin", 103)])
def test_the_longest_path_of_a_socket_is_the_systems(monkeypatch: pytest.MonkeyPatch, system: str, most: int) -> None:
    monkeypatch.setattr(sys, "platform", system)
    found = runpy.run_path(str(temporary.__file__))
    assert found["LONGEST"] == most - len(found["DEEPEST"])


@pytest.mark.parametrize("name", ["x" * 60, "é", "a b", "50%", "a'b", "a#b"])
def test_temporary_files_go_where_ray_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    odd, short = tmp_path / name, tempfile.mkdtemp(prefix="s", dir="/tmp")
    odd.mkdir()
    monkeypatch.setattr(temporary, "LONGEST", 1000 if len(name) < 60 else temporary.LONGEST)
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    monkeypatch.setattr(temporary, "FALLBACKS", ("/proc/nobody", short))
    try:
        with temporary_directory("ray") as folder:
            assert str(folder.parent) == short
            assert len(f"{folder}/session_2026-11-29_08-27-19_123456_4194304/sockets/plasma_store") <= 107
            (Path(short) / "layerswap-dead").mkdir()
            (Path(short) / "layerswap-dead" / "owner.lock").touch()
            assert [path.name for path in abandoned_directories()] == ["layerswap-dead"]
        (Path(short) / "layerswap-dead" / "owner.lock").unlink()
        (Path(short) / "layerswap-dead").rmdir()
        assert not list(Path(short).iterdir())
    finally:
        Path(short).rmdir()
    monkeypatch.setattr(temporary, "FALLBACKS", ("/proc/nobody",))
    with pytest.raises(TemporaryError, match=r"^TMPDIR .* cannot hold Ray's sockets .* set TMPDIR to a short one$"):
        temporary_root()


def test_temporary_files_go_where_the_user_says_if_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        assert temporary_root() == short


def refused(folder: Path, *words: str) -> str:
    """What a run says that is refused before it writes anything."""
    (folder / "tiny.yaml").write_text(TINY.replace("in/*.jsonl", "a.jsonl").replace("validation:", "# validation:"))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} birds and rivers\n"}) + "\n" for i in range(60)))
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, ["run", str(folder / "tiny.yaml"), "--home", str(folder / "home"), *words])
    assert done.exit_code == 2, done.output
    assert sorted(folder.rglob("*")) == before
    return done.stderr


def test_no_place_for_sockets_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "FALLBACKS", ())
    assert refused(tmp_path).startswith(f"TMPDIR {tmp_path} cannot hold Ray's sockets (more than 2")


@pytest.mark.parametrize("given", ["nonsense", "ray://h:1", "127.0.0.1:9"])
def test_the_address_of_the_environment_is_looked_at_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    told = refused(tmp_path, "--ray-address", "auto")
    if given == "127.0.0.1:9":
        assert "no Ray cluster answers" in told and given in told
    else:
        assert told.startswith(f"--ray-address auto (RAY_ADDRESS={given}) is no address: give host:port")
