"""Losses and evaluation see the logits of the model itself, whatever it does after its last hidden state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from operators.config import HyenaConfig
from orchestrator.distill import stage
from orchestrator.distill.measuring import evaluate as module
from orchestrator.distill.training import frozen
from orchestrator.distill.training import losses as losses_module
from orchestrator.distill.training.head import OutputHead, check_output_head, final_hidden
from orchestrator.distill.training.losses import batch_losses, next_token_loss
from orchestrator.study.recipe import LogitKL, Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import DistilSpec, EvaluateSpec, PhaseSpec
from tests.texts import random_tokens, write_tokens

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
GEMMA = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8}
MODELS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GEMMA, final_logit_softcapping=2.0)),
    "cohere": (CohereForCausalLM, CohereConfig(**LLAMA, logit_scale=0.3)),
    "granite": (GraniteForCausalLM, GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "opt": (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16)),
}


def model_of(name: str, seed: int) -> Any:
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def log_probabilities(model: Any, ids_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the next token by the model's own forward, (B, L - 1, V)."""
    with torch.no_grad():
        return (model(input_ids=ids_BL).logits[:, :-1].double() / temperature).log_softmax(-1)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A teacher and a student of one class with different weights."""
    return model_of(request.param, 1), model_of(request.param, 2)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", [5, 1000])
def test_losses_are_of_the_models_own_logits(
    pair: tuple[Any, Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    monkeypatch.setattr(losses_module, "LOGITS_PER_CHUNK", positions * 50)
    teacher, student = pair
    _, parts = batch_losses(teacher, student, ids, (), Losses(kl=LogitKL(temperature=2.0), ce=1.0))
    wanted, own = (log_probabilities(model, ids, 2.0) for model in pair)
    kl = 4 * (wanted.exp() * (wanted - own)).sum(-1).mean()
    ce = -log_probabilities(student, ids).gather(-1, ids[:, 1:, None]).mean()
    assert parts["loss/kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert parts["loss/ce"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert next_token_loss(student, ids).item() == pytest.approx(ce.item(), rel=1e-4)


def test_gradients_are_of_the_models_own_logits(pair: tuple[Any, Any], ids: Tensor) -> None:
    model = pair[1]
    next_token_loss(model, ids).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_evaluation_is_of_the_models_own_logits(
    pair: tuple[Any, Any], place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = random_tokens(64, above=50).reshape(4, 16)
    write_tokens(tmp_path, valid=windows)
    models = dict(zip(("teacher", "subject"), pair, strict=True))
    monkeypatch.setattr(frozen, "load_teacher", lambda folder, dtype: models[folder.name])
    monkeypatch.setattr(module, "load_student", lambda folder, _: models[folder.name])
    monkeypatch.setattr(losses_module, "LOGITS_PER_CHUNK", 6 * 50)
    spec = EvaluateSpec(
        tokens="t", teacher="r", subject="s", sequence_length=16, numerics=Numerics(),
        evaluation=Evaluation(tokens=64, batch_size=3, prompts=0),
    )  # fmt: skip
    found = module.evaluate(spec, place(inputs={name: Path(name) for name in models} | {"tokens": tmp_path}))
    ids_BL = torch.from_numpy(windows.astype(np.int64))
    wanted, own = (log_probabilities(model, ids_BL) for model in pair)
    target = ids_BL[:, 1:, None]
    assert found["perplexity"] == pytest.approx(math.exp(-own.gather(-1, target).mean()), rel=1e-4)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(-wanted.gather(-1, target).mean()), rel=1e-4)
    assert found["kl"] == pytest.approx((wanted.exp() * (wanted - own)).sum(-1).mean().item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((own.argmax(-1) == target[..., 0]).double().mean().item())
    assert found["agreement"] == pytest.approx((own.argmax(-1) == wanted.argmax(-1)).double().mean().item())


def test_an_output_head_leaves_the_model_as_it_was(pair: tuple[Any, Any], ids: Tensor) -> None:
    model = pair[0]
    logits = model(input_ids=ids).logits
    head = OutputHead(model)
    hidden_BLD = final_hidden(model, ids)
    torch.testing.assert_close(head(hidden_BLD.flatten(0, 1)), logits.flatten(0, 1))
    assert torch.equal(model(input_ids=ids).logits, logits)
    check_output_head(model)


class FromTokens(GPTNeoXForCausalLM):  # type: ignore[misc]
    """Its logits depend on the tokens beside the hidden states."""

    def forward(self, input_ids: Any = None, **given: Any) -> Any:
        output = super().forward(input_ids, **given)
        output.logits = output.logits + input_ids[..., None]
        return output


class FromFirstState(GPTNeoXForCausalLM):  # type: ignore[misc]
    """Its logits are not of the last hidden state."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named, output_hidden_states=True)
        if output.hidden_states:
            output.logits = self.get_output_embeddings()(output.hidden_states[0])
        return output


@pytest.mark.parametrize("kind", [FromTokens, FromFirstState])
def test_a_model_whose_logits_need_more_than_its_last_hidden_state_is_refused(teacher: Any, kind: Any) -> None:
    model = kind(teacher.config).eval()
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: .*: models of this class cannot be distilled"):
        check_output_head(model)


def test_stages_ask_whether_a_teachers_logits_can_be_made(
    place: Any, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise ValueError("asked")

    monkeypatch.setattr(frozen, "check_output_head", refuse)
    made = place(inputs={"teacher": tiny_teacher})
    spec = EvaluateSpec(
        tokens="t", teacher="r", subject="s", sequence_length=16, numerics=Numerics(), evaluation=Evaluation()
    )
    distil = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=(0,), new_layers=(0,), operator=HyenaConfig(),
        phases=(PhaseSpec(losses=Losses(kl=1.0), steps=1),), batch_size=1, sequence_length=16, first_sequence=0,
        freeze=(), optimizer=Optimizer(), numerics=Numerics(), seed=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="asked"):
        module.evaluate(spec, made)
    with pytest.raises(ValueError, match="asked"):
        stage.distil(distil, made)
