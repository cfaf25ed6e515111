"""What every type of model must pass that can be swapped, against its teacher, itself, or a definition.

A check is a function of a type's name. It raises AssertionError, or tells in a word where the teacher itself does not
do what is checked: then no more is asked of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.config import HyenaConfig, SkipConfig
from orchestrator.distill.measuring.statistics import attention_statistics
from orchestrator.distill.models.reading import read
from orchestrator.distill.models.sites import Site, call_of, decoder_layers, sites
from orchestrator.distill.models.swap import SwappedAttention, swap, swapped
from orchestrator.distill.training.head import check_output_head
from orchestrator.distill.training.losses import batch_losses, train_operators_only
from orchestrator.distill.training.recompute import recompute_layers
from orchestrator.study.recipe import LogitKL, Losses
from tests.models.decoding import beams, chunks, decoding, prefix, static
from tests.models.models import CHANNELS, HEADS, logits, near, student_of, takes, teacher_of, text
from tests.models.reading import reading

AS_TEACHER = "as its teacher"
ALL_LOSSES = Losses(kl=LogitKL(weight=1.0), ce=1.0, hidden_mse=1.0, mixer_mse=1.0)


def identity(name: str) -> str:
    """Nothing swapped: bitwise the model it was, whose logits losses can make of its hidden states."""
    teacher, other = teacher_of(name), teacher_of(name)
    assert swap(other, (), CHANNELS, torch.Generator()) == []
    assert torch.equal(logits(other, text()), logits(teacher, text()))
    check_output_head(teacher)
    return ""


def place(name: str) -> str:
    """Operators that give what attention gave make the model that it was, whatever its layers expect back."""
    teacher, student = teacher_of(name), teacher_of(name)
    seen: dict[int, Tensor] = {}
    for site in sites(teacher).values():
        site.attention.register_forward_hook(_mixed_by(site, seen), with_kwargs=True)
    wanted = logits(teacher, text())
    for placed in swap(student, sites(student), SkipConfig(), torch.Generator()):
        placed.operator.register_forward_hook(lambda _, __, ___, layer=placed.layer: seen[layer])
    assert near(logits(student, text()), wanted)
    return ""


def _mixed_by(site: Site, seen: dict[int, Tensor]) -> Callable[..., None]:
    call = call_of(site)

    def keep(_: nn.Module, given: Any, named: Any, answer: Any) -> None:
        seen[site.layer] = site.family.mixed(answer, call.by_name(given, named))

    return keep


def initialisation(name: str) -> str:
    """Every site swapped, by transfer and at random."""
    own = logits(teacher_of(name), text())
    for operator in (CHANNELS, HEADS, HyenaConfig(init="random")):
        student = teacher_of(name)
        layers = tuple(sites(student))
        statistics = attention_statistics(student, layers, text()) if operator.needs_statistics else {}
        before = {layer: read(site.attention, site.family).output for layer, site in sites(student).items()}
        swap(student, layers, operator, torch.Generator().manual_seed(0), statistics=statistics)
        there = sites(student)
        assert tuple(there) == layers == tuple(placed.layer for placed in swapped(student))
        assert all(isinstance(site.attention, SwappedAttention) for site in there.values())
        found = logits(student, text())
        assert bool(torch.isfinite(found).all()) and not torch.equal(found, own)
        for layer, site in there.items() if operator.init == "transfer" else ():
            assert torch.equal(site.attention.operator.out_proj.weight, before[layer])
    return ""


def losses(name: str) -> str:
    """Each loss is the one of the model's own logits, layers and attention."""
    teacher, student = teacher_of(name).requires_grad_(False), student_of(name)
    ids, layers = text(), tuple(sites(student))
    streams: list[dict[int, Tensor]] = [{}, {}]
    mixed: dict[int, Tensor] = {}
    for layer, site in sites(teacher).items():
        site.attention.register_forward_hook(_compare(mixed, layer, sites(student)[layer].attention), with_kwargs=True)
    for model, kept in zip((teacher, student), streams, strict=True):
        for layer in layers:
            decoder_layers(model)[layer].register_forward_hook(_keep(kept, layer))
    own, wanted = logits(student, ids), logits(teacher, ids)
    found = batch_losses(teacher, student, ids, layers, ALL_LOSSES)[1]
    log_own, log_wanted = (part[:, :-1].log_softmax(-1) for part in (own, wanted))
    divergence = (log_wanted.exp() * (log_wanted - log_own)).sum(-1).mean()
    entropy = F.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    hidden = torch.stack([F.mse_loss(streams[1][layer], streams[0][layer]) for layer in layers]).mean()
    mixer = torch.stack(list(mixed.values())).mean()
    for part, value in (("kl", divergence), ("ce", entropy), ("hidden_mse", hidden), ("mixer_mse", mixer)):
        assert torch.allclose(found[f"loss/{part}"], value, rtol=1e-3, atol=1e-6), part
    same = batch_losses(teacher, teacher_of(name), ids, layers, Losses(kl=1.0, hidden_mse=1.0))[1]
    assert float(same["loss/kl"].abs()) < 1e-5 and float(same["loss/hidden_mse"]) < 1e-9
    return ""


