"""Cores and memory of a control group: its own limit and those above it hold, and what is not told limits nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from orchestrator.distill.context import RunContext
from orchestrator.run import limits as module
from orchestrator.run.cluster import ClusterError
from orchestrator.run.limits import cores, memory_left
from orchestrator.run.preflight import available_bytes, cores_asked


class Groups:
    """The files of control groups, and the lines that say which ones this process is in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(f"{text}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(module, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "membership").write_text("3:memory:/job/step\n2:cpu,cpuacct:/job/step\n0::/job/step\n")
    return Groups(tmp_path / "cgroup")


def test_without_a_quota_a_process_has_the_cores_that_it_is_bound_to(groups: Groups) -> None:
    assert cores() == 8
    groups.write("job/step/cpu.max", "max 100000")
    groups.write("cpu/job/step/cpu.cfs_quota_us", "-1")
    groups.write("cpu/job/step/cpu.cfs_period_us", "100000")
    assert cores() == 8


@pytest.mark.parametrize("folder", ["job/step", "job", ""])
@pytest.mark.parametrize(("quota", "count"), [("350000 100000", 3), ("100000 50000", 2), ("20000 100000", 1)])
def test_a_quota_of_any_group_above_counts_rounded_down(groups: Groups, folder: str, quota: str, count: int) -> None:
    groups.write("job/step/cpu.max", "max 100000")
    groups.write(f"{folder}/cpu.max".lstrip("/"), quota)
    assert cores() == count


def test_a_quota_of_version_1(groups: Groups) -> None:
    groups.write("cpu,cpuacct/job/cpu.cfs_quota_us", "250000")
    groups.write("cpu,cpuacct/job/cpu.cfs_period_us", "100000")
    (groups.root / "cpu").symlink_to("cpu,cpuacct")
    assert cores() == 2


def test_where_nothing_binds_a_process_the_machine_counts(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, which has no such function and no such files."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(module, "MEMBERSHIP", groups.root / "absent")
    assert cores() == 5 and memory_left() == math.inf


def test_memory_is_what_a_group_has_left_and_what_it_drops(groups: Groups) -> None:
    assert memory_left() == math.inf
    groups.write("job/memory.max", "5000000")
    groups.write("job/memory.current", "2000000")
    assert memory_left() == 3_000_000  # the limit holds whatever is told of files
    groups.write("job/memory.stat", "anon 1\nactive_file 7")
    assert memory_left() == 3_000_000
    groups.write("job/memory.stat", "anon 1\ninactive_file 600000\nactive_file 7")  # read once: dropped when it is full
    assert memory_left() == 3_600_000
    assert available_bytes(RunContext(store="s")) == 3_600_000
    groups.write("memory/job/step/memory.limit_in_bytes", "4000000")
    groups.write("memory/job/step/memory.usage_in_bytes", "3000000")
    groups.write(
        "memory/job/step/memory.stat", "inactive_file 5\ntotal_inactive_file 800000"
    )  # alone, with those below
    assert memory_left() == 1_800_000
    groups.write("memory/job/step/memory.limit_in_bytes", "max")
    groups.write("job/memory.max", "max")
    assert memory_left() == math.inf


def test_fewer_cores_may_be_asked_for_and_no_more(groups: Groups) -> None:
    assert [cores_asked(None, None), cores_asked(3, None), cores_asked(None, "10.0.0.1:6379")] == [8, 3, 8]
    with pytest.raises(ClusterError, match=r"--cpus 9: this process may use 8 cores: lower it, or leave it out"):
        cores_asked(9, None)
    with pytest.raises(ClusterError, match=r"--cpus 2 is of this machine, and --ray-address 10\.0\.0\.1:6379 of other"):
        cores_asked(2, "10.0.0.1:6379")
