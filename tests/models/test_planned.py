"""What the plan reads of a configuration is what the model has: the layers to swap, their longest text, their width."""

from __future__ import annotations

import json

import pytest
import torch

from operators.config import HyenaConfig
from orchestrator.distill.models.sites import longest_text, sites
from orchestrator.distill.models.swap import swap, swapped
from orchestrator.distill.models.whole import check_again
from orchestrator.study.shapes import attention_layers, inner_width, sizes
from tests.models.outcomes import refusal
from tests.models.test_common import COMMON
from tests.models.tiny import TYPES, build, config_of


def check(name: str) -> None:
    model = build(name)
    told = json.loads(config_of(name).to_json_string())
    found = sizes(told)
    places = attention_layers(told, found["layers"])
    assert places == tuple(sites(model))
    assert found["max_length"] == longest_text(model.config)
    swap(model, places[:1], HyenaConfig(init="random"), torch.Generator())
    assert swapped(model)[0].operator.inner == inner_width(told, found)


@pytest.mark.parametrize("name", COMMON)
def test_of_a_common_family(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_of_every_type(name: str) -> None:
    if not refusal(name):
        check(name)


@pytest.mark.parametrize("name", ["emu3", "mllama"])
def test_a_language_model_that_loads_within_another_only_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"is of type '{name}_text_model', which AutoModelForCausalLM does not load"):
        check_again(build(name))
