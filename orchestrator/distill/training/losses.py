"""Distillation losses, each a mean over valid tokens, so a weight means the same at any batch and length.

Place in the flow: `distil` asks for the losses of a batch and differentiates their weighted sum. Invariant: logits are
made in chunks of tokens and made again in backward, so memory does not grow with batch x vocabulary.

Shapes: B batch, L positions, N = B (L - 1) predicting positions, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrator.distill.models.sites import Site, attention_of, call_of, decoder_layers, site_of
from orchestrator.distill.models.swap import swapped
from orchestrator.distill.training.head import OutputHead, final_hidden
from orchestrator.study.schema import LogitKL, Losses

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
    terms: dict[str, tuple[float, Tensor]] = {}
    parts: dict[str, Tensor] = {}
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
        terms["mixer_mse"] = (losses.mixer_mse, torch.stack(list(each.values())).mean())
        parts |= {f"loss/mixer_mse/layer_{i}": value.detach() for i, value in each.items()}
    if kl.weight > 0 or losses.ce > 0 or losses.hidden_mse > 0:
        with recorded(student, (), streams) as own:
            student_final = final_hidden(student, ids_BL)
        if streams:
            each = {i: F.mse_loss(own.hidden[i], seen.hidden[i]) for i in streams}
            terms["hidden_mse"] = (losses.hidden_mse, torch.stack(list(each.values())).mean())
            parts |= {f"loss/hidden_mse/layer_{i}": value.detach() for i, value in each.items()}
        if kl.weight > 0 or losses.ce > 0:
            heads = OutputHead(teacher), OutputHead(student)
            divergence, entropy = logit_losses(teacher_final, student_final, *heads, ids_BL, kl, losses.ce > 0)
            if kl.weight > 0:
                terms["kl"] = (kl.weight, divergence)
            if losses.ce > 0:
                terms["ce"] = (losses.ce, entropy)
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    for name, (weight, value) in terms.items():
        parts[f"loss/{name}"] = value.detach()
        parts[f"weighted/{name}"] = weight * value.detach()
    return total, parts


def next_token_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats per valid token; logits in chunks."""
    no_kl = LogitKL(weight=0.0)
    return logit_losses(None, final_hidden(model, ids_BL), None, OutputHead(model), ids_BL, no_kl, True)[1]


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
    with_ce: bool,
) -> tuple[Tensor, Tensor]:
    """Mean divergence and cross-entropy over the N positions that have a next token; 0 for one not asked for.

    The divergence is scaled by the squared temperature, so that its gradient keeps its size (Hinton et al. 2015).
    """
    student_ND = student_BLD[:, :-1].flatten(0, 1)
    teacher_ND = None if teacher_BLD is None or kl.weight == 0 else teacher_BLD[:, :-1].flatten(0, 1)
    targets_N = ids_BL[:, 1:].flatten()
    size = chunk_size(student_head, student_ND.device)

    def chunk(hidden: Tensor, target: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = student_head(hidden).float()
        divergence = entropy = logits.new_zeros(())
        if with_ce:
            entropy = F.cross_entropy(logits, target, reduction="sum")
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                wanted = F.log_softmax(teacher_head(teacher).float() / kl.temperature, dim=-1)
            have = F.log_softmax(logits / kl.temperature, dim=-1)
            first, second = (have, wanted) if kl.direction == "forward" else (wanted, have)
            divergence = F.kl_div(first, second, reduction="sum", log_target=True) * kl.temperature**2
        return divergence, entropy

    count = len(targets_N)
    sums = student_ND.new_zeros((2,), dtype=torch.float32)
    for start in range(0, count, size):
        cut = slice(start, start + size)
        given = (student_ND[cut], targets_N[cut], None if teacher_ND is None else teacher_ND[cut])
        again = count > size  # nothing in a chunk is random
        values = checkpoint(chunk, *given, use_reentrant=False, preserve_rng_state=False) if again else chunk(*given)
        sums = sums + torch.stack(values)
    mean = sums / count
    return mean[0], mean[1]
