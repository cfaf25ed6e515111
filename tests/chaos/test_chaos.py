"""The short version of `make chaos`: one seed, so that `make test-all` tries the harness and what it checks."""

from __future__ import annotations

import random

import pytest

from tests.chaos.__main__ import chosen_kinds, main
from tests.chaos.faults import FAULTS


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_seed_ends_in_the_bits_of_the_undisturbed_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--seeds", "5", "--kinds", "checkpoint-torn,done-torn,worker-kill"])
    assert code == 0, capsys.readouterr().out


def test_fifty_seeds_throw_every_kind() -> None:
    thrown = {kind for seed in range(50) for kind in chosen_kinds(random.Random(seed), seed, list(FAULTS))}
    assert thrown == set(FAULTS)