def _keep(kept: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.setdefault(layer, (output[0] if isinstance(output, tuple) else output).detach())

    return keep


def _compare(kept: dict[int, Tensor], layer: int, placed: SwappedAttention) -> Callable[..., None]:
    """The squared distance of the operator's output from the attention's: without the stream that BLOOM's adds, with
    the bias that the layer adds to a Japanese GPT-NeoX's."""

    def compare(_: nn.Module, given: Any, named: Any, answer: Any) -> None:
        x_BLD = given[0] if given else named["hidden_states"]
        beside = {"BloomAttention": lambda: -given[1], "GPTNeoXJapaneseAttention": lambda: _.dense_bias}
        more = beside.get(type(_).__name__, lambda: None)()
        with torch.no_grad():
            kept.setdefault(layer, F.mse_loss(placed.operator(x_BLD), answer[0] if more is None else answer[0] + more))

    return compare


def gradients(name: str) -> str:
    """They reach every new parameter and nothing frozen, and are the same where activations are made again, which
    leaves less of them in memory."""
    teacher = teacher_of(name).requires_grad_(False)
    found, kept = [], []
    for again in (False, True):
        student = student_of(name)
        student.requires_grad_(False)
        for placed in swapped(student):
            placed.requires_grad_(True)
        train_operators_only(student)
        if again:
            recompute_layers(student)
        bytes_of: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(_count, bytes_of), lambda tensor: tensor):
            loss = batch_losses(teacher, student, text(), tuple(sites(student)), ALL_LOSSES)[0]
        loss.backward()
        weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
        kept.append(sum(size for place, size in bytes_of.items() if place not in weights))
        gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
        trained = {key for key in gradients if ".operator." in key}
        assert {key for key, gradient in gradients.items() if gradient is not None} == trained
        assert all(bool(torch.isfinite(gradients[key]).all()) for key in trained)
        assert all(bool(gradients[key].any()) for key in trained), [k for k in trained if not gradients[k].any()]
        found.append({key: gradients[key] for key in trained})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert kept[1] < 0.8 * kept[0], kept
    return ""


def _count(bytes_of: dict[int, int], tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    bytes_of[storage.data_ptr()] = storage.nbytes()
    return tensor


def half(name: str) -> str:
    """In bfloat16: operators are of it, logits near those in single precision."""
    wanted = logits(student_of(name), text())
    student = student_of(name).to(torch.bfloat16)
    found = logits(student, text())
    low = logits(teacher_of(name).to(torch.bfloat16), text())
    assert found.dtype == low.dtype and bool(torch.isfinite(found).all())
    fresh = teacher_of(name).to(torch.bfloat16)
    placed = swap(fresh, sites(fresh), CHANNELS, torch.Generator().manual_seed(0))
    assert {parameter.dtype for one in placed for parameter in one.operator.out_proj.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(fresh, text())).all())
    off = float((low.float() - logits(teacher_of(name), text())).abs().mean())
    assert float((found.float() - wanted).abs().mean()) < max(4 * off, 0.05 * float(wanted.abs().mean()))
    return ""


def _with_padding(model: Any, ids: Tensor, left: bool) -> Tensor:
    """Logits of the second row, which is padded by four tokens that are not looked at."""
    padding = torch.zeros(1, 4, dtype=torch.long)
    parts = (padding, ids[1:, :-4]) if left else (ids[1:, :-4], padding)
    batch = torch.cat([ids[:1], torch.cat(parts, dim=1)])
    mask = torch.ones_like(batch)
    mask[1, slice(0, 4) if left else slice(-4, None)] = 0
    more: dict[str, Any] = {"attention_mask": mask}
    if takes(model, "position_ids"):
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    found = logits(model, batch, **more)[1]
    return found[4:] if left else found[:-4]


def padding(name: str) -> str:
    """A padded text has the logits it has alone, padded on either side."""
    ids, told = text(), set()
    teacher, students = teacher_of(name), [student_of(name), student_of(name, every=2)]
    for left in (True, False):
        if not near(_with_padding(teacher, ids, left), logits(teacher, ids[1:, :-4])[0]):
            told.add(f"{AS_TEACHER} ({'left' if left else 'right'})")
            continue
        for student in students:
            assert near(_with_padding(student, ids, left), logits(student, ids[1:, :-4])[0]), f"left {left}"
    return ", ".join(sorted(told))


def _packed(model: Any, documents: list[Tensor]) -> Tensor:
    """Logits of documents in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(document.shape[1])[None] for document in documents], dim=1)
    return logits(model, torch.cat(documents, dim=1), position_ids=positions)


def packing(name: str) -> str:
    """Packed documents have the logits they have alone."""
    teacher = teacher_of(name)
    documents = [text(1, 9, seed=2), text(1, 5, seed=3)]

    def alone(model: Any) -> Tensor:
        return torch.cat([logits(model, document) for document in documents], dim=1)

    if not takes(teacher, "position_ids") or not near(_packed(teacher, documents), alone(teacher)):
        return AS_TEACHER
    for student in (student_of(name), student_of(name, every=2)):
        assert near(_packed(student, documents), alone(student))
    return ""


CHECKS: dict[str, Callable[[str], str]] = {
    "identity": identity, "place": place, "reading": reading, "initialisation": initialisation, "losses": losses,
    "gradients": gradients, "bfloat16": half, "padding": padding, "packing": packing, "decoding": decoding,
    "chunks": chunks, "beams": beams, "static cache": static, "prefix": prefix,
}  # fmt: skip
