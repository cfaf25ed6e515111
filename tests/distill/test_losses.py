"""Every loss against its formula written out plainly, in chunks and whole, and only those that have a weight."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.config import HyenaConfig
from orchestrator.distill.models.sites import attention_of
from orchestrator.distill.models.swap import swap
from orchestrator.distill.training import losses as module
from orchestrator.distill.training.head import OutputHead, final_hidden
from orchestrator.distill.training.losses import batch_losses, logit_losses, next_token_loss, recorded
from orchestrator.study.recipe import LogitKL, Losses

LAYERS = (0, 2)


@pytest.fixture
def student(tiny_teacher: Any) -> Any:
    from orchestrator.distill.models.student import load_teacher

    model = load_teacher(tiny_teacher)
    swap(model, LAYERS, HyenaConfig(heads=4), torch.Generator().manual_seed(0))
    return model.requires_grad_(True).train()


def probabilities(model: Any, ids: Tensor, temperature: float = 1.0) -> list[list[float]]:
    """Next-token distributions at the positions that have a next token, one row a position."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).double() / temperature
    rows = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return rows.tolist()  # type: ignore[no-any-return]


def divergence(first: list[list[float]], second: list[list[float]]) -> float:
    p, q = torch.tensor(first).double(), torch.tensor(second).double()
    return sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)) / len(p)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_the_mean_divergence_times_the_squared_temperature(
    teacher: Any, student: Any, ids: Tensor, direction: Any, temperature: float
) -> None:
    losses = Losses(kl=LogitKL(weight=3.0, direction=direction, temperature=temperature))
    total, parts = batch_losses(teacher, student, ids, LAYERS, losses)
    pair = [probabilities(model, ids, temperature) for model in (teacher, student)]
    wanted = divergence(*(pair if direction == "forward" else pair[::-1])) * temperature**2
    assert parts["loss/kl"].item() == pytest.approx(wanted, rel=1e-3)
    assert parts["weighted/kl"].item() == pytest.approx(3 * wanted, rel=1e-3)
    assert total.item() == pytest.approx(3 * wanted, rel=1e-3)


def test_a_plain_number_for_kl_is_the_forward_divergence_at_temperature_1(
    teacher: Any, student: Any, ids: Tensor
) -> None:
    plain = batch_losses(teacher, student, ids, LAYERS, Losses(kl=0.5))[0]
    told = batch_losses(teacher, student, ids, LAYERS, Losses(kl=LogitKL(weight=0.5)))[0]
    assert torch.equal(plain, told)


def test_kl_does_not_change_where_the_teacher_agrees(teacher: Any, ids: Tensor) -> None:
    total, _ = batch_losses(teacher, teacher, ids, LAYERS, Losses(kl=1.0))
    assert total.item() == 0.0


def test_ce_is_the_mean_surprise_at_the_next_token(teacher: Any, student: Any, ids: Tensor) -> None:
    rows = probabilities(student, ids)
    targets = ids[:, 1:].flatten().tolist()
    wanted = -sum(float(torch.tensor(row[t]).log()) for row, t in zip(rows, targets, strict=True)) / len(targets)
    total, parts = batch_losses(teacher, student, ids, LAYERS, Losses(ce=1.0))
    assert total.item() == pytest.approx(wanted, rel=1e-4)
    assert parts["loss/ce"].item() == pytest.approx(wanted, rel=1e-4)
    assert next_token_loss(student, ids).item() == pytest.approx(wanted, rel=1e-4)


