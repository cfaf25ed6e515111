"""The sizes that a stage's memory follows from: of a teacher by its configuration, of an operator by its own.

Arithmetic only, without torch. Invariant: an operator's parameters are counted exactly (tests build the modules), a
teacher's but for norms and biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    SkipConfig,
    WindowConfig,
)
from orchestrator.study.spec import Architecture

GATED = ("silu", "swish", "swiglu")  # activations of blocks that multiply two maps of their input
PLAIN = ("gpt", "opt", "bloom", "falcon", "mpt", "codegen", "xglm", "biogpt")  # types whose blocks do not, unsaid
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TIED = ("gpt2", "gpt_bigcode", "gemma", "opt", "bloom", "falcon", "mpt")  # types whose head is the embedding, unsaid


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the memory of a teacher's stages follows from.

    Attributes:
        parameters: all of them, a tied head once.
        embedding, head: of the embedding, and of an output head of its own, 0 where it is tied.
        attention: of one layer's attention.
        between: the width between its projections, and those of what takes its place.
        gated: whether the feed-forward block multiplies two maps of its input.
        groups: heads of key and value.
    """

    shape: Architecture
    parameters: int
    embedding: int
    head: int
    attention: int
    between: int
    gated: bool
    groups: int

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return self.shape.heads, self.groups

    @property
    def blocks(self) -> int:
        """Parameters outside embedding and head."""
        return self.parameters - self.embedding - self.head


@dataclasses.dataclass(frozen=True)
class Operator:
    """Parameters of an operator: matrices that Muon takes, what else trains, what stays as it is."""

    matrices: int = 0
    others: int = 0
    fixed: int = 0

    @property
    def trained(self) -> int:
        return self.matrices + self.others


def sizes_of(shape: Architecture, config: Mapping[str, Any] | None = None) -> Sizes:
    """The sizes of a GPT-NeoX that is made here, exactly, or of the model that a config.json describes.

    Those are exact but for norms and biases where its blocks are a dense attention and feed-forward block of the usual
    kinds, and about right for others.
    """
    width, inner, table = shape.hidden, shape.intermediate, shape.vocabulary * shape.hidden
    if config is None:
        attention = 4 * width * width + 4 * width
        block = attention + 2 * width * inner + inner + width + 4 * width
        return Sizes(
            shape, 2 * table + shape.layers * block + 2 * width, table, table, attention, width, False, shape.heads
        )
    head_size = config.get("head_dim") or width // shape.heads
    groups = config.get("num_key_value_heads") or (1 if config.get("multi_query") else shape.heads)
    attention = 2 * width * head_size * (shape.heads + groups)
    kind = str(config.get("model_type"))
    told = _activation(config)
    gated = told in GATED or kind.startswith("gemma") or (told is None and not kind.startswith(PLAIN))
    experts = next((config[name] for name in EXPERTS if isinstance(config.get(name), int)), 1)
    block = attention + (3 if gated else 2) * width * inner * max(1, experts)
    tied = config.get("tie_word_embeddings", kind.startswith(TIED))
    head = 0 if tied else table
    return Sizes(
        shape, table + head + shape.layers * block, table, head, attention, head_size * shape.heads, gated, groups
    )


def _activation(config: Mapping[str, Any]) -> Any:
    names = ("hidden_act", "hidden_activation", "activation_function")
    return next((config[name] for name in names if config.get(name)), None)


def operator_parameters(
    config: Any, width: int, longest: int, between: int | None = None, heads: tuple[int, int] = (1, 1)
) -> Operator:
    """Of an operator in a model of that width, longest text and heads of attention (`Sizes.heads`), `between` wide
    between its projections (as the model where nothing is said); none of what is skipped."""
    if config is None or isinstance(config, SkipConfig):
        return Operator()
    between = between or width
    rows, (near, turned) = projection_rows(config, between, heads), _near_parameters(config, between, heads)
    if isinstance(config, WindowConfig):
        others = rows + width + rows * config.short_taps + rows + between + near
        return Operator(width * rows + between * width, others, turned)
    filters, direct = (config.heads, between) if config.heads else ((config.order - 1) * between,) * 2
    mapped = config.heads * _key_width(config, between) ** 2 if config.heads and config.feature_map == "hedgehog" else 0
    trained, fixed = _filter_parameters(config.filter, filters, longest)
    others = rows + width + rows * config.short_taps + rows + direct + mapped + trained + near
    return Operator(width * rows + between * width, others, fixed + turned)


def _near_parameters(config: HyenaConfig | WindowConfig, between: int, heads: tuple[int, int]) -> tuple[int, int]:
    """Of near queries and keys: what trains, and what does not, without a norm that the swap will find."""
    if config.window is None:
        return 0, 0
    own, shared = config.heads or heads[0], _shared_rows(config, between, heads)
    level = 0 if isinstance(config, WindowConfig) else between + own + (shared if config.tied else 0)
    return level + (0 if config.near_norm == "none" else 2 * between + 2 * shared), between // own // 2


def projection_rows(config: HyenaConfig | WindowConfig, between: int, heads: tuple[int, int]) -> int:
    """E: of the projection into queries, keys, values and gates, and near queries and keys."""
    if isinstance(config, HyenaConfig) and config.heads is None:
        return (config.order + 1) * between
    near = 0 if config.window is None else between + 2 * _shared_rows(config, between, heads)  # and values
    if isinstance(config, WindowConfig) or config.tied or config.heads is None:
        return near
    far = 2 * config.heads * _key_width(config, between) + (config.heads if config.key_gate else 0)
    return far + (near or between)


def _shared_rows(config: HyenaConfig | WindowConfig, between: int, heads: tuple[int, int]) -> int:
    """Of near keys, and of values, as a swap makes them."""
    own = config.heads or heads[0]
    return between // own * (config.groups or (heads[1] if own == heads[0] else own))


def _key_width(config: HyenaConfig, between: int) -> int:
    return config.key_dim or between // (config.heads or 1)


def _filter_parameters(config: Any, filters: int, longest: int) -> tuple[int, int]:
    """Of so many filters: what trains, and what does not."""
    match config:
        case ModalFilterConfig():
            return filters * config.modes * (2 if config.positive else 4), 0
        case FirFilterConfig():
            return filters * config.taps, 0
        case ImplicitFilterConfig():
            network = config.features * config.width + config.width + config.depth * (config.width**2 + config.width)
            table, readout = longest * config.features, filters * config.width
            if config.positive:
                return readout + filters, table + network + config.width
            frequency = (config.width, 0) if config.train_frequency else (0, config.width)
            grid = (table, 0) if config.train_features else (0, table)
            return network + readout + frequency[0] + grid[0], frequency[1] + grid[1]
    raise AssertionError(config)
