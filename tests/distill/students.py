"""Students that did not have to be trained, and teachers that are none of the usual."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from operators.config import OperatorConfig
from orchestrator.distill.models.student import load_teacher
from orchestrator.distill.models.swap import swap


def student_of(teacher: Path, placed: Mapping[int, OperatorConfig]) -> Any:
    """A student whose operators, by layer, do more than copied projections do: all that they hold is moved a little."""
    model = load_teacher(teacher)
    for layer, config in placed.items():
        made = swap(model, [layer], config, torch.Generator().manual_seed(layer))[0]
        with torch.no_grad():
            for parameter in made.operator.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def llama() -> Any:
    """A random Llama of 3 layers and 96 positions; two query heads share a key head, the head is the embedding."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=96, initializer_range=0.2, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def gpt2() -> Any:
    """A random GPT-2 of the same size."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.2, bos_token_id=0,
            eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
