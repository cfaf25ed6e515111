"""How a run connects to Ray and looks around there, Ray's own functions made here: no cluster is started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.job_config import JobConfig

from orchestrator.distill.context import RunContext
from orchestrator.run import cluster as module
from orchestrator.run import preflight
from orchestrator.run.cluster import QUIET, Cluster, ClusterError, Node, check_before_start, check_store, connected
from orchestrator.run.preflight import check_run
from tests.record.handmade import Hand

HERE, THERE = "1f" * 28, "2e" * 28


class Machines:
    """What Ray says of a cluster of two nodes, one of them dead, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **words: Any) -> None:
        self.calls.append(words)

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def guarded(self, folder: str) -> contextlib.AbstractContextManager[None]:
        assert Path(folder).is_dir()
        self.calls.append(("guarded", folder))
        return contextlib.nullcontext()

    def watched(self, *names: str) -> contextlib.AbstractContextManager[None]:
        self.calls.append(("watched", *names))
        return contextlib.nullcontext()

    def nodes(self) -> list[dict[str, Any]]:
        internal = {"node:__internal_head__": 1.0}
        return [
            {"NodeID": "dead", "Alive": False, "Resources": {}},
            {"NodeID": THERE, "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "node:10.0.0.2": 1.0}},
            {"NodeID": HERE, "Alive": True, "Resources": {**internal, "node:10.0.0.1": 1.0, "CPU": 2.0}},
        ]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    made = Machines()
    for name in ("init", "shutdown", "nodes"):
        monkeypatch.setattr(ray, name, getattr(made, name))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
    for name in ("guarded", "watched"):
        monkeypatch.setattr(module, name, getattr(made, name))
    before = dict(os.environ)
    yield made
    os.environ.clear()
    os.environ.update(before)


def test_a_cluster_of_this_machine_has_what_it_is_given(machines: Machines) -> None:
    with connected(Cluster(cpus=3, gpus=1)) as nodes:
        assert nodes == (Node(HERE, 2.0, 0.0, "node:10.0.0.1"), Node(THERE, 4.0, 1.0, "node:10.0.0.2"))
        assert {key: os.environ[key] for key in QUIET} == QUIET
        assert set(QUIET.values()) == {"0", "1", "15", "1000", "false"}
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64  # of this run alone
    assert "RAY_AUTH_TOKEN" not in os.environ
    guarded, init, watched, down = machines.calls
    folder = guarded[1]
    assert init.pop("logging_level") == 40  # errors only
    assert isinstance(init.pop("job_config"), JobConfig)
    assert init == {
        "address": "local", "namespace": "layerswap", "log_to_driver": False, "num_cpus": 3, "num_gpus": 1,
        "include_dashboard": False, "object_store_memory": 100 * 2**20, "_temp_dir": folder,
    }  # fmt: skip
    assert watched == ("watched", "raylet", "gcs_server") and down == "shutdown"
    assert not Path(folder).exists()


def test_a_cluster_at_an_address_keeps_what_it_has(machines: Machines) -> None:
    with connected(Cluster("10.0.0.1:6379", cpus=3, gpus=1)):
        assert "RAY_AUTH_TOKEN" not in os.environ  # it has its own, or none
    init = machines.calls[1]
    assert init["address"] == "10.0.0.1:6379"
    assert init.keys() == {"address", "namespace", "log_to_driver", "logging_level", "job_config"}


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError])
def test_an_address_where_nobody_answers_is_told_and_another_fault_is_not_hidden(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def init(**_: Any) -> None:
        raise error("\nno such cluster\nand a lot more")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError) as caught, connected(Cluster("10.0.0.9:1", cpus=1, gpus=0)):
        pass
    assert str(caught.value) == (
        "--ray-address 10.0.0.9:1: no Ray cluster answers (no such cluster): start one with `ray start --head`, or "
        "leave --ray-address out to run on this machine"
    )
    with pytest.raises(error, match="and a lot more"), connected(Cluster(cpus=1, gpus=0)):
        pass
    assert machines.calls[-1] == "shutdown"


