"""Decoding step by step over windows and tiles of every size, and filters that are remembered no longer than they hold.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operators.config import HyenaConfig
from operators.convolution.causal import fft_size
from operators.decoding import ahead
from operators.decoding.ahead import Ahead
from operators.decoding.frozen import Filters
from operators.registry import build
from tests.operators.cases import B, D, attention, close, draw, generator

LONG = 620  # blocks of 16 to 256 and cut ones, windows of 64, 128, 256 and a cut one


def operator_of(order: int = 2) -> Any:
    operator: Any = build(HyenaConfig(order=order, init="random"), D, LONG)
    operator.initialise(attention(), generator())
    return operator


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prompt", [1, 3, 100, 611])
@torch.no_grad()
def test_every_window_and_tile_is_exact(order: int, prompt: int) -> None:
    operator, x_BLD = operator_of(order).double(), draw(B, LONG, D).double()
    _, state = operator.extend(x_BLD[:, :prompt], operator.init_state(B))
    steps = [operator.extend(x_BLD[:, t : t + 1], state)[0] for t in range(prompt, LONG)]
    close(torch.cat(steps, dim=1), operator(x_BLD)[:, prompt:], 1e-12)


@torch.no_grad()
def test_chunks_crops_and_reorders_between_steps_are_exact() -> None:
    operator, x_BLD = operator_of(), draw(B, LONG, D)
    _, state = operator.extend(x_BLD[:, :50], operator.init_state(B))
    order = torch.tensor([2, 0, 1])
    for t in range(50, 90):
        operator.extend(x_BLD[:, t : t + 1], state)
    state.crop(80)
    operator.extend(x_BLD[:, 80:95], state)
    operator.extend(x_BLD[:, 95:96], state)
    state.reorder(order)
    steps = [operator.extend(x_BLD[order, t : t + 1], state)[0] for t in range(96, 240)]
    close(torch.cat(steps, dim=1), operator(x_BLD[order, :240])[:, 96:])


@pytest.mark.parametrize("prompt", [1, 40])
@torch.no_grad()
def test_every_input_meets_every_later_output_once(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PORTION", 1)
    z_BDT = torch.ones(1, 3, LONG, dtype=torch.float64)
    filters = Filters(lambda length: torch.ones(3, length, dtype=torch.float64), LONG)
    sums = Ahead(filters, slice(0, 3), z_BDT[..., :prompt])
    for t in range(prompt, LONG):
        y_B1D = sums.step(filters, z_BDT[..., t : t + 1].transpose(1, 2), z_BDT[..., : t + 1])
        close(y_B1D, torch.full_like(y_B1D, t + 1.0), 1e-12)


@torch.no_grad()
def test_no_step_transforms_much_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PORTION", 2**13)
    h_CL, z_BDT = draw(64, 4096), draw(1, 64, 4096)
    filters = Filters(lambda length: h_CL[:, :length].clone(), 4096)
    sums, worked = Ahead(filters, slice(0, 64), z_BDT[..., :1000]), [0] * 4096
    add = Ahead._add

    def counted(self: Ahead, filters: Filters, job: ahead.Job, past_BDT: Tensor, due: int) -> None:
        worked[self.position] += (due - job.done) * (job.stop - job.first + job.end - job.into)
        add(self, filters, job, past_BDT, due)

    monkeypatch.setattr(Ahead, "_add", counted)
    for t in range(1000, 4096):
        sums.step(filters, z_BDT[..., t : t + 1].transpose(1, 2), z_BDT[..., : t + 1])
    assert max(worked) < 6 * ahead.PORTION
    assert sum(worked) > 100 * ahead.PORTION


def test_sizes_of_transforms_have_small_factors_and_are_little_longer() -> None:
    for minimum in [*range(1, 1200), 4097, 20_001, 100_000]:
        size = rest = fft_size(minimum)
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1 and size % 2 == 0 and size >= minimum
        assert size <= max(64, 4 / 3 * minimum)


@pytest.mark.parametrize("built_inside", [True, False])
def test_inference_mode_is_no_trap(built_inside: bool) -> None:
    with torch.inference_mode(built_inside):
        operator, x_BLD = operator_of(), draw(B, 60, D)
    with torch.inference_mode():
        _, state = operator.extend(x_BLD[:, :50], operator.init_state(B))
        steps = [operator.extend(x_BLD[:, t : t + 1], state)[0] for t in range(50, 60)]
        close(torch.cat(steps, dim=1), operator(x_BLD)[:, 50:])
    if not built_inside:
        _, state = operator.extend(x_BLD[:, :50], operator.init_state(B))
        operator.extend(x_BLD[:, 50:], state)[0].sum().backward()
