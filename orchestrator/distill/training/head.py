"""Logits of given hidden states as the model's own forward makes them, so that they can be made in chunks.

A model may do more between its last hidden state and its logits than one matrix product: Gemma 2 caps them, Cohere and
Granite scale them. So nothing is written down again here: the model's own `forward` runs, on a copy that shares all
modules with it but has, in the place of its trunk, one that hands on what it is given.

Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from orchestrator.distill.models.sites import trunk_of

PROBE = 8  # tokens that a model's logits are compared on
REMEDY = ": models of this class cannot be distilled or evaluated; take one whose forward is a trunk and a head"


class OutputHead:
    """Calling it turns hidden states (N, D) into logits (N, V); gradients reach both states and weights.

    Attributes:
        vocabulary: V.
    """

    def __init__(self, model: Any) -> None:
        trunk = trunk_of(model)
        self.model = copy.copy(model)
        self.model._modules = {
            name: _GivenStates(trunk) if module is trunk else module for name, module in model._modules.items()
        }
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        logits: Tensor = self.model.forward(inputs_embeds=hidden_ND[None], use_cache=False).logits[0]
        return logits

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that logits are made with, outside of the trunk."""
        yield from self.model.parameters()


def wide_heads(*models: Any) -> list[OutputHead]:
    """The output heads of models with weights of no less than float32; those that models share are widened once."""
    widened: dict[int, nn.Module] = {}
    heads = []
    for model in models:
        head, own = OutputHead(model), model.get_output_embeddings()
        if own.weight.dtype == torch.bfloat16:
            wide = widened.setdefault(own.weight.data_ptr(), copy.copy(own))
            wide._parameters = {
                name: None if p is None else nn.Parameter(p.float(), requires_grad=False)
                for name, p in wide._parameters.items()
            }
            modules = head.model._modules
            head.model._modules = {name: wide if module is own else module for name, module in modules.items()}
        heads.append(head)
    return heads


class _LastState(BaseModelOutputWithPast):
    """A trunk's output of which only the last hidden state is told: of router logits and the like there are none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenStates(nn.Module):
    """A trunk whose last hidden state is its input; else it is like the one that it stands for."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "trunk", trunk)  # not one of its modules

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "trunk"), name)

    @property
    def decoder(self) -> _GivenStates:
        """What models call that keep their trunk one level deeper, such as OPT."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _LastState(last_hidden_state=inputs_embeds)


def final_hidden(model: Any, ids_BL: Tensor) -> Tensor:
    """The last hidden state, (B, L, D), without making logits."""
    hidden: Tensor = trunk_of(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def check_output_head(model: Any) -> None:
    """Compare the logits of a model in evaluation mode with those that its `OutputHead` makes of its hidden states.

    Raises ValueError where they differ: losses and evaluation, which take logits in chunks, would be of another model.
    """
    name = type(model).__name__
    ids_BL = torch.arange(PROBE, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    wanted_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
    try:
        found_LV = OutputHead(model)(final_hidden(model, ids_BL)[0]).float()
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: its logits cannot be made of its last hidden state ({error}){REMEDY}") from error
    scale = wanted_LV.abs().nan_to_num().amax()
    if not torch.allclose(found_LV, wanted_LV, rtol=0.0, atol=1e-3 * float(scale), equal_nan=True):
        far = float((found_LV - wanted_LV).abs().max())
        raise ValueError(f"{name}: logits made of its last hidden state are {far:.2g} off its own{REMEDY}")
