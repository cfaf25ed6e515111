"""What dead runs leave is named with a remedy, a fix takes what is surely safe, and gc frees exactly what it lists."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.files import write_json
from orchestrator.record.home import Home
from orchestrator.run import temporary as module
from orchestrator.run.holder import myself
from orchestrator.run.store import Store
from orchestrator.run.temporary import temporary_directory
from tests.computed import computed

STUDY = """\
study: tiny
teacher: {kind: pretrain, layers: 2, hidden: 32, heads: 4, max_length: 64, tokens: 512, batch_size: 4}
data: {train: {source: text, files: ["text/*.txt"]}, validation_share: 0.3, sequence_length: 32, vocabulary: 300}
operator: {kind: hyena, heads: 4}
schedule: {layers_per_stage: 1}
recipe: {batch_size: 2, phases: [{tokens: 256, losses: {kl: 1.0}}]}
evaluation: {tokens: 256, prompts: 1, prompt_tokens: 8, new_tokens: 4}
throughput: {lengths: [32], decode_tokens: 4, repeats: 1}
controls: {skip: false, scratch: none}
"""
DEAD = 2**22 + 1  # no process has this number: it is above the kernel's highest
KEY = "ab" + "0" * 62
OLD = 1_000_000_000.0


def layerswap(*given: str) -> Result:
    return CliRunner().invoke(app, list(given))


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study and of its home `home`, in which it ran to the end."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text").mkdir()
    for index in range(12):
        (folder / "text" / f"{index}.txt").write_text(f"text {index} of some that are alike\n" * 30)
    (folder / "tiny.yaml").write_text(STUDY)
    computed(folder / "tiny.yaml", folder / "home")
    ran = layerswap("run", str(folder / "tiny.yaml"), "--home", str(folder / "home"))
    assert ran.exit_code == 0, ran.output
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary directories of this test alone, so that those of others on this machine do not show."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(module, "FALLBACKS", ())
    monkeypatch.setattr(module, "LONGEST", 1000)
    yield folder
    monkeypatch.undo()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with an empty store."""
    Store(tmp_path / "home" / "store")
    return Home(tmp_path / "home")


def stage(home: Home, key: str = KEY, **attempt: object) -> Path:
    """A stage that was begun."""
    folder = Store(home.store).folder(key)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text("{}")
    (folder / "lock").touch()
    write_json(folder / "attempt.json", {"pid": DEAD, "host": platform.node(), "started": time.time(), **attempt})
    return folder


def old(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (OLD, OLD))


def publish(folder: Path) -> None:
    (folder / "artefacts").mkdir()
    (folder / "artefacts" / "a").write_text("")
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    write_json(folder / "DONE.json", {"kind": "tokens", "result": {}, "seconds": 1.0, "files": {"a": digest}})


def doctor(home: Home, *given: str) -> Result:
    return layerswap("doctor", "--home", str(home.root), *given)


def needs_a_look(home: Home, said: str, remedy: str) -> None:
    """The finding is told with its remedy, the code is 1, and looking changed nothing."""
    before = listing(home.root)
    told = doctor(home)
    assert told.exit_code == 1, told.output
    assert said in told.stdout and remedy in told.stdout
    assert listing(home.root) == before


def is_fixed(home: Home, code: int = 0) -> None:
    assert doctor(home, "--fix").exit_code == code
    assert doctor(home).exit_code == code


