"""Distillation losses, each a mean over valid tokens, so a weight means the same at any batch and length.

Place in the flow: `distil` asks for the losses of a batch and differentiates their weighted sum. Invariant: logits are
made once, in chunks of tokens, and what their losses give back is computed with them: nothing as large as a chunk lives
longer than the chunk, so memory does not grow with batch x vocabulary.

Shapes: B batch, L positions, N = B (L - 1) predicting positions, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from orchestrator.distill.hits import trigram_hits
from orchestrator.distill.models.sites import Site, attention_of, call_of, decoder_layers, site_of
from orchestrator.distill.models.swap import swapped
from orchestrator.distill.training.head import OutputHead, final_hidden
from orchestrator.distill.training.ranks import mean
from orchestrator.study.recipe import LogitKL, Losses

# Float32 numbers of one chunk's logits: 16 MB, which a CPU's cache holds; 256 MB, which keep an accelerator busy.
LOGITS_PER_CHUNK, LOGITS_ELSEWHERE = 1 << 22, 1 << 26


@dataclasses.dataclass
class Activations:
    """What flows through chosen layers in one forward: attention inputs and outputs, residual stream after."""

    mixer_in: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    mixer_out: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[int, Tensor] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def recorded(model: Any, mixers: tuple[int, ...], streams: tuple[int, ...]) -> Iterator[Activations]:
    """Record, while the context lasts, what goes into and comes out of the mixers of some layers, and the residual
    stream after others; each (B, L, D). Nothing else is held.
    """
    seen = Activations()
    handles = []

    def keep_mixer(site: Site) -> Any:
        call = call_of(site)

        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = call.by_name(args, kwargs)
            seen.mixer_in[site.layer] = given["hidden_states"]
            seen.mixer_out[site.layer] = site.family.mixed(output, given)

        return keep

    def keep_stream(layer: int) -> Any:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            seen.hidden[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    for layer in mixers:
        site = site_of(model, layer)
        handles.append(site.attention.register_forward_hook(keep_mixer(site), with_kwargs=True))
    for layer in streams:
        handles.append(decoder_layers(model)[layer].register_forward_hook(keep_stream(layer)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def train_operators_only(student: Any) -> None:
    """Put swapped layers in training mode and all else in evaluation mode, as distillation wants its student.

    Without this the dropout of the teacher's configuration, in modules or in the attention's own code, would be on in
    the student and off in the targets: two models of the same weights would differ. What trains is another matter, see
    `make_optimizers`.
    """
    student.eval()
    for placed in swapped(student):
        placed.train()


def batch_losses(
    teacher: Any, student: Any, ids_BL: Tensor, layers: tuple[int, ...], losses: Losses
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of a batch and its parts.

    Args:
        teacher: frozen model.
        student: model with `layers` swapped.
        ids_BL: token ids.
        layers: where the mixer and hidden losses are taken.
        losses: weights; a loss of weight 0 is not computed.

    Returns:
        The scalar to differentiate, and detached parts: `loss/NAME` raw, `weighted/NAME`, and
        `loss/NAME/layer_I` for the losses taken at layers.
    """
    terms: list[Tensor] = []
    parts: dict[str, Tensor] = {}

    def note(name: str, weight: float, value: Tensor) -> None:
        parts[f"loss/{name}"] = value.detach()
        parts[f"weighted/{name}"] = weight * value.detach()

    def over_layers(name: str, weight: float, each: dict[int, Tensor]) -> None:
        error = torch.stack(list(each.values())).mean()
        terms.append(weight * error)
        note(name, weight, error)
        parts.update({f"loss/{name}/layer_{i}": value.detach() for i, value in each.items()})

    kl = losses.logit_kl
    needs_teacher = kl.weight > 0 or losses.hidden_mse > 0 or losses.mixer_mse > 0
    mixers = layers if losses.mixer_mse > 0 else ()
    streams = layers if losses.hidden_mse > 0 else ()
    teacher_final = None
    seen = Activations()
    if needs_teacher:
        with torch.no_grad(), recorded(teacher, mixers, streams) as seen:
            teacher_final = final_hidden(teacher, ids_BL)
        teacher_final = teacher_final if kl.weight > 0 else None
    if mixers:
        each = {i: F.mse_loss(attention_of(student, i)(seen.mixer_in[i])[0], seen.mixer_out[i]) for i in mixers}
        over_layers("mixer_mse", losses.mixer_mse, each)
    if kl.weight > 0 or losses.ce > 0 or losses.hidden_mse > 0:
        with recorded(student, (), streams) as own:
            student_final = final_hidden(student, ids_BL)
        if streams:
            each = {i: F.mse_loss(own.hidden[i], seen.hidden[i]) for i in streams}
            over_layers("hidden_mse", losses.hidden_mse, each)
        if kl.weight > 0 or losses.ce > 0:
            heads = OutputHead(teacher), OutputHead(student)
            weighted, divergence, entropy = logit_losses(
                teacher_final, student_final, *heads, ids_BL, kl, losses.ce, losses.hit_weight
            )
            terms.append(weighted)
            if kl.weight > 0:
                note("kl", kl.weight, divergence)
            if losses.ce > 0:
                note("ce", losses.ce, entropy)
    return torch.stack(terms).sum(), parts


