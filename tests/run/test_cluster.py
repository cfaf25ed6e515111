"""Several drivers and several machines: what does not fit is told before the start, and nothing is computed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import ray
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.distill.context import RunContext
from orchestrator.run import cluster as module
from orchestrator.run.cluster import (
    Cluster,
    ClusterError,
    Node,
    check_before_start,
    check_resources,
    check_store,
    connected,
)
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import Architecture, ImportSpec, Spec, TeacherSpec

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "search.space=[{operator: [{kind: hyena, order: 2}]}, {operator.heads: [2]}]",
    "schedule.layers_per_stage=3",
    "teacher.tokens=30720",
    "controls={skip: false, scratch: none}",
    "throughput={lengths: [64], decode_tokens: 8, repeats: 1}",
    "evaluation.probes={windows: 1, needles: 0}",
]
EDITED = [*SMALL, "study=edited", "recipe.joint.0.losses={kl: 1.0, ce: 0.5}"]


def spec(threads: int = 1, ranks: int = 1) -> Spec:
    return TeacherSpec(
        tokens="t", architecture=Architecture(layers=1, hidden=8, heads=1, intermediate=8, max_length=8,
        vocabulary=300), token_budget=64, batch_size=8, sequence_length=8, optimizer=Optimizer(),
        numerics=Numerics(threads=threads, world_size=ranks), seed=0,
    )  # fmt: skip


def test_a_signal_waits_until_ray_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def shutdown() -> None:
        signal.raise_signal(signal.SIGINT)
        told.append("down")

    monkeypatch.setattr(ray, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt):
        module._shut_down()
    assert told == ["down"]


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "told"),
    [
        (spec(threads=5), 0, "cpu", "a teacher stage asks for 5 threads and the largest node has 4 cores: lower thre"),
        (spec(), 2, "cuda", "a teacher stage asks for 2 GPUs and the largest node has 1: lower --gpus-per-stage, or "),
        (spec(), 1.5, "cuda", "--gpus-per-stage 1.5: more than one GPU must be a whole number of them"),
        (spec(ranks=2), 0.5, "cuda", "--gpus-per-stage 0.5: the 2 ranks of a teacher stage cannot share a GPU (nccl)"),
        (
            spec(threads=2, ranks=4),
            0,
            "cpu",
            "a teacher stage asks for 4 ranks of 2 threads and 0 GPUs each and the cluster holds 3 of them (its "
            "largest node has 4 cores and 1 GPUs): lower numerics.world_size or threads",
        ),
        (
            spec(ranks=2),
            1,
            "cuda",
            "a teacher stage asks for 2 ranks of 1 threads and 1 GPUs each and the cluster hold",
        ),
    ],
)
def test_what_would_wait_for_ever_is_told(asked: Spec, gpus: float, device: str, told: str) -> None:
    nodes = (Node("a", 2, 0, ""), Node("b", 4, 1, ""))
    context = RunContext(store="s", device=device, gpus_per_stage=gpus)
    with pytest.raises(ClusterError) as caught:
        check_resources([asked], context, nodes)
    assert str(caught.value).startswith(told)


def test_what_fits_is_not_complained_about() -> None:
    nodes = (Node("a", 2, 0, ""), Node("b", 4, 1, ""))
    check_resources([spec(threads=4), spec(threads=2, ranks=3)], RunContext(store="s"), nodes)
    check_resources([spec(), spec(ranks=2)], RunContext(store="s", gpus_per_stage=0.5), nodes)
    reads = ImportSpec(fingerprint="f")  # asks for no GPU, so none need be there
    check_resources([reads], RunContext(store="s", device="cuda", gpus_per_stage=1), nodes[:1])


def test_a_machine_of_its_own_is_checked_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "connected", None)
    context = RunContext(store="s", gpus_per_stage=0.5)
    check_before_start([spec()], context, Cluster(cpus=1, gpus=1))
    with pytest.raises(ClusterError, match=r"asks for 0\.5 GPUs and the largest node has 0"):
        check_before_start([spec()], context, Cluster(cpus=1, gpus=0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus-per-stage", "64"], "a teacher stage asks for 64 GPUs and the largest node has "),
        (["--set", "numerics.threads=4096"], "stage asks for 4096 threads and the largest node has "),
        (["--mirror", "nowhere://x"], "--mirror nowhere://x: Protocol not known: nowhere"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address 127.0.0.1:1: no Ray cluster answers ("),
    ],
)
def test_a_misfit_is_bad_input_and_nothing_is_written(tmp_path: Path, words: list[str], told: str) -> None:
    with mock.patch.dict(os.environ):
        done = CliRunner().invoke(app, driver(tmp_path / "home", [], *words)[3:])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert not (tmp_path / "home").exists()


def driver(home: Path, study: list[str], *words: str) -> list[str]:
    sets = [word for change in study for word in ("--set", change)]
    file = str(ROOT / "studies" / "smoke.yaml")
    return [sys.executable, "-m", "orchestrator.cli", "run", file, "--home", str(home), *sets, *words]


def weights(home: Path) -> dict[str, bytes]:
    return {path.parts[-3]: path.read_bytes() for path in home.glob("store/*/*/artefacts/*.safetensors")}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a study and its edited copy ran at the same time, each with a driver of its own."""
    home = tmp_path_factory.mktemp("together")
    drivers = [subprocess.Popen(driver(home, study), cwd=ROOT, stdout=subprocess.DEVNULL) for study in (SMALL, EDITED)]
    assert [one.wait(timeout=280) for one in drivers] == [0, 0]
    return home