def test_a_finished_study_is_healthy_and_has_nothing_left_to_plan(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    before = listing(finished)
    told = layerswap("doctor", "tiny.yaml", "--home", "home")
    assert told.exit_code == 0, told.stdout
    assert told.stdout == "healthy\n"
    assert "to do: nothing" in layerswap("plan", "tiny.yaml", "--home", "home").stdout
    assert listing(finished) == before


def test_a_plan_estimates_from_the_rates_of_its_store(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    change = ("--set", "recipe.phases.0.tokens=512", "--set", "controls.scratch=own")
    summary = json.loads(layerswap("plan", "tiny.yaml", "--home", "home", "--json", *change).stdout)
    assert (summary["distinct"], summary["done"], summary["tokens_to_train"]) == (2, 0, 2048)
    cost = summary["estimate"]
    assert all(work >= wall > 0 for work, wall in zip(cost["unit_seconds"], cost["wall_seconds"], strict=True))
    assert cost["megabytes"][0] > 0
    assert (cost["near"], cost["unknown"]) == (["scratch"], [])
    told = layerswap("plan", "tiny.yaml", "--home", "home", *change).stdout
    assert "to do: 2048 tokens to train; about" in told and "losses or lengths: scratch)" in told


def test_mlflow_runs_that_say_running_while_nobody_runs(finished: Path) -> None:
    home = Home(finished / "home")
    client = MlflowClient(tracking_uri=home.database)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name="zombie").info.run_id
    with home.in_use():
        assert doctor(home).exit_code == 0
    needs_a_look(home, f"MLflow run zombie ({run[:8]}) says RUNNING while nobody runs here", "marks it KILLED")
    is_fixed(home)
    assert client.get_run(run).info.status == "KILLED"


def test_gc_frees_exactly_what_it_lists(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    home = Home(finished / "home")
    store = Store(home.store)
    kept = {*store.all_keys()}
    strange = [f"{index:02d}" + "f" * 62 for index in range(4)]
    for key in strange:
        stage(home, key)
        (store.folder(key) / "work" / "step-1").mkdir(parents=True)
        (store.folder(key) / ".artefacts.1234.tmp").mkdir()
        (store.folder(key) / "work" / "step-1" / "w").write_bytes(b"x" * 2**20)
    publish(store.folder(strange[0]))
    (store.folder(strange[1]) / "spec.json").unlink()  # torn
    with FileLock(store.folder(strange[2]) / "lock"):
        before = listing(finished)
        dry = layerswap("gc", "tiny.yaml", "--home", "home")
        assert listing(finished) == before
        deleted = layerswap("gc", "tiny.yaml", "--home", "home", "--delete")
    assert dry.exit_code == deleted.exit_code == 0
    assert "4 stages that no given study needs, 3.0 MB would be freed by --delete" in dry.stdout
    assert "4 stages that no given study needs, 3.0 MB freed" in deleted.stdout
    for told in (dry, deleted):
        assert told.stdout.count("stays: it is being computed") == 1
    assert {*store.all_keys()} == kept | {strange[2]}
    assert layerswap("doctor", "tiny.yaml", "--home", "home").exit_code == 1  # the one that was being computed
    layerswap("gc", "tiny.yaml", "--home", "home", "--delete")
    assert {*store.all_keys()} == kept
    assert layerswap("doctor", "tiny.yaml", "--home", "home").stdout == "healthy\n"


def test_gc_keeps_the_parents_of_what_is_left_to_do(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    store = Store(Home(finished / "home").store)
    last = [key for key in store.all_keys() if store.done(key)["kind"] == "evaluate"]
    manifests = {key: (store.folder(key) / "DONE.json").read_text() for key in last}
    for key in last:
        (store.folder(key) / "DONE.json").unlink()  # nothing asks for its parents but the plan
    assert "0 stages that no given study needs" in layerswap("gc", "tiny.yaml", "--home", "home", "--delete").stdout
    for key, text in manifests.items():
        (store.folder(key) / "DONE.json").write_text(text)


def test_a_stage_begun_by_a_dead_process(home: Home) -> None:
    folder = stage(home)
    (folder / "work").mkdir()
    needs_a_look(home, f"was begun by process {DEAD} on {platform.node()}, which is dead", "run its study again")
    is_fixed(home, code=1)
    assert (folder / "work").is_dir()  # its checkpoint is worth more than its room


def test_a_stage_begun_by_a_process_whose_number_another_has_now(home: Home) -> None:
    stage(home, pid=os.getpid(), started=OLD)
    needs_a_look(home, "which is dead", "run its study again")


def test_a_stage_of_a_living_process_is_healthy(home: Home) -> None:
    folder = stage(home, pid=os.getpid())
    assert doctor(home).stdout == "healthy\n"
    with FileLock(folder / "lock"):
        told = doctor(home)
    assert told.exit_code == 0
    assert f"is being computed by process {os.getpid()} on {platform.node()}" in told.stdout


def test_a_lease_of_a_dead_process(home: Home) -> None:
    """With the right to compute held by a file that is renewed, which stays where its holder is killed."""
    folder = stage(home)
    dead = {**myself(), "birth": "another's"}
    write_json(folder / "lease.json", {"owner": "o", "counter": 3, "ttl": 1e6, "holder": dead})
    left = f"has a lease that process {DEAD} on {platform.node()} does not renew any more"
    needs_a_look(home, left, "`layerswap doctor --fix` removes it")
    assert "which is dead" in doctor(home).stdout  # the stage is told of as well
    assert doctor(home, "--fix").exit_code == 1
    assert not (folder / "lease.json").exists()
    assert left not in doctor(home).stdout
    write_json(folder / "lease.json", {"owner": "o", "counter": 3, "ttl": 1e6, "holder": myself()})
    told = doctor(home, "--fix")
    assert told.exit_code == 0 and "is being computed by process" in told.stdout
    assert (folder / "lease.json").exists()


def test_files_by_which_a_dead_run_told_its_processes_something(home: Home) -> None:
    marks = [home.store / name for name in ("stop-1a2b3c4d", ".seen-77")]
    for path in marks:
        path.touch()
    assert doctor(home).exit_code == 0  # young: their run may be about to say that it is there
    old(*marks)
    with home.in_use():
        assert doctor(home, "--fix").stdout == "healthy\n"
    needs_a_look(home, f"{marks[0]} was left by a dead run", "`layerswap doctor --fix` removes it")
    assert "2 need attention" in doctor(home).stdout
    is_fixed(home)
    assert not any(path.exists() for path in marks)


def test_a_stage_that_failed_is_no_leftover(home: Home) -> None:
    write_json(stage(home) / "failure.json", {"error": "a reason"})
    assert doctor(home).exit_code == 0


def test_a_torn_stage_directory(home: Home) -> None:
    folder = stage(home)
    (folder / "spec.json").unlink()
    assert doctor(home).exit_code == 0  # somebody may be about to write it
    old(folder)
    needs_a_look(home, "has a directory without spec.json: torn", "`layerswap doctor --fix` removes it")
    is_fixed(home)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["out", "out-1a2b3c4d", "work"])
def test_what_a_finished_stage_left_beside_its_artefacts(home: Home, name: str) -> None:
    folder = stage(home)
    publish(folder)
    (folder / name).mkdir()
    needs_a_look(home, f"left {name}/, which nobody reads", "`layerswap doctor --fix` removes it")
    published = listing(folder / "artefacts")
    with FileLock(folder / "lock"):
        doctor(home, "--fix")
    assert (folder / name).exists()
    is_fixed(home)
    assert not (folder / name).exists() and (folder / "DONE.json").exists()
    assert listing(folder / "artefacts") == published


def test_a_finished_stage_that_is_not_what_was_published(home: Home) -> None:
    folder = stage(home)
    publish(folder)
    assert doctor(home).exit_code == 0
    (folder / "artefacts" / "a").write_text("flipped")
    needs_a_look(home, "is finished but its a is damaged or gone", "run its study again")
    before = listing(folder)
    is_fixed(home, code=1)
    assert listing(folder) == before


def test_files_that_were_not_written_to_their_end(home: Home) -> None:
    folder = stage(home, pid=os.getpid())
    torn = [folder / ".spec.json.12345678.tmp", home.root / ".runs.json.12345678.tmp", folder / ".step-1.1.tmp"]
    torn[0].touch()
    torn[1].touch()
    torn[2].mkdir()
    (torn[2] / ".inner.1.tmp").touch()
    assert doctor(home).exit_code == 0  # young: their writer may live
    old(torn[2] / ".inner.1.tmp", *torn)
    needs_a_look(home, f"{torn[0]} was not written to its end", "`layerswap doctor --fix` removes it")
    assert "3 need attention" in doctor(home).stdout
    is_fixed(home)
    assert not any(path.exists() for path in torn)


def test_a_temporary_directory_and_its_processes_of_a_dead_run(home: Home, temporary: Path) -> None:
    strange = temporary / "layerswap-mine"  # by its name alone it is nobody's
    strange.mkdir()
    dead = temporary / "layerswap-ray-dead"
    dead.mkdir()
    (dead / "owner.lock").touch()
    sleep = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(99)"]
    orphan = subprocess.Popen([*sleep, f"--temp_dir={dead}"], stdout=subprocess.PIPE)
    other = subprocess.Popen([*sleep, f"--temp_dir={dead}-of-another"], stdout=subprocess.PIPE)
    try:
        for process in (orphan, other):
            assert process.stdout is not None and process.stdout.readline()
        with temporary_directory("ray") as living:
            needs_a_look(home, f"{dead} was left by a dead run, and processes {orphan.pid} of it still run", "--fix")
            assert "1 need attention" in doctor(home).stdout
            assert doctor(home, "--fix").exit_code == 0
            assert living.is_dir()
        assert not psutil.pid_exists(orphan.pid)
        assert other.poll() is None
        assert not dead.exists() and strange.exists()
        assert not living.exists()
    finally:
        for process in (orphan, other):
            process.kill()
            process.communicate()


def test_a_stage_that_the_study_does_not_need_is_told_so(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"a text of {name}\n" * 20)
    (tmp_path / "tiny.yaml").write_text(STUDY)
    stage(home)
    needed = json.loads(layerswap("plan", "tiny.yaml", "--home", str(home.root), "--json").stdout)["tree"][0]["key"]
    stage(home, needed)
    told = doctor(home, "tiny.yaml").stdout
    assert "not of this study: `layerswap gc STUDY... --delete` frees" in told
    assert "`layerswap run` of this study goes on from what is whole" in told
