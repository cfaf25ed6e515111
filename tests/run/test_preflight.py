"""A cluster that is there lets itself be found, and its cores are counted before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.distill.context import RunContext
from orchestrator.run.preflight import idle_gpus
from orchestrator.run.sweep import Cluster, connected

ROOT = Path(__file__).resolve().parents[2]
STUDY = "study: s\nrecipe: {phases: [{tokens: 1024, losses: {kl: 1.0}}]}\n"


@pytest.mark.ray
def test_a_plan_that_does_not_fit_a_running_cluster_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    words = ["run", "s.yaml", "--home", "home", "--set", "numerics.threads=2"]
    with connected(Cluster(cpus=1)):
        import ray

        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "orchestrator.cli", *words, "--ray-address", address]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=200,
        )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "asks for 2 threads and the largest node has 1 cores: lower threads" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize(
    ("address", "gpus", "device", "idle"),
    [(None, 2, "cpu", 2), (None, 2, "cuda", 0), (None, 0, "cpu", 0), ("10.0.0.1:6379", 2, "cpu", 0)],
)
def test_gpus_that_nobody_asked_for_are_counted(address: str | None, gpus: int, device: str, idle: int) -> None:
    context = RunContext(store="s", device=device)
    assert idle_gpus(context, Cluster(address, cpus=2, gpus=gpus)) == idle
