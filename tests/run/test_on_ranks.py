"""What a stage of several processes asks of Ray Train, and what each process does, Ray Train made here."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError

from orchestrator.distill import stage
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.run import distributed as module
from orchestrator.run.distributed import RankDied, run_on_ranks
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.spec import Architecture, TeacherSpec

SPEC = TeacherSpec(
    tokens="t", architecture=Architecture(layers=1, hidden=8, heads=1, intermediate=8, max_length=8, vocabulary=300),
    token_budget=64, batch_size=6, sequence_length=8, optimizer=Optimizer(),
    numerics=Numerics(threads=2, world_size=3), seed=0,
)  # fmt: skip


def place_in(folder: Path, **context: Any) -> Workplace:
    return Workplace({}, folder / "work", folder, folder / "out", RunContext(store="s", **context), print)


class Trainer:
    """Keeps what it is made with; `fit` does as a test says."""

    made: Trainer
    error: Exception | None = None

    def __init__(self, on_rank: Any, **words: Any) -> None:
        self.on_rank, self.words = on_rank, words
        Trainer.made = self

    def fit(self) -> Any:
        storage = Path(self.words["run_config"].storage_path)
        storage.mkdir()
        (storage / "left").touch()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(return_value={"seconds": 1.0})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "")  # so that it is taken back at the end
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")


@pytest.mark.parametrize(
    ("context", "gpus", "backend"),
    [
        ({}, None, "gloo"),
        ({"device": "cuda", "gpus_per_stage": 1.0}, 1.0, "nccl"),
        ({"gpus_per_stage": 0.5}, 0.5, "gloo"),
    ],
)
def test_each_rank_has_its_threads_and_its_share_of_a_gpu(
    trainer: None, tmp_path: Path, context: dict[str, Any], gpus: float | None, backend: str
) -> None:
    place = place_in(tmp_path, **context)
    assert run_on_ranks(SPEC, place) == {"seconds": 1.0}
    words = Trainer.made.words
    assert Trainer.made.on_rank is module._on_rank
    assert words["train_loop_config"] == {"spec": SPEC, "place": place}
    assert words["torch_config"].backend == backend
    scaling = words["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (3, gpus is not None)
    assert scaling.resources_per_worker == {"CPU": 2.0, **({} if gpus is None else {"GPU": gpus})}
    assert words["run_config"].storage_path == str(tmp_path / "train") and not (tmp_path / "train").exists()
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "604800"  # a week, as long as any stage may wait


@pytest.mark.parametrize(
    ("failures", "kind", "told"),
    [({1: ValueError("it diverged")}, ValueError, "it diverged"), ({}, RankDied, "workers have died")],
)
def test_a_failed_stage_raises_its_own_error_and_leaves_nothing(
    trainer: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: dict[int, Exception],
    kind: type[Exception],
    told: str,
) -> None:
    error = TrainingFailedError.__new__(TrainingFailedError)
    Exception.__init__(error, "workers   have\ndied " + "x" * 300)
    monkeypatch.setattr(error, "worker_failures", failures, raising=False)
    monkeypatch.setattr(TrainingFailedError, "__str__", lambda _: "workers   have\ndied " + "x" * 300, raising=False)
    monkeypatch.setattr(Trainer, "error", error)
    with pytest.raises(kind, match=told) as caught:
        run_on_ranks(SPEC, place_in(tmp_path))
    assert len(str(caught.value)) <= 200
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(("device", "used"), [("cpu", "cpu"), ("cuda", "cuda:1")])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_writes_and_the_others_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, used: str, rank: int
) -> None:
    seen: list[Workplace] = []

    def run_stage(spec: Any, place: Workplace) -> dict[str, Any]:
        assert spec is SPEC and place.out.parent.is_dir()
        assert rank == 0 or (place.out / "owner.lock").is_file()  # so that doctor finds what a killed rank leaves
        seen.append(place)
        return {"seconds": 2.0}

    monkeypatch.setattr(stage, "run_stage", run_stage)
    monkeypatch.setattr(
        ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
    )
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cuda:1")
    place = place_in(tmp_path, device=device, checkpoint_seconds=5.0)
    result = module._on_rank({"spec": SPEC, "place": place})
    [at] = seen
    assert at.context.device == used and at.work == place.work
    if rank == 0:
        assert result == {"seconds": 2.0}
        assert (at.out, at.journal, at.context.checkpoint_seconds) == (place.out, place.journal, 5.0)
    else:
        assert result is None
        assert at.out == at.journal != place.out and at.out.name.startswith("layerswap-rank-")
        assert at.context.checkpoint_seconds == math.inf
        assert not at.out.exists()
