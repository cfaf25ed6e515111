"""A cluster that is there lets itself be found, and its cores are counted before anything runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.distill.context import RunContext
from orchestrator.distill.training import muon
from orchestrator.run import preflight
from orchestrator.run.cluster import ClusterError
from orchestrator.run.preflight import check_memory, idle_gpus, slow_products
from orchestrator.run.sweep import Cluster, connected
from orchestrator.study.plan import stage_memory
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import short
from tests.record.handmade import Hand

ROOT = Path(__file__).resolve().parents[2]
STUDY = "study: s\nrecipe: {phases: [{tokens: 1024, losses: {kl: 1.0}}]}\n"


@pytest.mark.ray
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("dtype", "address", "device", "multiplies", "told"),
    [
        ("bfloat16", None, "cpu", False, True),
        ("bfloat16", None, "cpu", True, False),
        ("bfloat16", None, "cuda", False, False),
        ("bfloat16", "10.0.0.1:6379", "cpu", False, False),
        ("float32", None, "cpu", False, False),
    ],
)
def test_a_precision_that_the_processor_has_no_instructions_for_is_told(
    dtype: str, address: str | None, device: str, multiplies: bool, told: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: multiplies)
    plan, context = Hand(tmp_path, f"numerics.dtype={dtype}").plan, RunContext(store="s", device=device)
    found = slow_products(plan, context, Cluster(address, cpus=2, gpus=1))
    assert (found is not None) == told
    assert not told or "set numerics.dtype (and teacher_dtype) to float32" in str(found)


def test_a_run_tells_that_its_precision_is_slow_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(preflight, "available_bytes", lambda context: 0)  # which ends it
    (tmp_path / "s.yaml").write_text(STUDY)
    words = ["run", str(tmp_path / "s.yaml"), "--home", str(tmp_path / "home"), "--set", "numerics.dtype=bfloat16"]
    assert "note: numerics.dtype is bfloat16, which this" in CliRunner().invoke(app, words).stderr


def test_a_stage_that_cannot_fit_this_machine_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    words = ["run", str(tmp_path / "s.yaml"), "--home", str(tmp_path / "home")]
    large = [
        "teacher.kind=pretrain",
        "teacher.layers=80",
        "teacher.hidden=16384",
        "teacher.heads=128",
        "teacher.optimizer.method=adamw",
    ]
    done = CliRunner().invoke(app, [*words, *(word for each in large for word in ("--set", each))])
    assert done.exit_code == 2, done.output
    wanted = r"stage [0-9a-f]{16} \(the teacher\) needs about (\d+)\.\d GB and (\d+)\.\d GB are free: "
    told = re.fullmatch(wanted + "lower teacher.batch_size, or take a machine that has as much\n", done.stderr)
    assert told and int(told[1]) > 3000 > int(told[2])
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_only_what_is_left_to_do_has_to_fit_and_only_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(tmp_path)
    needed = {key: memory.bytes for key, memory in stage_memory(hand.plan, hand.speeds, "cpu").items()}
    largest = max(needed, key=lambda key: needed[key])
    monkeypatch.setattr(preflight, "available_bytes", lambda context: needed[largest] - 1)
    context, here = RunContext(store="s"), Cluster(cpus=1, gpus=0)
    with pytest.raises(ClusterError, match=f"stage {short(largest)} "):
        check_memory(hand.plan, hand.speeds, context, here, ())
    rest = {key for key, taken in needed.items() if taken == needed[largest]}
    check_memory(hand.plan, hand.speeds, context, here, rest)
    check_memory(hand.plan, hand.speeds, context, Cluster("10.0.0.1:6379", cpus=1, gpus=0), ())


def test_remedies_are_those_that_a_stage_has_not_taken_yet(tmp_path: Path) -> None:
    student = Hand(tmp_path).steps["two 0"].train
    tight = student.model_copy(update={
        "checkpoint_activations": True, "batch_size": 1, "optimizer": Optimizer(rest_scale=0.0),
        "numerics": Numerics(dtype="bfloat16", teacher_dtype="bfloat16"),
    })  # fmt: skip
    assert preflight._remedies(tight) == ["or take a machine that has as much"]
    assert preflight._remedies(student)[:-1] == [
        "set recipe.checkpoint_activations", "lower recipe.batch_size",
        "set numerics.dtype and teacher_dtype to bfloat16", "set recipe.optimizer.rest_scale to 0",
    ]  # fmt: skip
    for sharding, first in (("none", "set numerics.sharding to full"), ("full", "set recipe.checkpoint_activations")):
        ranks = student.model_copy(update={"numerics": Numerics(world_size=2, sharding=sharding)})
        assert preflight._remedies(ranks)[0] == first


OPEN = """
import json, psutil
from orchestrator.run.cluster import Cluster, connected

with connected(Cluster(cpus=1, gpus=0)):
    import ray

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    opened = [connection for process in processes for connection in process.net_connections("tcp")]
    hosts = sorted({one.laddr.ip.removeprefix("::ffff:") for one in opened if one.status == psutil.CONN_LISTEN})
    print(json.dumps([hosts, ray.get_runtime_context().gcs_address]), flush=True)
    input()
"""
STRANGER = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


@pytest.mark.ray
@pytest.mark.slow
def test_nobody_else_reaches_the_ray_of_a_run(tmp_path: Path) -> None:
    """Its services listen on the loopback interface, and who comes with another token is turned away."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-c", OPEN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    try:
        hosts, address = json.loads(run.stdout.readline())
        assert hosts == ["127.0.0.1"]
        another = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        words = [sys.executable, "-c", STRANGER, address]
        stranger = subprocess.run(words, env={**environment, **another}, capture_output=True, text=True)
        assert stranger.returncode == 1 and "AuthenticationError" in stranger.stderr
    finally:
        run.communicate("\n", timeout=100)
    assert list(tmp_path.iterdir()) == []  # no token is left in the user's home
