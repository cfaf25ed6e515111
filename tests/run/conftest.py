"""A small stage and where to compute it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.distill.context import RunContext
from orchestrator.study.sources import Location
from orchestrator.study.spec import SourceIdentity, TokensSpec


@pytest.fixture
def text(tmp_path: Path) -> tuple[TokensSpec, RunContext]:
    """A small stage: tokens of a file, and where to compute it."""
    (tmp_path / "text.txt").write_text("a long convolution is a convolution that is long\n" * 200)
    identity = SourceIdentity(source="text", fingerprint="f")
    spec = TokensSpec(
        train=identity, validation=identity, validation_share=None, sequence_length=16, vocabulary=300, teacher=None
    )
    locations = {"f": Location(files=(str(tmp_path / "text.txt"),))}
    return spec, RunContext(store=str(tmp_path / "store"), locations=locations)