def flow(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The residual stream before and after every layer, from the definition of a GPT-NeoX layer's call."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    for layer in model.gpt_neox.layers:
        layer.register_forward_pre_hook(lambda _, args: before.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: after.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    return before, after


def test_mixer_mse_compares_operator_and_attention_fed_the_teachers_input(
    teacher: Any, student: Any, ids: Tensor
) -> None:
    total, parts = batch_losses(teacher, student, ids, LAYERS, Losses(mixer_mse=2.0))
    before, _ = flow(teacher, ids)
    wanted = []
    for i in LAYERS:
        x_BLD = teacher.gpt_neox.layers[i].input_layernorm(before[i])
        position = teacher.gpt_neox.rotary_emb(x_BLD, torch.arange(ids.shape[1])[None])
        causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        attended = attention_of(teacher, i)(x_BLD, attention_mask=causal, position_embeddings=position)[0]
        wanted.append(((attention_of(student, i)(x_BLD)[0] - attended) ** 2).mean().item())
        assert parts[f"loss/mixer_mse/layer_{i}"].item() == pytest.approx(wanted[-1], rel=1e-4)
    assert total.item() == pytest.approx(2 * sum(wanted) / 2, rel=1e-4)
    assert set(parts) == {"loss/mixer_mse", "weighted/mixer_mse", *(f"loss/mixer_mse/layer_{i}" for i in LAYERS)}


def test_hidden_mse_compares_the_residual_streams_each_model_fed_its_own(
    teacher: Any, student: Any, ids: Tensor
) -> None:
    total, parts = batch_losses(teacher, student, ids, LAYERS, Losses(hidden_mse=0.5))
    own, wanted = flow(student, ids)[1], flow(teacher, ids)[1]
    each = {i: ((own[i] - wanted[i]) ** 2).mean().item() for i in LAYERS}
    for i, value in each.items():
        assert parts[f"loss/hidden_mse/layer_{i}"].item() == pytest.approx(value, rel=1e-4)
    assert parts["loss/hidden_mse"].item() == pytest.approx(sum(each.values()) / 2, rel=1e-4)
    assert total.item() == pytest.approx(0.5 * sum(each.values()) / 2, rel=1e-4)


def test_the_total_is_the_weighted_sum_of_the_parts(teacher: Any, student: Any, ids: Tensor) -> None:
    losses = Losses(mixer_mse=0.1, hidden_mse=0.2, kl=0.3, ce=0.4)
    total, parts = batch_losses(teacher, student, ids, LAYERS, losses)
    weights = {"mixer_mse": 0.1, "hidden_mse": 0.2, "kl": 0.3, "ce": 0.4}
    for name, weight in weights.items():
        assert parts[f"weighted/{name}"].item() == pytest.approx(weight * parts[f"loss/{name}"].item())
    assert total.item() == pytest.approx(sum(parts[f"weighted/{name}"].item() for name in weights), rel=1e-5)
    assert not any(value.requires_grad for value in parts.values())


@pytest.mark.parametrize("positions", [1, 7, 38, 1000])
@pytest.mark.parametrize("kl", [LogitKL(weight=1.0, direction="reverse", temperature=1.5), LogitKL(weight=0.0)])
def test_chunks_change_neither_losses_nor_gradients(
    teacher: Any, student: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch, positions: int, kl: LogitKL
) -> None:
    heads = OutputHead(teacher), OutputHead(student)
    found = []
    for size in (1 << 22, positions * 300):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", size)
        student.zero_grad()
        values = logit_losses(final_hidden(teacher, ids), final_hidden(student, ids), *heads, ids, kl, 0.5)
        values[0].backward()
        gradients = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
        found.append([*values, *gradients])
    assert len(found[0]) > 20
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-6)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("this was not to be computed")


@pytest.mark.parametrize(
    ("losses", "untouched"),
    [
        (Losses(ce=1.0), lambda teacher, student: teacher.base_model),
        (Losses(ce=1.0), lambda teacher, student: teacher.get_output_embeddings()),
        (Losses(mixer_mse=1.0), lambda teacher, student: student.base_model),
        (Losses(hidden_mse=1.0), lambda teacher, student: student.get_output_embeddings()),
        (Losses(mixer_mse=1.0, hidden_mse=1.0), lambda teacher, student: teacher.get_output_embeddings()),
    ],
    ids=["ce: teacher", "ce: teacher's head", "mixer: student", "hidden: head", "both: teacher's head"],
)
def test_what_no_weight_asks_for_is_not_computed(
    teacher: Any, student: Any, ids: Tensor, losses: Losses, untouched: Callable[..., Any]
) -> None:
    untouched(teacher, student).register_forward_pre_hook(refuse)
    _, parts = batch_losses(teacher, student, ids, LAYERS, losses)
    asked = {name for name in ("mixer_mse", "hidden_mse", "ce") if getattr(losses, name) > 0}
    assert {name.split("/")[1] for name in parts} == asked


def test_gradients_reach_the_student_only(teacher: Any, student: Any, ids: Tensor) -> None:
    losses = Losses(mixer_mse=1.0, hidden_mse=1.0, kl=1.0, ce=1.0)
    batch_losses(teacher, student, ids, LAYERS, losses)[0].backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


def test_recording_ends_with_its_context(teacher: Any, ids: Tensor) -> None:
    with recorded(teacher, (1,), (1,)) as seen:
        final_hidden(teacher, ids)
    assert list(seen.hidden) == list(seen.mixer_in) == list(seen.mixer_out) == [1]
    first = seen.hidden[1]
    final_hidden(teacher, ids)
    assert seen.hidden[1] is first


@pytest.mark.parametrize(
    ("losses", "held"),
    [
        (Losses(kl=1.0), {"final": 1}),
        (Losses(kl=1.0, hidden_mse=1.0), {"final": 1, "stream": 2}),
        (Losses(hidden_mse=1.0), {"stream": 2}),
        (Losses(mixer_mse=1.0), {"into mixer": 2, "out of mixer": 2}),
        (Losses(mixer_mse=1.0, kl=1.0), {"into mixer": 2, "out of mixer": 2, "final": 1}),
        (Losses(ce=1.0), {}),
    ],
    ids=["kl", "kl and hidden", "hidden", "mixer", "mixer and kl", "ce"],
)
def test_of_the_teachers_forward_only_what_a_loss_needs_is_held(
    teacher: Any, student: Any, ids: Tensor, losses: Losses, held: dict[str, int]
) -> None:
    """Counted when the student begins, in all layers: tensors of the teacher's forward that somebody still holds."""
    made: list[tuple[str, weakref.ref[Tensor]]] = []

    def note(kind: str, value: Tensor) -> None:
        made.append((kind, weakref.ref(value)))

    for layer, block in enumerate(teacher.gpt_neox.layers):
        attention_of(teacher, layer).register_forward_pre_hook(lambda _, args: note("into mixer", args[0]))
        attention_of(teacher, layer).register_forward_hook(lambda _, args, output: note("out of mixer", output[0]))
        block.register_forward_hook(lambda _, args, output: note("stream", output))
    teacher.gpt_neox.register_forward_hook(lambda _, args, output: note("final", output.last_hidden_state))
    counted: list[dict[str, int]] = []

    def count(*_: Any) -> None:
        counted.append(dict(Counter(kind for kind, value in made if value() is not None)))

    for module_ in (student.gpt_neox, attention_of(student, LAYERS[0])):
        module_.register_forward_pre_hook(count)
    batch_losses(teacher, student, ids, LAYERS, losses)
    assert len(made) == (10 if losses != Losses(ce=1.0) else 0)
    assert counted[0] == held


def test_a_loss_that_is_not_asked_for_is_zero(teacher: Any, student: Any, ids: Tensor) -> None:
    heads, kl = (OutputHead(teacher), OutputHead(student)), LogitKL(weight=1.0)
    hidden = final_hidden(teacher, ids), final_hidden(student, ids)
    weighted, divergence, entropy = logit_losses(*hidden, *heads, ids, kl, ce=0.0)
    assert weighted == divergence > 0 and entropy == 0
    weighted, divergence, entropy = logit_losses(None, hidden[1], None, heads[1], ids, LogitKL(weight=0.0), ce=2.0)
    assert divergence == 0 and weighted == 2 * entropy > 0


@pytest.mark.parametrize(("positions", "made"), [(38, 1), (37, 2), (19, 2), (13, 3)])
def test_logits_are_made_once_and_none_outlives_its_chunk(
    teacher: Any, student: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch, positions: int, made: int
) -> None:
    """Of 38 positions, by both models; when a chunk's are made, and after the last, no other's are there."""
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", positions * 300)
    hidden, alive = final_hidden(teacher, ids).detach().requires_grad_(), []
    logits: dict[Any, list[weakref.ref[Tensor]]] = {teacher: [], student: []}

    def note(model: Any, output: Tensor) -> None:
        alive.append(sum(old() is not None for old in logits[model]))
        logits[model].append(weakref.ref(output))

    for model in (teacher, student):
        model.get_output_embeddings().register_forward_hook(lambda _, __, output, model=model: note(model, output))
    heads = OutputHead(teacher), OutputHead(student)
    value = logit_losses(hidden, hidden, *heads, ids, LogitKL(weight=1.0), 1.0)[0]
    assert [old() for old in (*logits[teacher], *logits[student])] == [None] * 2 * made
    value.backward()
    assert [len(each) for each in logits.values()] == [made, made]
    assert set(alive) == {0}
    assert hidden.grad is not None and hidden.grad[:, :-1].abs().amin() > 0


def test_gradients_are_those_of_plain_logits_at_any_scale(teacher: Any, student: Any, ids: Tensor) -> None:
    """Of the weighted sum, times what it is multiplied by, with respect to hidden states and the head's weights."""
    hidden = final_hidden(student, ids).detach().requires_grad_()
    weight = student.get_output_embeddings().weight
    targets = ids[:, 1:].flatten()
    have = F.log_softmax(hidden[:, :-1].flatten(0, 1) @ weight.T / 2, dim=-1)
    wanted = torch.tensor(probabilities(teacher, ids, 2.0)).float()
    of_kl = 4 * (wanted * (wanted.log() - have)).sum(-1).mean()
    of_ce = F.cross_entropy(hidden[:, :-1].flatten(0, 1) @ weight.T, targets)
    plain = torch.autograd.grad(3 * (0.7 * of_kl + 0.2 * of_ce), (hidden, weight))
    heads = OutputHead(teacher), OutputHead(student)
    kl = LogitKL(weight=0.7, temperature=2.0)
    value = 3 * logit_losses(final_hidden(teacher, ids), hidden, *heads, ids, kl, 0.2)[0]
    for found, right in zip(torch.autograd.grad(value, (hidden, weight), retain_graph=True), plain, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6)
    with pytest.raises(RuntimeError, match="have been differentiated: they can be once"):
        value.backward()


def test_the_stream_after_a_layer_that_returns_a_tuple_is_its_first_part(teacher: Any) -> None:
    layer = teacher.gpt_neox.layers[1]
    layer.forward = lambda x: (x, None)
    x_BLD = torch.ones(1, 2, 32)
    with recorded(teacher, (), (1,)) as seen:
        layer(x_BLD)
    assert seen.hidden[1] is x_BLD