def test_the_handler_of_sigterm_is_ours_again_after_ray_began(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[int] = []

    def own(number: int, _: object) -> None:
        arrived.append(number)

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(15)  # as Ray's own handler does where a signal arrives meanwhile

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with module._own_sigterm():
            module._connect(None, {})
        assert signal.getsignal(signal.SIGTERM) is own
        assert arrived == [signal.SIGTERM]
        with module._own_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is own and len(arrived) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_only_a_cluster_that_runs_already_is_asked_before_the_start(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(module, "check_store", lambda context, nodes: looked.append(nodes))
    check_before_start([], RunContext(store=str(tmp_path)), Cluster(address, cpus=1, gpus=0))
    assert [tuple(node.id for node in nodes) for nodes in looked] == ([] if address is None else [(HERE, THERE)])


class Look:
    """A remote function that answers as a test says, and the nodes that it was sent to."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.sent = iter(answers), list[Any]()

    def options(self, num_cpus: int, scheduling_strategy: Any) -> Look:
        assert num_cpus == 0 and not scheduling_strategy.soft
        self.sent.append(scheduling_strategy.node_id)
        return self

    def remote(self, marker: str) -> Any:
        assert module._sees(marker) and not module._sees(marker + "-absent")
        return next(self.answers)

    @staticmethod
    def get(answer: Any) -> bool:
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([True, True], None),
        ([True, False], f"node {THERE[:8]} (node:b) does not see the store "),
        (
            [ray.exceptions.RaySystemError("traces\nModuleNotFoundError: layerswap"), True],
            f"node {HERE[:8]} (node:a) cannot run layerswap: ModuleNotFoundError: layerswap",
        ),
    ],
)
def test_every_node_must_see_the_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[Any], told: str | None
) -> None:
    look = Look(answers)
    monkeypatch.setattr(ray, "remote", lambda function: look if function is module._sees else None)
    monkeypatch.setattr(ray, "get", look.get)
    nodes = (Node(HERE, 1, 0, "node:a"), Node(THERE, 1, 0, "node:b"))
    context = RunContext(store=str(tmp_path / "store"))
    if told is None:
        check_store(context, nodes)
    else:
        with pytest.raises(ClusterError) as caught:
            check_store(context, nodes)
        assert str(caught.value).startswith(told)
    assert look.sent == [HERE, THERE]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["VERSION"]


def context_of(hand: Hand, **more: Any) -> RunContext:
    return RunContext(store=str(hand.home.store), **more)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_is_a_number_above_0(tmp_path: Path, seconds: float) -> None:
    hand = Hand(tmp_path)
    with pytest.raises(ClusterError, match=f"--checkpoint-seconds {seconds:g} must be a finite number above 0"):
        check_run(hand.plan, context_of(hand, checkpoint_seconds=seconds), Cluster(cpus=1, gpus=0))


def test_a_device_must_be_known_and_there(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    with pytest.raises(ClusterError, match="--device tpu is not known: give one of cpu, cuda"):
        check_run(hand.plan, context_of(hand, device="tpu"), Cluster(cpus=1, gpus=0))
    with pytest.raises(ClusterError, match="--device cuda needs an accelerator"):
        check_run(hand.plan, context_of(hand, device="cuda"), Cluster(cpus=1, gpus=0))
    check_run(hand.plan, context_of(hand, device="cuda", gpus_per_stage=1.0), Cluster(cpus=1, gpus=1))


@pytest.mark.parametrize("there", [True, False])
def test_a_compiled_core_is_asked_for_only_where_stages_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    from operators import native

    asked: list[bool] = []
    monkeypatch.setattr(native, "available", lambda: asked.append(True) or there)
    hand = Hand(tmp_path)
    check_run(hand.plan, context_of(hand), Cluster(cpus=1, gpus=0))
    assert asked == []
    native_hand = Hand(tmp_path, "numerics.core=native")
    if there:
        check_run(native_hand.plan, context_of(native_hand), Cluster(cpus=1, gpus=0))
    else:
        with pytest.raises(ClusterError, match=r"numerics\.core native needs the compiled core"):
            check_run(native_hand.plan, context_of(native_hand), Cluster(cpus=1, gpus=0))
    assert asked == [True]


@pytest.mark.parametrize("address", ["here", "host:", ":6379", "ray://host:10001", "host:port"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ClusterError, match=r"is no address: give host:port of the cluster's head node, or auto"):
        preflight._knock(address)


class Wire:
    """A connection that answers with these bytes."""

    def __init__(self, answer: bytes | OSError) -> None:
        self.answer, self.sent, self.closed = answer, b"", False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def recv(self, _: int) -> bytes:
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "is_ray"),
    [
        (bytes([0, 0, 18, 4, 0, 0, 0, 0, 0]), True),
        (bytes([0, 0, 18, 4]), True),
        (bytes([0, 0, 18]), False),
        (b"HTTP/1.1 400 Bad", False),
        (b"", False),
        (TimeoutError("slow"), False),
    ],
)
def test_ray_is_known_by_the_frame_that_it_answers(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | OSError, is_ray: bool
) -> None:
    wire, asked = Wire(answer), list[Any]()
    for name in ("RAY_USE_TLS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight.socket, "create_connection", lambda at, timeout: asked.append((at, timeout)) or wire)
    if is_ray:
        preflight._knock("[::1]:6379")
    else:
        with pytest.raises(ClusterError, match="what answers there is not Ray"):
            preflight._knock("[::1]:6379")
    assert asked == [(("::1", 6379), 5.0)]
    assert wire.sent.startswith(b"PRI * HTTP/2.0") and wire.closed
    asked.clear()
    preflight._knock("auto")
    assert asked == []


def test_an_encrypted_cluster_is_not_asked_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(b"")
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setattr(preflight.socket, "create_connection", lambda *_, **__: wire)
    preflight._knock("host:6379")
    assert wire.sent == b"" and wire.closed


def test_a_host_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(preflight.socket, "create_connection", refuse)
    with pytest.raises(ClusterError, match=r"--ray-address host:1: no Ray cluster answers \(.*Connection refused\)"):
        preflight._knock("host:1")