def next_token_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats per valid token; logits in chunks."""
    no_kl = LogitKL(weight=0.0)
    return logit_losses(None, final_hidden(model, ids_BL), None, OutputHead(model), ids_BL, no_kl, 1.0)[0]


def chunk_size(head: OutputHead, device: torch.device) -> int:
    """Positions whose logits are made at a time on a device."""
    most = LOGITS_PER_CHUNK if device.type == "cpu" else LOGITS_ELSEWHERE
    return max(1, most // head.vocabulary)


def logit_losses(
    teacher_BLD: Tensor | None,
    student_BLD: Tensor,
    teacher_head: OutputHead | None,
    student_head: OutputHead,
    ids_BL: Tensor,
    kl: LogitKL,
    ce: float,
    hit_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the N positions that have a next token: mean divergence and cross-entropy, and their sum by weight.

    The divergence is scaled by the squared temperature, so that its gradient keeps its size (Hinton et al. 2015).

    Args:
        kl: its weight, direction and temperature; not computed with weight 0.
        ce: weight of the cross-entropy; not computed where it is 0.
        hit_weight: what a position counts whose next token is a hit (`hits`), others 1.

    Returns:
        The weighted sum, which may be differentiated once, and the two means, 0 for one that is not computed.
    """
    student_ND = student_BLD[:, :-1].flatten(0, 1)
    teacher_ND = None if teacher_BLD is None or kl.weight == 0 else teacher_BLD[:, :-1].flatten(0, 1)
    targets_N = ids_BL[:, 1:].flatten()
    counts_N = torch.where(trigram_hits(ids_BL).flatten(), hit_weight, 1.0) if hit_weight != 1 else None
    # Of the whole batch, where ranks share it: each of their parts is as long, but has hits of its own.
    count, summed = (len(targets_N), "sum") if counts_N is None else (mean(counts_N.sum()), "none")

    def total(found: Tensor, cut: slice) -> Tensor:
        """What was summed as it is; else the sum over some positions, by what they count, and over entries."""
        return found if counts_N is None else torch.tensordot(counts_N[cut], found, dims=1).sum()

    def means(hidden: Tensor, cut: slice) -> tuple[Tensor, Tensor]:
        logits = student_head(hidden).float()
        divergence = entropy = logits.new_zeros(())
        if ce > 0:
            entropy = total(F.cross_entropy(logits, targets_N[cut], reduction=summed), cut)
        if teacher_ND is not None and teacher_head is not None:
            with torch.no_grad():
                wanted = F.log_softmax(teacher_head(teacher_ND[cut]).float() / kl.temperature, dim=-1)
            have = F.log_softmax(logits / kl.temperature, dim=-1)
            first, second = (have, wanted) if kl.direction == "forward" else (wanted, have)
            divergence = total(F.kl_div(first, second, reduction=summed, log_target=True), cut) * kl.temperature**2
        return divergence / count, entropy / count

    parameters = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    size = chunk_size(student_head, student_ND.device)
    weighted: Tensor
    weighted, both = _InChunks.apply(  # type: ignore[no-untyped-call]
        means, (kl.weight, ce), size, student_ND, *parameters
    )
    return weighted, both[0], both[1]


class _InChunks(torch.autograd.Function):
    """The sum by weight of two values that are sums over chunks of positions, whose gradients are taken chunk by chunk.

    Gradients of logits need logits, which would have to be kept, or made again in backward with those of the teacher.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        weights: tuple[float, float],
        size: int,
        hidden_ND: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        ctx.gradients = [torch.zeros_like(tensor) for tensor in (hidden_ND, *parameters)]
        of_hidden, *of_parameters = ctx.gradients
        sums = hidden_ND.new_zeros((2,), dtype=torch.float32)
        for start in range(0, len(hidden_ND), size):
            cut = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                hidden = hidden_ND[cut].detach().requires_grad_()
                found = torch.stack(values(hidden, cut))
            if wanted:
                each = torch.autograd.grad(found, (hidden, *parameters), found.new_tensor(weights), allow_unused=True)
                of_hidden[cut] = each[0]
                for kept, new in zip(of_parameters, each[1:], strict=True):
                    if new is not None:
                        kept += new
            sums += found.detach()
        ctx.mark_non_differentiable(sums)
        return (sums * sums.new_tensor(weights)).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the losses of a batch have been differentiated: they can be once")
        gradients, ctx.gradients = ctx.gradients, None  # as large as the weights of an output head: handed on, not kept
        return None, None, None, *(gradient.mul_(scale) for gradient in gradients)
