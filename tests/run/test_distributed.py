"""A stage of two ranks: the loss curve of one, the bits of itself after a rank was killed, errors told as they are."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from safetensors.torch import load_file
from torch.distributed import DistBackendError

from orchestrator.distill.context import RunContext
from orchestrator.distill.training.journal import read_journal
from orchestrator.distill.training.loop import NonFiniteLoss
from orchestrator.distill.training.ranks import PeerLost
from orchestrator.files import write_json
from orchestrator.run.cluster import Cluster, connected
from orchestrator.run.compute import compute
from orchestrator.run.distributed import RankDied, _cause
from orchestrator.run.store import Store
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import Architecture, TeacherSpec
from tests.texts import random_tokens, write_tokens

pytestmark = pytest.mark.ray
STEPS = 24
RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.distill.stage import run_stage
from orchestrator.run.store import Store
from orchestrator.study.spec import spec_from_json
rank, folder, store, spec = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], spec_from_json(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
place = folder / str(rank)
(place / "out").mkdir(parents=True)
inputs = {"tokens": Store(Path(store)).artefacts(spec.tokens)}
context = RunContext(store, checkpoint_seconds=1e9, log_every=1)
run_stage(spec, Workplace(inputs, place / "work", place, place / "out", context, print))
dist.destroy_process_group()
"""
# Two ranks sum the gradients of a batch in another order than one does, which differs by about 1e-7 of their size.
# Optimizers that divide by that size make more of it, step by step: after 24, at most this much of a loss, and of a
# weight less than one step of the largest learning rate.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-2


def teacher(ranks: int, sharding: Any = "none") -> TeacherSpec:
    return TeacherSpec(
        tokens="t" * 64, architecture=Architecture(layers=1, hidden=16, heads=2, intermediate=32, max_length=16,
        vocabulary=300), token_budget=STEPS * 4 * 16, batch_size=4, sequence_length=16,
        optimizer=Optimizer(), numerics=Numerics(world_size=ranks, sharding=sharding), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A store that has the tokens already; every step is logged and checkpointed."""
    context = RunContext(store=str(tmp_path_factory.mktemp("store")), checkpoint_seconds=0.0, log_every=1)
    tokens = Store(Path(context.store)).artefacts("t" * 64)
    write_tokens(tokens, train=random_tokens(4000, above=9))
    write_json(tokens.parent / "DONE.json", {"kind": "tokens", "result": {}, "files": {}})
    return context


def trained(spec: TeacherSpec, context: RunContext) -> tuple[list[float], Path]:
    """The losses of every step and the file of the weights."""
    store = Store(Path(context.store))
    lines = read_journal(store.folder(spec.key))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["metrics"]["loss/ce"] for line in lines], store.artefacts(spec.key) / "model.safetensors"


@pytest.fixture(scope="module", params=[pytest.param(how, marks=pytest.mark.slow) for how in ("none", "full")])
def spec(request: pytest.FixtureRequest) -> TeacherSpec:
    """The stage of two ranks, each with all of the model or its part of it."""
    return teacher(2, request.param)


@pytest.fixture(scope="module")
def undisturbed(spec: TeacherSpec, place: RunContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make of the stage without Ray and without being killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(folder), place.store, spec.model_dump_json()])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return folder / "0"


@pytest.fixture(scope="module")
def shared(spec: TeacherSpec, place: RunContext) -> RunContext:
    """Where two ranks trained the teacher, one of them killed after a checkpoint."""
    store = Store(Path(place.store))
    with connected(Cluster(cpus=2, gpus=0)):
        killer = threading.Thread(target=_kill_a_rank, args=(store.folder(spec.key) / "work",))
        killer.start()
        # As the broker has it done: by a task that has no core itself.
        task = ray.remote(compute).options(num_cpus=0, max_retries=3, retry_exceptions=[RankDied])
        result = ray.get(task.remote(spec.model_dump_json(), place))
        killer.join()
    assert result["resumed_at"] > 0
    assert store.attempt(spec.key)["number"] == 2  # type: ignore[index]
    return place


def test_two_ranks_have_the_loss_curve_of_one(spec: TeacherSpec, shared: RunContext) -> None:
    compute(teacher(1).model_dump_json(), shared)
    (one, its), (two, theirs) = trained(teacher(1), shared), trained(spec, shared)
    assert one[-1] < one[0] - 0.1, "nothing was learnt, so nothing was compared"
    assert two == pytest.approx(one, rel=LOSS_TOLERANCE)
    its_weights, their_weights = load_file(its), load_file(theirs)
    assert its_weights.keys() == their_weights.keys()
    for name, tensor in its_weights.items():
        assert (tensor - their_weights[name]).abs().max() <= WEIGHT_TOLERANCE, name


def test_a_killed_rank_costs_no_bit(spec: TeacherSpec, shared: RunContext, undisturbed: Path) -> None:
    losses, weights = trained(spec, shared)
    assert losses == [line["metrics"]["loss/ce"] for line in read_journal(undisturbed)]
    assert weights.read_bytes() == (undisturbed / "out" / weights.name).read_bytes()


def test_only_the_first_rank_writes_and_nothing_is_left(spec: TeacherSpec, shared: RunContext) -> None:
    folder = Store(Path(shared.store)).folder(spec.key)
    assert {path.name for path in folder.iterdir()} == {
        "artefacts", "attempt.json", "DONE.json", "journal.jsonl", "lock", "log.txt", "spec.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ({0: PeerLost("closed"), 1: NonFiniteLoss("step 2")}, NonFiniteLoss),
        ({0: PeerLost("closed"), 1: ray.exceptions.RayActorError()}, RankDied),
        ({0: PeerLost("closed")}, RankDied),
        ({0: RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer")}, RankDied),
        ({0: DistBackendError("NCCL error"), 1: RuntimeError("NCCL communicator was aborted")}, RankDied),
        ({0: RuntimeError("shapes do not fit")}, RuntimeError),
        ({}, RankDied),
    ],
)
def test_an_error_of_a_rank_counts_and_a_death_is_no_error(failures: dict[int, Exception], cause: type) -> None:
    assert type(_cause(failures, "what Ray says\nand more")) is cause


def _kill_a_rank(work: Path) -> None:
    """Kill a rank of this process's cluster once there is a checkpoint."""
    while not list(work.glob("step-*/manifest.json")):
        threading.Event().wait(0.01)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError("there is no rank to kill")
