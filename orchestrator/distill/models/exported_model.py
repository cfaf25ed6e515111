"""A student as a Hugging Face model: the code that travels with an exported folder.

`export` copies this file and what it imports into the folder, so that `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` needs nothing of this project. The model type is its own: without trust_remote_code loading is
an error, never a GPT-NeoX with random attention.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    OperatorConfig,
    SkipConfig,
)
from operators.decoding.kept import frozen_filters
from orchestrator.distill.models.swap import decode_by, fit_errors, swap

FILTERS = {"implicit": ImplicitFilterConfig, "modal": ModalFilterConfig, "fir": FirFilterConfig}


class LayerswapConfig(GPTNeoXConfig):
    """A GPT-NeoX configuration, and `operators`: layer index (as text) -> configuration of what is there.

    `step_mode` and `croppable` choose how swapped layers decode (`swap.decode_by`): with `step_mode="modal"` and
    `croppable=False` as arguments of `from_pretrained` from a state that does not grow.
    """

    model_type = "layerswap_gpt_neox"
    operators: dict[str, Any] | None = None
    step_mode: str | None = None
    croppable: bool = True


class LayerswapForCausalLM(GPTNeoXForCausalLM):
    """A GPT-NeoX, the attention of some layers swapped.

    Every forward pass and every `generate` computes the filters of these layers anew, so that it sees the weights as
    they are; inside of `frozen_filters` they are computed once.
    """

    config_class = LayerswapConfig

    def __init__(self, config: LayerswapConfig) -> None:
        super().__init__(config)
        for layer, values in sorted((config.operators or {}).items(), key=lambda item: int(item[0])):
            swap(self, [int(layer)], operator_config(values), torch.Generator(), initialise=False)
        decode_by(self, config.step_mode, croppable=config.croppable)

    def fit_errors(self) -> dict[int, Tensor]:
        """Relative errors (C,) of the filters of layers that decode by modes fitted to them, see `swap.fit_errors`."""
        return fit_errors(self)

    def frozen_filters(self) -> contextlib.AbstractContextManager[None]:
        """Inside, filters are computed once for all prompts; weights must not change there, see `kept`."""
        return frozen_filters(self)


def operator_config(values: dict[str, Any]) -> OperatorConfig:
    """The configuration object of plain values."""
    if values["kind"] == "skip":
        return SkipConfig(**values)
    filters = FILTERS[values["filter"].get("kind", "implicit")](**values["filter"])
    return HyenaConfig(**{**values, "filter": filters})
