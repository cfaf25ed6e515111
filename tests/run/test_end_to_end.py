"""A small study through the command line, as a user runs it: once, again, edited, killed and resumed.

What a study asks for first, and what is killed, runs in processes of its own, as a user's does. What follows runs in
this one, on one cluster, whose workers have loaded everything already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.distill.context import newest_step
from orchestrator.record import driver
from orchestrator.run import sweep
from orchestrator.run.cluster import Cluster, Node, connected
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "run" / "small.yaml"
pytestmark = pytest.mark.ray


def layerswap(home: Path, *words: str, study: Path = SMALL) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in a process of its own, and return it with its output."""
    done = subprocess.run(command(home, *words, study=study), capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def command(home: Path, *words: str, study: Path = SMALL) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", words[0], str(study), "--home", str(home), *words[1:]]


def here(home: Path, *words: str, study: Path = SMALL, check: int = 0) -> Result:
    """The command in this process; `check` is the exit code it must have."""
    done = CliRunner().invoke(app, command(home, *words, study=study)[3:])
    assert done.exit_code == check, done.output[-3000:]
    return done


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, ...]]:
    """A cluster in this process."""
    with connected(Cluster(cpus=2, gpus=0)) as found:
        yield found


@pytest.fixture
def on_cluster(nodes: tuple[Node, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process are on that cluster, which outlives them."""

    @contextmanager
    def already(_: Cluster) -> Iterator[tuple[Node, ...]]:
        yield nodes

    monkeypatch.setattr(sweep, "connected", already)


def records(home: Path, *words: str, study: Path = SMALL) -> dict[str, Any]:
    path = home / "out.json"
    here(home, "report", "--json", str(path), *words, study=study)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def weights(home: Path) -> dict[str, bytes]:
    """Stage key -> bytes of the saved student."""
    found = home.glob("store/*/*/artefacts/*.safetensors")
    return {path.parts[-3]: path.read_bytes() for path in found}


def quality(home: Path) -> dict[str, dict[str, float]]:
    """Key of each evaluation -> its metrics."""
    manifests = [json.loads(path.read_text()) for path in home.glob("store/*/*/DONE.json")]
    return {m["key"]: m["result"] for m in manifests if m["kind"] == "evaluate"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the study ran to its end."""
    home = tmp_path_factory.mktemp("home")
    done = layerswap(home, "run")
    assert "Traceback" not in done.stdout + done.stderr
    assert "MLflow is behind" not in done.stderr
    return home


def test_report_has_every_row_and_number(finished: Path) -> None:
    told = records(finished)
    rows = told["records"]
    assert told["study"] == "small"
    assert [row["kind"] for row in rows].count("teacher") == 1
    assert {row["name"] for row in rows if row["kind"] == "control"} == {
        "scratch hyena-2", "scratch hyena-4h", "skip 0", "skip 1", "skip 2", "skip all",
    }  # fmt: skip
    stages = [row for row in rows if row["kind"] == "stage"]
    assert len(stages) == 9
    for row in stages:
        assert {"trial", "stage_index", "stage_count", "swapped_layers", "total_layers", "values", "stage_key"} <= {
            *row
        }
    for row in rows:
        assert row["run_id"], row["name"]
        assert not row["reused"]
        wanted = {
            "perplexity", "perplexity_ratio", "accuracy", "agreement", "kl", "hit_nll", "miss_nll", "student_tokens",
            "train_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio",
            "parameters",
        }  # fmt: skip
        assert wanted <= set(row["metrics"]), row["name"]
        assert set(row["metrics"]["prefill_ratio"]) == {"64", "128"}
    teacher = rows[0]["metrics"]
    assert teacher["perplexity_ratio"] == 1 and teacher["agreement"] == 1 and teacher["kl"] == 0


def test_second_run_trains_nothing_and_is_quick(finished: Path) -> None:
    before = weights(finished)
    times = {path: path.stat().st_mtime for path in finished.glob("store/*/*/DONE.json")}
    here(finished, "run")
    assert weights(finished) == before
    assert {path: path.stat().st_mtime for path in finished.glob("store/*/*/DONE.json")} == times
    told = records(finished)
    assert told["run"]["runs"] == 2  # and what the first one trained is the study's own still
    assert {row["stage_key"] for row in told["records"] if not row["reused"]} == set(told["run"]["trained"])


@pytest.mark.slow
@pytest.mark.usefixtures("on_cluster")
def test_edited_last_stage_trains_only_what_depends_on_it(finished: Path) -> None:
    before = set(weights(finished))
    change = ("--set", "search.space.1={recipe.joint.0.losses: [{kl: 1.0, ce: 0.25}]}")
    here(finished, "run", *change)
    fresh = set(weights(finished)) - before
    every = records(finished, *change)["records"]
    rows = [row for row in every if row["stage_key"] in fresh]
    assert {(row["name"], row["stage_index"]) for row in rows} == {("trial-01 joint", 2)}
    assert [row["reused"] for row in every] == [row["stage_key"] not in fresh for row in every]
    assert len(fresh) == 1


def test_mlflow_nests_study_trial_and_stage_without_doubled_points(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], max_results=500)}
    role = {run_id: run.data.tags["layerswap.role"] for run_id, run in runs.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for run_id, run in runs.items():
        parent = run.data.tags.get("mlflow.parentRunId")
        assert (parent is None) == (role[run_id] == "study")
        if role[run_id] == "trial":
            assert role[parent] == "study"
        if role[run_id] == "stage":
            if run.data.tags["layerswap.in_plan"] == "true":  # by another variant nobody shares it now
                assert role[parent] == ("study" if "," in run.data.tags["layerswap.trials"] else "trial")
            steps = [point.step for point in client.get_metric_history(run_id, "stage_tokens")]
            assert steps == sorted(set(steps)) and steps


@pytest.mark.usefixtures("on_cluster")
def test_kills_in_the_middle_of_a_stage_end_in_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """The teacher's worker is killed after a checkpoint, and after a later one the driver; the rest follows from it."""
    often = ("run", "--checkpoint-seconds", "0.2", "--set", "controls={skip: false, scratch: none}")
    often += ("--set", "search.space=[{recipe.joint.0.losses: [{kl: 1.0}]}]")
    run = subprocess.Popen(command(tmp_path, *often), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    stage, step = _wait_for_checkpoint(tmp_path, attempt=1)
    os.kill(json.loads((stage / "attempt.json").read_text())["pid"], signal.SIGKILL)
    _, later = _wait_for_checkpoint(tmp_path, attempt=2, above=step)
    run.kill()
    assert not (stage / "DONE.json").exists(), "killed too late to prove anything"
    run.wait(timeout=200)
    here(tmp_path, *often)
    assert json.loads((stage / "DONE.json").read_text())["result"]["resumed_at"] >= later > step
    assert json.loads((stage / "attempt.json").read_text())["number"] == 3
    assert quality(tmp_path) == {key: value for key, value in quality(finished).items() if key in quality(tmp_path)}
    known = weights(finished)
    assert all(known[key] == blob for key, blob in weights(tmp_path).items())
    assert len(quality(tmp_path)) == 4
    _no_point_is_lost_or_doubled(tmp_path, stage)


def _wait_for_checkpoint(home: Path, attempt: int, above: int = 0) -> tuple[Path, int]:
    """The directory of the teacher and the step of its newest checkpoint, once it wrote one in that attempt."""

    def look() -> tuple[Path, int] | None:
        for stage in {manifest.parents[2] for manifest in home.glob("store/*/*/work/step-*/manifest.json")}:
            step = newest_step(stage / "work")
            if step > above and json.loads((stage / "attempt.json").read_text())["number"] == attempt:
                return stage, step
        return None

    return wait_until(look, pause=0.02)


def _no_point_is_lost_or_doubled(home: Path, stage: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id], f"tags.`layerswap.stage` = '{stage.name}'")
    points = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
    assert points == [*range(10, 130, 10)]
    assert run.info.status == "FINISHED"


@pytest.mark.usefixtures("on_cluster")
def test_a_failed_trial_does_not_stop_the_others_and_the_exit_code_says_so(finished: Path) -> None:
    """A learning rate that diverges fails its own trial; the trial beside it is finished."""
    change = ("--set", "search.space={recipe.optimizer.lr: [0.003, 1.0e+20]}")
    change += ("--set", "controls={skip: false, scratch: none}")
    done = here(finished, "run", *change, check=1)
    assert "failed: trial-01 stage 1/3 layers 0,1: NonFiniteLoss: step" in done.stderr
    assert "Traceback" not in done.stderr
    rows = records(finished, *change)["records"]
    assert [row["trial"] for row in rows if row["kind"] == "stage"] == ["trial-00"] * 3
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    failed = client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'")
    assert {run.data.tags["layerswap.role"] for run in failed} == {"study", "trial", "stage"}


@pytest.mark.slow
@pytest.mark.usefixtures("on_cluster")
def test_damage_after_the_start_is_said_and_computed_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent whose bytes change, and one that is deleted, after the driver has looked and before they are used."""
    home = tmp_path / "home"
    shutil.copytree(finished, home)
    rows = [row for row in records(home)["records"] if row["trial"] == "trial-00"]
    flipped, deleted = (home / "store" / row["stage_key"][:2] / row["stage_key"] for row in rows[:2])
    [victim] = (flipped / "artefacts").glob("*.safetensors")
    usual = sweep.run_plan

    def damaged(*given: Any) -> Any:
        shutil.rmtree(deleted, ignore_errors=True)
        victim.write_bytes(victim.read_bytes()[:-1] + b"!")
        monkeypatch.setattr(driver, "run_plan", usual)
        return usual(*given)

    monkeypatch.setattr(driver, "run_plan", damaged)
    change = ("--set", "recipe.joint.0.tokens=5_120", "--set", "controls={skip: false, scratch: none}")
    told = here(home, "run", *change).output
    assert f"{flipped.name[:16]}: {victim.name} is damaged or gone: the stage is computed again" in told
    known = weights(finished)
    assert all(known[key] == blob for key, blob in weights(home).items() if key in known)


@pytest.mark.slow
def test_a_dead_tracking_server_delays_nothing_and_a_report_sends_everything(finished: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = here(finished, "run", "--tracking-uri", dead)
    assert "MLflow is behind, nothing is lost, the study goes on" in done.stderr
    assert re.search(r"MLflow lacks (\d+) of \1 stages \(.*layerswap report", done.stderr)
    fresh = tmp_path / "fresh.db"
    for _ in range(2):
        here(finished, "report", "--tracking-uri", f"sqlite:///{fresh}")
        sent = points(fresh)
        stages = {stage for stage, *_ in sent}
        assert len(stages) == 14
        assert sent == [point for point in points(finished / "mlflow.db") if point[0] in stages]
    assert here(finished, "run", "--tracking-uri", "nowhere", check=2).stderr.startswith("--tracking-uri nowhere:")


def points(database: Path) -> list[Any]:
    """Stage, metric, step, time and value of every point of the finished stages."""
    query = (
        "SELECT t.value, m.key, m.step, m.timestamp, m.value FROM metrics m JOIN tags t USING (run_uuid) "
        "JOIN runs r USING (run_uuid) WHERE t.key = 'layerswap.stage' AND r.status = 'FINISHED'"
    )
    with sqlite3.connect(database) as connection:
        return sorted(connection.execute(query).fetchall())


@pytest.mark.slow
@pytest.mark.usefixtures("on_cluster")
def test_a_full_disk_ends_in_exit_code_1_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Nothing can be written: no stage, no record, no report."""
    small = ("--set", "controls={skip: false, scratch: none}", "--set", "search.space=[{operator: [{kind: hyena}]}]")
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(home)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        done = here(home, "run", *small, check=1)
        assert re.search(
            r"failed: [^\n]*: StoreError: no space left on .*: free \d+ MB, then run the same", done.stderr
        )
        assert "Traceback" not in done.stderr and "go on with: layerswap run" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(home)], check=True)
        here(home, "run", *small)
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cluster")
def test_early_stopping_ends_a_trial_at_a_stage_boundary_and_stays_decided(finished: Path) -> None:
    change = ("--set", "search.early_stopping={grace_layers: 2, reduction_factor: 2}")
    change += ("--set", "search.space=[{operator.init: [transfer]}, {operator.init: [random], seed: [0, 1]}]")
    done = here(finished, "run", *change)
    stopped = [line for line in done.stdout.splitlines() if "was stopped early after" in line]
    assert stopped
    trained = len(weights(finished))
    again = here(finished, "run", *change)
    assert len(weights(finished)) == trained
    assert [line for line in again.stdout.splitlines() if "was stopped early after" in line] == stopped


@pytest.mark.slow
def test_the_smoke_study_runs_to_its_end(tmp_path: Path) -> None:
    smoke = ROOT / "studies" / "smoke.yaml"
    layerswap(tmp_path, "run", study=smoke)
    rows = records(tmp_path, study=smoke)["records"]
    assert [row["kind"] for row in rows].count("stage") == 9
    probed = [row["name"] for row in rows if row["probes"]]
    assert probed == [row["name"] for row in rows if row["kind"] != "control" or row["name"] == "skip all"]
