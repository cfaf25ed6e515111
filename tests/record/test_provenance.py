"""What a run is remembered with: the truth about this process, and nothing that can stop it."""

from __future__ import annotations

import getpass
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from orchestrator.record import provenance
from orchestrator.record.provenance import Provenance, commit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    commit.cache_clear()


def test_it_names_this_process() -> None:
    told = Provenance.of("layerswap run studies/smoke.yaml")
    assert (told.command, told.host) == ("layerswap run studies/smoke.yaml", platform.node())
    assert told.versions["torch"] == torch.__version__ and f"torch {torch.__version__}" in told.hardware


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_the_commit_is_gits_own_and_says_where_files_differ() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT).returncode == 1
    assert commit() == head.stdout.strip() + ("+changes" if changed else "")


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert provenance.Provenance.of("run").user == "unknown"
