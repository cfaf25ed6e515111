"""Ranks by definition: threads stand for processes, each with its rank, and meet where `torch.distributed` would.

That the real one carries it is seen in `tests/run/test_distributed.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.distill.training import ranks
from orchestrator.distill.training.losses import logit_losses
from orchestrator.distill.training.ranks import (
    PeerLost,
    average_gradients,
    in_turn,
    is_first,
    mean,
    on_any,
    share,
    world_size,
)  # fmt: skip
from orchestrator.study.recipe import LogitKL


class Peers:
    """What `ranks` uses of `torch.distributed`, between the threads of one process."""

    def __init__(self, count: int) -> None:
        self.count, self.meeting = count, threading.Barrier(count, timeout=20)
        self.mine = threading.local()
        self.given: dict[int, Any] = {}
        self.events: list[str] = []

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            self.mine.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.count

    def get_rank(self) -> int:
        return int(self.mine.rank)

    def barrier(self) -> None:
        self.meeting.wait()

    def exchanged(self, value: Any) -> list[Any]:
        self.given[self.get_rank()] = value
        self.meeting.wait()
        values = [self.given[rank] for rank in range(self.count)]
        self.meeting.wait()
        return values

    def all_reduce(self, values: Tensor) -> None:
        values.copy_(torch.stack(self.exchanged(values.clone())).sum(0))

    def all_gather_object(self, into: list[Any], value: Any) -> None:
        into[:] = self.exchanged(value)


class Head(nn.Linear):
    """An output head as losses ask for it."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)
        self.vocabulary = vocabulary


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Peers:
    """Three ranks, or as many as the test says."""
    made = Peers(getattr(request, "param", 3))
    monkeypatch.setattr(ranks, "dist", made)
    return made


def test_alone_nothing_changes() -> None:
    assert (world_size(), is_first(), share(7, 5)) == (1, True, (7, 5))
    assert (on_any(True), on_any(False)) == (True, False)
    assert in_turn(lambda: (3, "loaded")) == (3, "loaded")
    values = torch.tensor([1.0, 2.0])
    assert mean(values).tolist() == [1.0, 2.0]
    parameter = nn.Parameter(torch.zeros(2))
    average_gradients([parameter])
    assert parameter.grad is None


def test_alone_no_gradient_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One flat copy of all gradients would be a second model's memory."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]  # one alone is never copied
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    monkeypatch.setattr(ranks.torch, "cat", lambda *_: pytest.fail("copied"))
    average_gradients(parameters)


def test_parts_of_a_batch_are_equal_and_follow_each_other(peers: Peers) -> None:
    assert peers.run(lambda rank: share(100, 6)) == [(100, 2), (102, 2), (104, 2)]
    assert peers.run(lambda rank: is_first()) == [True, False, False]


def test_means_are_over_the_ranks(peers: Peers) -> None:
    found = peers.run(lambda rank: mean(torch.tensor([rank, 10.0 * rank])).tolist())
    assert found == [[1.0, 10.0]] * 3


@pytest.mark.parametrize("peers", [2], indirect=True)
def test_hits_weigh_over_the_whole_batch_that_ranks_share(peers: Peers) -> None:
    """One rank's part repeats itself and the other's never does; the mean over both is that of one process."""
    ids_BL = torch.stack([torch.tensor([1, 2, 3] * 4), torch.arange(12)])
    head, hidden_BLD = Head(5, 13), torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))

    def entropy(rows: slice) -> float:
        given = (None, hidden_BLD[rows], None, head, ids_BL[rows], LogitKL(weight=0.0), 1.0, 4.0)
        return float(logit_losses(*given)[0].detach())  # type: ignore[arg-type]

    logs_BLV = torch.nn.functional.linear(hidden_BLD, head.weight).log_softmax(-1)[:, :-1]
    counts_BP = torch.ones(2, 11)
    counts_BP[0, 4:] = 4.0  # the sixth token is the first to end a trigram that was there
    each_BP = -logs_BLV.gather(2, ids_BL[:, 1:, None])[..., 0]
    wanted = float((each_BP * counts_BP).sum().detach() / counts_BP.sum())
    found = peers.run(lambda rank: entropy(slice(rank, rank + 1)))
    assert sum(found) / 2 == pytest.approx(wanted, rel=1e-5)


