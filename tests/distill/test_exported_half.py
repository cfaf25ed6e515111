"""An exported student that is loaded in half precision keeps the filters that it was trained to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.distill.models.exported_model import LayerswapConfig, LayerswapForCausalLM
from orchestrator.distill.models.swap import swapped


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_filters_are_loaded_in_float32(tmp_path: Path, saved: torch.dtype) -> None:
    operator = HyenaConfig(init="random", filter=ImplicitFilterConfig(offset=0.0, sine_frequency=14.0))
    config = LayerswapConfig(
        base_model_type="gpt_neox",
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
        operators={"1": dataclasses.asdict(operator)},
    )
    model = LayerswapForCausalLM(config)
    for placed in swapped(model):
        placed.operator.initialise(None, torch.Generator().manual_seed(0))
    wanted = swapped(model)[0].operator.filter(300).detach()
    model.to(saved).save_pretrained(tmp_path)
    loaded = LayerswapForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = swapped(loaded)[0].operator
    assert found.in_proj.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in found.filter.parameters()} == {torch.float32}
    assert torch.equal(found.filter(300), wanted)
    with torch.no_grad():
        assert loaded(torch.arange(20)[None]).logits.isfinite().all()
