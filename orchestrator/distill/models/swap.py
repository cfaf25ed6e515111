"""Surgery: put an operator where a layer's attention was, and nothing else.

Invariant: what is not named is not touched; a model with no layer swapped is bitwise the model it was.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from operators.config import OperatorConfig
from operators.decoding.state import State
from operators.registry import build
from operators.skip import Skip
from operators.transfer.attention import AttentionStatistics, AttentionWeights
from orchestrator.distill.models.cache import OperatorCacheLayer
from orchestrator.distill.models.families import family_of
from orchestrator.distill.models.masks import by_document, packed_documents, pattern_of

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SwappedAttention(nn.Module):
    """An operator with the call signature of the attention it replaces.

    Attributes:
        config: the model's configuration, which says how its attention is computed.
        step_mode, croppable: the states that decoding starts from, see `Hyena.init_state`.
    """

    def __init__(self, operator: Any, layer: int, cache_argument: str, config: Any) -> None:
        super().__init__()
        self.operator = operator
        self.layer = layer
        self.cache_argument = cache_argument
        self.config = config
        self.step_mode: str | None = None
        self.croppable = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:
        """(B, L, D) -> (B, L, D) and no attention weights; with a cache, continues from what it has seen.

        Padding and packed documents are honoured as `masks` says; with a cache, packed documents are a ValueError.
        """
        cache: Any = others.get(self.cache_argument)
        batch, new, _ = hidden_states.shape
        held = None if cache is None else self._held(cache, batch)
        pattern = pattern_of(attention_mask, batch, 0 if held is None else held.state.length, new)
        if attention_mask is None and new > 1 and not torch.compiler.is_compiling():
            in_mask = held is None and self.config._attn_implementation in ("sdpa", "eager")  # if there are several
            position_ids = None if in_mask else others.get("position_ids")
            pattern = packed_documents(position_ids, others.get("cu_seq_lens_q"), batch, new)
        if held is not None:
            held.check(pattern)
            if cache.offloading:
                self._bring_the_next(cache, hidden_states.device)
            return self.operator.extend(hidden_states, held.state, pattern.real_BL)[0], None
        if pattern.document_BL is not None:
            return by_document(self.operator, hidden_states, pattern.document_BL), None
        return self.operator(hidden_states, pattern.real_BL), None

    def new_state(self, batch: int) -> State:
        """The state of `batch` sequences of which nothing was seen. ValueError for a mode that the operator lacks."""
        state: State = self.operator.init_state(batch, self.step_mode, croppable=self.croppable)
        return state

    def _bring_the_next(self, cache: Any, device: torch.device) -> None:
        """What attention does in a cache that lies on the CPU: copy the next layer's keys and values meanwhile."""
        if device.type == "cuda":
            cache.prefetch_stream.wait_stream(torch.cuda.default_stream(device))
        cache.prefetch(self.layer + 1, cache.only_non_sliding)

    def _held(self, cache: Cache, batch: int) -> OperatorCacheLayer:
        while len(cache.layers) <= self.layer:
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        found: Any = cache.layers[self.layer]
        if isinstance(found, OperatorCacheLayer):
            held = found
        elif found.get_seq_length() > 0:
            raise ValueError(
                f"the cache has keys and values of layer {self.layer}, which is swapped: start a new cache"
            )
        else:
            held = cache.layers[self.layer] = OperatorCacheLayer(self.new_state(batch), found)
        if held.state.length == 0 and held.state.batch != batch:
            held.state = self.new_state(batch)
        return held