def test_gradients_are_averaged_in_place_and_shape_and_what_has_none_keeps_none(peers: Peers) -> None:
    def work(rank: int) -> list[Any]:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,))]
        parameters[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
        parameters[2].grad = torch.tensor([float(rank == 2)])
        average_gradients(parameters)
        return [None if p.grad is None else p.grad.tolist() for p in parameters]

    wanted = [[[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]], None, [pytest.approx(1 / 3)]]
    assert peers.run(work) == [wanted] * 3


def test_few_gradients_are_copied_at_a_time_and_large_ones_not_at_all(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "TOGETHER", 6)
    shapes, copied = ((2,), (2, 2), (1,), (4, 5), (3,), (3, 2)), []
    usual = torch.cat
    monkeypatch.setattr(ranks.torch, "cat", lambda parts: (copied.append(sum(map(len, parts))), usual(parts))[1])

    def work(rank: int) -> list[Any]:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full(parameter.shape, float(rank + index))
        parameters[-1].grad = torch.full((2, 3), rank + 5.0).t()  # not contiguous
        average_gradients(parameters)
        return [p.grad.unique().tolist() for p in parameters if p.grad is not None]

    assert peers.run(work) == [[[index + 1.0] for index in range(6)]] * 3
    assert sorted(copied) == [6] * 6, "two and four on each rank, and what does not lie in one piece"


@pytest.mark.parametrize("raised", [None, 0, 2])
def test_a_flag_of_one_is_a_flag_of_all(peers: Peers, raised: int | None) -> None:
    assert peers.run(lambda rank: on_any(rank == raised)) == [raised is not None] * 3


def test_the_first_rank_loads_before_the_others(peers: Peers) -> None:
    def load(rank: int) -> tuple[int, str]:
        if rank == 0:
            threading.Event().wait(0.05)  # the others would be there by now
        peers.events.append("first" if rank == 0 else "other")
        return 40, f"of {rank}"

    assert peers.run(lambda rank: in_turn(lambda: load(rank))) == [(40, f"of {rank}") for rank in range(3)]
    assert peers.events == ["first", "other", "other"]


def test_ranks_that_would_go_on_from_other_steps_do_not(peers: Peers) -> None:
    def work(rank: int) -> str:
        with pytest.raises(RuntimeError, match=r"checkpoints of steps \[40, 40, 20\]: the store is not the same"):
            in_turn(lambda: (20 if rank == 2 else 40, None))
        return "told"

    assert peers.run(work) == ["told"] * 3


@pytest.mark.parametrize("peers", [1], indirect=True)
def test_one_rank_of_a_group_is_alone(peers: Peers) -> None:
    assert peers.run(lambda rank: (world_size(), share(3, 4), is_first())) == [(1, (3, 4), True)]


def test_who_does_not_answer_is_lost(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> None:
        raise RuntimeError("\n connection reset\n more of it")

    monkeypatch.setattr(peers, "all_reduce", silent)
    monkeypatch.setattr(peers, "all_gather_object", silent)
    monkeypatch.setattr(peers, "barrier", silent)
    for call in (lambda: mean(torch.ones(1)), lambda: on_any(True), lambda: in_turn(lambda: (1, None))):
        with pytest.raises(PeerLost, match=r"^connection reset$"):
            peers.run(lambda rank, call=call: call())  # type: ignore[misc]


def test_an_error_of_loading_is_no_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers(1)
    peers.get_world_size = lambda: 2  # type: ignore[method-assign]
    monkeypatch.setattr(ranks, "dist", peers)

    def load() -> tuple[int, None]:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        peers.run(lambda rank: in_turn(load))
