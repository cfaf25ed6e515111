"""`torch.compile` of models with operators in them: equal to eager, with one break in the graph an operator.

Shapes: B batch, L positions, D model width.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.operators.cases import CASES, B, D, close, draw, generator, make

LENGTH = 40
# Of torch's own: behind any break in a graph it looks at `.grad` of what comes in.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
    ),  # where it compiles
]


class Block(nn.Module):
    """A layer as models have it: a norm, an operator, and a small network, each with the input added."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.norm, self.operator, self.out = nn.LayerNorm(D), operator, nn.Linear(D, D)
        for parameter in self.out.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(3)) / 4

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.operator(self.norm(x_BLD))
        return x_BLD + torch.tanh(self.out(x_BLD))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[Any]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def results(model: nn.Module, module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Outputs with and without gradients, and gradients of inputs and parameters."""
    module.zero_grad()
    x_BLD = draw(B, LENGTH, D).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y_BLD = model(x_BLD)
        with torch.no_grad():
            outputs = [y_BLD, model(x_BLD)]
    y_BLD.float().square().sum().backward()
    found = [x_BLD.grad, *(p.grad for p in module.parameters())]
    return [*outputs, *(grad.clone() for grad in found if grad is not None)]


def compiled_is_eager(case: str, dtype: torch.dtype, backend: str) -> None:
    block = Block(make(case))
    expected = results(block, block, dtype)
    found = results(torch.compile(block, backend=backend), block, dtype)  # type: ignore[arg-type]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours.float(), theirs.float(), 0.02 if dtype == torch.bfloat16 else 1e-5)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert breaks <= 2 * (case != "skip")  # one with gradients, one without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["order 2", "heads", "power, full", "modal, heads", "skip"])
def test_compiled_blocks_equal_eager_ones(case: str, dtype: torch.dtype) -> None:
    compiled_is_eager(case, dtype, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor_takes_every_operator(case: str) -> None:
    compiled_is_eager(case, torch.bfloat16, "inductor")


@pytest.mark.parametrize("case", ["order 2", "heads", "modal, heads"])
@torch.no_grad()
def test_a_compiled_decoder_is_not_compiled_anew_at_every_step(case: str) -> None:
    operator, x_BLD = make(case), draw(B, LENGTH, D)
    state = operator.init_state(B)

    def decode(x_BnD: Tensor) -> Tensor:
        y_BnD: Tensor = operator.extend(torch.tanh(x_BnD), state)[0]
        return 2 * y_BnD

    step = torch.compile(decode, backend="aot_eager")
    outputs = [step(part) for part in x_BLD.split([20, *[1] * 20], dim=1)]
    close(torch.cat(outputs, dim=1), 2 * operator(torch.tanh(x_BLD)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