def swap(
    model: Any,
    layers: Iterable[int],
    config: OperatorConfig,
    generator: torch.Generator,
    *,
    statistics: Mapping[int, AttentionStatistics] | None = None,
    initialise: bool = True,
    dtype: torch.dtype | None = None,
) -> list[SwappedAttention]:
    """Replace the attention of `layers` in place and return what took its place.

    With `initialise` the operators are set as the configuration's `init` says, from the attention they replace and
    from `statistics`, by layer what it does on real text; without, they await a state dict. Their device and precision
    are those of the attention they replace, or `dtype`.
    Raises `ValueError` for an unsupported family, weights that are no usual numbers, or an impossible transfer.
    """
    family = family_of(model)
    blocks = family.layers(model)
    placed = []
    if not swapped(model):
        model.base_model.register_forward_hook(_attentions_by_layer)
    for layer in layers:
        block = blocks[layer]
        attention = getattr(block, family.attribute)
        if isinstance(attention, SwappedAttention):
            raise ValueError(f"layer {layer} is swapped already")
        like = _precision_of(attention, layer)
        operator: Any = build(config, model.config.hidden_size, model.config.max_position_embeddings)
        if initialise:
            operator.to(torch.promote_types(like.dtype, torch.float32))
            transfer = getattr(config, "init", "random") == "transfer"
            read = family.read(attention) if transfer else None
            if read is not None and statistics and layer in statistics:
                read = dataclasses.replace(read, statistics=statistics[layer])
            operator.initialise(None if read is None else _to_read(read), generator)
        operator.to(like.device, dtype or like.dtype)
        replacement = SwappedAttention(operator, layer, family.cache_argument, model.config)
        setattr(block, family.attribute, replacement)
        placed.append(replacement)
    return placed


def _attentions_by_layer(trunk: Any, _: Any, output: Any) -> None:
    """Where attention weights are asked for, None in the place of layers that have none."""
    weights = getattr(output, "attentions", None)
    if weights is not None:
        without = {module.layer for module in trunk.modules() if isinstance(module, SwappedAttention)}
        layers, left = trunk.config.num_hidden_layers, iter(weights)
        if len(weights) == layers - len(without):
            output["attentions"] = tuple(None if layer in without else next(left) for layer in range(layers))


def _precision_of(attention: nn.Module, layer: int) -> Tensor:
    """A parameter of the attention, of whose device and precision the operator is to be."""
    found = [parameter.detach() for parameter in attention.parameters()]
    odd = [parameter.dtype for parameter in found if parameter.dtype not in PRECISIONS]
    if odd or not found:
        what = f"weights of {odd[0]}" if odd else "no weights"
        raise ValueError(
            f"the attention of layer {layer} has {what}: load the model with dtype=torch.bfloat16 or float32"
        )
    return found[0]


def _to_read(read: AttentionWeights) -> AttentionWeights:
    """The same on the CPU, where operators are set, and in no less than single precision."""
    tensors: dict[str, Any] = {
        name: value.to("cpu", torch.promote_types(value.dtype, torch.float32))
        for name, value in vars(read).items()
        if isinstance(value, Tensor)
    }
    return dataclasses.replace(read, **tensors)


def decode_by(model: Any, step_mode: str | None, *, croppable: bool = True) -> None:
    """Choose how swapped layers decode, see `Hyena.init_state`; None: each in the usual way of its operator.

    Raises `ValueError`, and changes nothing, where the operator of a layer has no such mode.
    """
    chosen = [placed for placed in swapped(model) if not isinstance(placed.operator, Skip)]
    for placed in chosen:
        try:
            placed.operator.init_state(1, step_mode)
        except ValueError as error:
            raise ValueError(f"layer {placed.layer}: {error}") from None
    for placed in chosen:
        placed.step_mode, placed.croppable = step_mode, croppable


def fit_errors(model: Any) -> dict[int, Tensor]:
    """Of layers that decode by modes that were fitted to their filters, the relative error of every filter, (C,).

    Computes the fit, seconds a layer, which `frozen_filters` keeps for the decoding inside of it.
    """
    fitted = {placed.layer: placed.operator.frozen() for placed in swapped(model) if placed.step_mode == "modal"}
    return {layer: filters.fitted[1] for layer, filters in fitted.items() if filters.modes is None}


def swapped(model: Any) -> list[SwappedAttention]:
    """What took the place of attention, by layer."""
    found = [attention_of(model, layer) for layer in range(len(family_of(model).layers(model)))]
    return [module for module in found if isinstance(module, SwappedAttention)]


def attention_of(model: Any, layer: int) -> nn.Module:
    """The module that mixes positions in a layer, swapped or not."""
    family = family_of(model)
    module: nn.Module = getattr(family.layers(model)[layer], family.attribute)
    return module
