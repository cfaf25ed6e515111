"""One number a layer that blends attention and operator, all trained together: another way to put layers in order.

As in differentiable architecture search (Liu et al. 2019, DARTS, section 2.2) every candidate layer gives a mixture,
(1 - g) attention(x) + g operator(x), and how far the gates g may be opened is learned with all layers open at once, so
that what layers do together counts. Attention is the teacher's own, so the divergence alone would shut every gate. What
presses against it is a constraint: the mean gate is 1/2 at every step, by g = sigmoid(a + c) with the one c that makes
it so. A layer can open only as others shut, so layers that do without their attention open, and the others shut. A
penalty would need a weight that fits the size of the divergence, or a state of its own to find one.

Shapes: B windows, L positions, D model width, K candidate layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.distill.context import Workplace
from orchestrator.distill.data import STUDENT_ORDER, batch, load_tokens
from orchestrator.distill.models.sites import Replacement, site_of
from orchestrator.distill.models.student import load_student, sharing
from orchestrator.distill.models.swap import SwappedAttention
from orchestrator.distill.start import swap_layers
from orchestrator.distill.training.frozen import frozen_teacher
from orchestrator.distill.training.loop import Parts, Training, autocast, prepare, train
from orchestrator.distill.training.losses import batch_losses
from orchestrator.distill.training.ranks import share
from orchestrator.files import write_json
from orchestrator.study.recipe import Losses, Optimizer
from orchestrator.study.spec import BlendSpec

GATES = "gates.json"
OPEN = 0.5  # the mean gate: half of the layers, were every gate open or shut
# A step of Adam moves a number by about its rate whatever the size of its gradient: 100 steps of 0.05, the last ones
# smaller, go from an even gate to one of 0.98. The norm of gradients has no say in that, so it is not clipped.
RATES = Optimizer(method="adamw", lr=0.05, betas=(0.9, 0.98), warmup=0.05, decay=0.4, gradient_clip=1e9)
HALVINGS = 60  # of the interval of the shift: to the last bits of float64


class Blended(Replacement):
    """An attention and the operator that may take its place, both computed: (1 - gate) of the one, `gate` of the other.

    Attributes:
        number: a, the parameter that is trained; gates are made of all layers' (`gates`).
        gate: share of the operator, a scalar; 1/2 until it is set. At 0 the output has the attention's bits, at 1 the
            operator's.
    """

    def __init__(self, attention: nn.Module, placed: SwappedAttention) -> None:
        super().__init__()
        self.attention, self.placed = attention, placed
        self.call, self.family = placed.call, placed.family
        self.number = nn.Parameter(torch.zeros((), device=next(attention.parameters()).device))
        self.gate = torch.full_like(self.number, OPEN, requires_grad=False)

    def forward(self, *positional: Any, **others: Any) -> Any:
        """As the attention: (B, L, D) -> what the layer expects back. Without a cache only, which would be of both."""
        given = self.call.by_name(positional, others)
        assert given.get(self.call.cache) is None, "a blend computes whole texts"
        one_BLD, other_BLD = (
            self.family.mixed(mixer(*positional, **others), given) for mixer in (self.attention, self.placed)
        )
        mixed_BLD = (1.0 - self.gate) * one_BLD + self.gate * other_BLD
        return self.family.answer(mixed_BLD.to(one_BLD.dtype), given)


def blend(spec: BlendSpec, place: Workplace) -> dict[str, Any]:
    """Train the gates of the candidate layers on the training text, all else frozen. They are kept as `gates.json` too.

    The loss is the divergence (teacher || blend). Killed and started again it ends with the same bits, see `train`.

    Returns:
        gates: by layer, as text, its gate: the layer whose gate is highest goes first. kl: the divergence on the batch
        that comes after the last one, nats per token. seconds, tokens, tokens_per_s and resumed_at as of any training.

    Raises:
        ValueError: a candidate is swapped already, or is not in the prepared student.
        NonFiniteLoss: the divergence is not finite.
    """
    prepare(spec.numerics, spec.seed)
    teacher = frozen_teacher(spec, place)
    student = load_student(place.inputs["subject"], sharing(teacher)).eval()
    blends = blend_layers(student, spec, place)
    tokens, size, device = load_tokens(place.inputs["tokens"], "train"), spec.batch_size, place.context.device

    def loss(step: int) -> tuple[Tensor, Parts]:
        mine = share(spec.first_sequence + step * size, size)
        ids_BL = batch(tokens, spec.sequence_length, spec.seed + STUDENT_ORDER, *mine, spec.text_windows).to(device)
        set_gates(blends)
        with autocast(spec.numerics, device):
            return batch_losses(teacher, student, ids_BL, spec.layers, Losses(kl=1.0))

    numbers = [each.number for each in blends.values()]
    optimizer = torch.optim.Adam([{"params": numbers, "lr": RATES.lr, "initial_lr": RATES.lr}], betas=RATES.betas)
    result = train(Training(student, [optimizer], RATES, spec.steps, size * spec.sequence_length, loss), place)
    with torch.no_grad():
        divergence = float(loss(spec.steps)[0])
    found = {str(layer): float(each.gate) for layer, each in blends.items()}
    write_json(place.out / GATES, found)
    return {**result, "gates": found, "kl": divergence}


def blend_layers(student: Any, spec: BlendSpec, place: Workplace) -> dict[int, Blended]:
    """Put a blend in the place of each candidate's attention (in place), and freeze all but their numbers; by layer."""
    attentions = {layer: site_of(student, layer).attention for layer in spec.layers}
    swap_layers(student, spec.layers, spec, place)
    student.eval().requires_grad_(False)
    blends = {}
    for layer, attention in attentions.items():
        site = site_of(student, layer)
        blends[layer] = Blended(attention, site.attention)
        setattr(site.parent, site.name, blends[layer].eval())
    return blends


def set_gates(blends: dict[int, Blended]) -> None:
    """Set the gates of all layers by their numbers, so that gradients of gates reach them."""
    gates_K = gates(torch.stack([each.number for each in blends.values()]))
    for each, gate in zip(blends.values(), gates_K, strict=True):
        each.gate = gate


def gates(numbers_K: Tensor) -> Tensor:
    """sigmoid(a + c), (K,), with the one c by which their mean is 1/2; differentiable, c included.

    The gradient of c is that of the equation which it solves: a number that rises pushes all gates down.
    """
    with torch.no_grad():
        wide_K = numbers_K.double()
        low, high = -wide_K.max(), -wide_K.min()  # at which no gate is above 1/2, and none below
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = torch.sigmoid(wide_K + middle).mean() > OPEN
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        shift = ((low + high) / 2).to(numbers_K.dtype)
        open_K = torch.sigmoid(numbers_K + shift)
        slope_K = open_K * (1.0 - open_K)
        share_K = slope_K / slope_K.sum()  # c is so exact that one slope at least is no zero
    moved = (share_K * (numbers_K - numbers_K.detach())).sum()  # zero, with the gradient of -c
    return torch.sigmoid(numbers_K + shift - moved)