@pytest.mark.ray
@pytest.mark.slow
def test_two_drivers_compute_each_stage_once(together: Path) -> None:
    stages = [path for path in together.glob("store/*/*") if path.is_dir()]
    kinds = sorted(json.loads((path / "spec.json").read_text())["kind"] for path in stages)
    # Both studies share the teacher, the first stage of both trials, and all measurements; the joint stages differ.
    evaluated = ["evaluate", "probes"]
    assert kinds == sorted(
        ["tokens", "teacher", *evaluated] + ["distil", *evaluated] * (2 + 2 * 2) + ["throughput"] * 3
    )
    for stage in stages:
        assert (stage / "DONE.json").exists()
        assert json.loads((stage / "attempt.json").read_text())["number"] == 1
        journal = stage / "journal.jsonl"
        steps = [json.loads(line)["step"] for line in journal.read_text().splitlines()] if journal.exists() else []
        assert steps == sorted(set(steps))


class Nodes:
    """Two nodes of one core and one pretended GPU on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Machines

        size = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": module.OBJECT_STORE_BYTES}
        self.cluster: Any = Machines(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        self.head = self.cluster.head_node
        self.other = self.cluster.add_node(**size)
        self.cluster.wait_for_nodes()

    def has(self, node: Any, process: psutil.Process) -> bool:
        """Whether a process is one of the node's."""
        return node.all_processes["raylet"][0].process.pid in [parent.pid for parent in process.parents()]

    def kill_other(self) -> None:
        self.cluster.remove_node(self.other, allow_graceful=False)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    for name, value in module.QUIET.items():
        monkeypatch.setenv(name, value)
    made = Nodes()
    yield made
    made.cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_killed_in_the_middle_of_a_stage_costs_no_bit(nodes: Nodes, together: Path, tmp_path: Path) -> None:
    words = ("--ray-address", nodes.cluster.address, "--gpus-per-stage", "0.5", "--checkpoint-seconds", "0.2")
    run = subprocess.Popen(driver(tmp_path, SMALL, *words), cwd=ROOT, stdout=subprocess.DEVNULL)
    stage = _stage_on(nodes.other, nodes, tmp_path, run)
    finished = {path: path.read_bytes() for path in tmp_path.glob("store/*/*/DONE.json")}
    brokers = [process for process in psutil.process_iter() if "ray::Broker" in process.name()]
    assert [nodes.has(nodes.head, process) for process in brokers if nodes.has(nodes.other, process)] == []
    assert any(nodes.has(nodes.head, process) for process in brokers), "the broker is on the driver's node"
    nodes.kill_other()
    assert not (stage / "DONE.json").exists(), "killed too late to prove anything"
    assert run.wait(timeout=250) == 0
    assert json.loads((stage / "attempt.json").read_text())["number"] == 2
    assert json.loads((stage / "DONE.json").read_text())["result"]["resumed_at"] > 0
    assert all(path.read_bytes() == blob for path, blob in finished.items())
    known, found = weights(together), weights(tmp_path)
    assert len(found) == 6  # the teacher, its side of evaluations, two stages of two trials
    assert all(known[key] == blob for key, blob in found.items())


def _stage_on(node: Any, nodes: Nodes, home: Path, run: subprocess.Popen[bytes]) -> Path:
    """The directory of a stage that this node computes and has written a checkpoint of."""
    while run.poll() is None:
        for checkpoint in home.glob("store/*/*/work/step-*/manifest.json"):
            stage = checkpoint.parents[2]
            try:
                if nodes.has(node, psutil.Process(json.loads((stage / "attempt.json").read_text())["pid"])):
                    return stage
            except (psutil.Error, OSError, ValueError):
                continue
        threading.Event().wait(0.02)
    raise AssertionError("the other node never had a stage with a checkpoint")


@pytest.mark.ray
def test_a_node_without_the_store_or_the_program_is_told(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = RunContext(store=str(tmp_path / "store"))
    with mock.patch.dict(os.environ), connected(Cluster(nodes.cluster.address)) as found:
        assert [(node.cpus, node.gpus) for node in found] == [(1, 1), (1, 1)]
        check_store(context, found)
        monkeypatch.setattr(module, "_sees", lambda marker: False)
        with pytest.raises(ClusterError, match=r"does not see the store .*: give a --home on a file system that all"):
            check_store(context, found)
        monkeypatch.setattr(module, "_sees", spec)  # of a module that the nodes do not have
        with pytest.raises(ClusterError, match=r"cannot run layerswap: ModuleNotFoundError: No module named"):
            check_store(context, found)
    assert list((tmp_path / "store").iterdir()) == [tmp_path / "store" / "VERSION"]
