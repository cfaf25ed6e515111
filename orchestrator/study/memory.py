"""The memory of a stage before it runs: what it holds, what its activations take, what its process takes.

Place in the flow: `plan` tells it for every stage, and a run whose stages cannot fit ends before it begins. Arithmetic
only, without torch. Invariant: what a stage holds is counted exactly (tests build the modules), its activations are
about what torch keeps for gradients (`tests/study/test_stage_memory.py` measures it again), and the whole is held
against measured peaks in `tests/benchmarks/memory.md`.

Numbers are float32 and of 4 bytes where nothing else is said. D is the model's width, I that of its feed-forward block,
E the rows of an operator's projection.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

from operators.config import HyenaConfig, WindowConfig
from orchestrator.study.model_sizes import Operator, Sizes, operator_parameters, projection_rows
from orchestrator.study.placing import by_layer
from orchestrator.study.spec import (
    DistilSpec,
    EvaluateSpec,
    ImportSpec,
    ProbesSpec,
    ScratchSpec,
    TeacherSpec,
    ThroughputSpec,
)

PROCESS = {"cpu": 660e6, "cuda": 0.6e9}  # a worker of Ray with torch and transformers; on a GPU context and libraries
SLACK = 1.15  # of what is allocated: pieces that are free but too small, and what stages before left in the process
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers of one chunk, as `losses` has it
PASSED = 4096  # tokens whose hidden states are made together, as `probes` has it
EXAMPLES = 4  # texts whose inputs are kept, as `statistics` has it
WEIGHTS = 1 << 24  # numbers of attention's weights looked at together, as `statistics` has it
EVALUATION = 1.3  # of what an evaluation computes with, as measured: pieces that are free but too small
OF_LOGITS = {"kl": 8, "ce": 4, "evaluate": 5}  # tensors as large as a chunk at once
NARROW, NARROW_HEADS = 0.58, 0.34  # of activations under bfloat16 autocast: norms, filters and FFTs stay float32
NARROW_NEAR = 0.58  # of those of operators with a window, whose far and near values are joined in float32
NEAR_ROWS = 64  # queries of a block at least, as `operators.mixing.near` has it
Layers = tuple[int, ...] | Mapping[int, Any]  # that are swapped; by layer what is there
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
TABLE_NAMES = ("model.embed_tokens.weight", "gpt_neox.embed_in.weight", "transformer.wte.weight")


def stage_bytes(spec: Any, sizes: Sizes, swapped: Layers, device: str = "cpu", subject: Any = None) -> int | None:
    """The most memory that a process of the stage takes, in bytes; None for one that holds no model.

    Args:
        swapped: the layers that are operators in it; by layer the operator, where the stage does not say all of them.
        device: "cpu": of the process; "cuda": of the device.
        subject: the stage whose model is evaluated, of an evaluation.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    held = held_bytes(spec, sizes, swapped, subject)
    if held is None:
        return None
    most = SLACK * (held + passing_bytes(spec, sizes, swapped, kind) + gathered_bytes(spec, sizes, swapped))
    if _spread(spec):  # at its beginning, before a process lets go what it has no part in
        most = max(most, SLACK * (2 if _narrow(spec) else 4) * sizes.parameters)
    if kind == "cpu" and _narrow(spec):  # at its beginning, when the teacher's file in float32 is read
        most = max(most, 6.0 * sizes.parameters)
    return round(PROCESS[kind] + most)


def held_bytes(spec: Any, sizes: Sizes, swapped: Layers, subject: Any = None) -> int | None:
    """Of weights, gradients and the optimizer's state in a step of the stage; None for one that holds no model."""
    if isinstance(spec, ImportSpec):
        return 8 * sizes.parameters  # as it is read, and in float32
    if not hasattr(spec, "numerics"):
        return None
    placed = [_parameters(operator, sizes) for operator in _operators(subject or spec, swapped).values()]
    matrices, others = sum(each.matrices for each in placed), sum(each.others for each in placed)
    operator = 4 * (matrices + others + sum(each.fixed for each in placed))
    alone = isinstance(spec, TeacherSpec | ScratchSpec)  # no frozen teacher beside it
    weights = (2 if _narrow(spec) else 4) * sizes.parameters + operator
    if isinstance(spec, EvaluateSpec | ProbesSpec):  # a subject that is no teacher has what it trained
        moved = isinstance(subject, ScratchSpec) or bool(getattr(subject, "phases", ()))
        return weights + (4 * sum(_trained_rest(subject, sizes, swapped)) if moved else 0)
    body, tables = _trained_rest(spec, sizes, swapped)
    trained = matrices + others + body + tables
    if isinstance(spec, ThroughputSpec):  # gradients of one model at a time
        return weights + 4 * (body + tables) + 4 * trained
    if isinstance(spec, DistilSpec) and not spec.phases:
        return weights
    moments = 8 * trained - (4 * (matrices + body) if spec.optimizer.method == "muon" else 0)
    if spec.optimizer.average is not None:
        moments += 4 * trained
    own = -4 * len(swapped) * sizes.attention if alone else 4 * (body + tables)
    ranks = spec.numerics.world_size if _spread(spec) else 1
    return math.ceil((weights + own + 4 * trained + moments) / ranks)


def gathered_bytes(spec: Any, sizes: Sizes, swapped: Layers) -> int:
    """Of what a process that holds its part of a model only has whole for a time.

    For a step the tables, those of the student too where they train, with their gradients, which are copied once to be
    shared out; of the layers the one that computes, the next one and a copy of it on its way, and gradients of one with
    their copy.
    """
    if not _spread(spec):
        return 0
    body, tables = _trained_rest(spec, sizes, swapped)
    alone = isinstance(spec, TeacherSpec | ScratchSpec)
    frozen = (2 if _narrow(spec) else 4) * (0 if alone else sizes.embedding + sizes.head)
    operators = _operators(spec, swapped).values()
    operator = max((_parameters(operator, sizes).trained for operator in operators), default=0)
    layer = sizes.blocks // sizes.shape.layers - (sizes.attention if swapped else 0) + operator
    trained = operator if body == 0 else layer
    own = sizes.embedding + sizes.head if alone else tables
    return frozen + 4 * (own + 2 * tables + 3 * layer + 2 * trained)


def _spread(spec: Any) -> bool:
    """Whether each process of the stage holds its part of the models only."""
    return hasattr(spec, "numerics") and spec.numerics.sharding == "full"


def _narrow(spec: Any) -> bool:
    """Whether the stage has a frozen teacher, in bfloat16."""
    return (
        isinstance(spec, DistilSpec | EvaluateSpec | ProbesSpec | ThroughputSpec)
        and spec.numerics.teacher_dtype == "bfloat16"
    )


def passing_bytes(spec: Any, sizes: Sizes, swapped: Layers, device: str = "cpu") -> int:
    """Of what comes and goes in a step: activations kept for gradients, logits, statistics of attention."""
    if isinstance(spec, ImportSpec):
        return 0
    length: int = spec.sequence_length
    if isinstance(spec, EvaluateSpec):
        settings = spec.evaluation
        batch = min(settings.batch_size * length, settings.tokens)
        hidden = 8 * settings.tokens * sizes.shape.hidden
        layer, logits = _layer_bytes(sizes, batch, None, True), _logits(sizes, length, "evaluate", device)
        return round(EVALUATION * (hidden + layer + logits))
    if isinstance(spec, ProbesSpec):
        longest = max(spec.lengths)
        passed = max(longest, min(PASSED, spec.windows * longest))
        layer, logits = _layer_bytes(sizes, passed, None, False), _logits(sizes, longest, "evaluate", device)
        keys = sizes.attention // (2 * sizes.shape.hidden) - sizes.between  # and as many values a position
        caches = 2 * sizes.shape.layers * 4 * 2 * longest * keys if spec.needles else 0  # what was read and a copy
        return round(EVALUATION * (4 * passed * sizes.shape.hidden + layer + max(logits, caches)))
    size: int = spec.train_batch_size if isinstance(spec, ThroughputSpec) else spec.batch_size
    tokens = size * length // spec.numerics.world_size
    phases = [phase.losses for phase in getattr(spec, "phases", ())]
    if not phases and isinstance(spec, DistilSpec):
        return _statistics(spec, sizes)
    kl = any(losses.logit_kl.weight > 0 for losses in phases)
    seen = max((2 * (losses.mixer_mse > 0) + (losses.hidden_mse > 0) for losses in phases), default=0)
    teachers: int = 4 * seen * len(getattr(spec, "layers", ())) * tokens * sizes.shape.hidden
    step: float = (
        _activations(spec, sizes, swapped, tokens) + teachers + _logits(sizes, tokens, "kl" if kl else "ce", device)
    )
    return max(round(step), _statistics(spec, sizes))


def _activations(spec: Any, sizes: Sizes, swapped: Layers, tokens: int) -> float:
    """What the layers keep for gradients, and the gradients of one of them on their way."""
    each = kept_by_layers(spec, sizes, swapped, tokens)
    largest = max(each, default=0.0)
    if getattr(spec, "checkpoint_activations", False):
        return 4 * len(each) * tokens * sizes.shape.hidden + 2 * largest
    return sum(each) + largest


def kept_by_layers(spec: Any, sizes: Sizes, swapped: Layers, tokens: int) -> list[float]:
    """Bytes that each layer keeps for gradients, from the lowest that takes any."""
    body, _ = _trained_rest(spec, sizes, swapped)
    lowest = 0 if body or not swapped else min(swapped)
    narrow = spec.numerics.dtype == "bfloat16"
    copied = narrow and (body > 0 or spec.numerics.teacher_dtype == "float32")  # weights, for products in bfloat16
    found, operators = [], _operators(spec, swapped)
    for layer in range(lowest, sizes.shape.layers):
        weights = sizes.blocks // sizes.shape.layers - (sizes.attention if layer in swapped else 0)
        kept = _layer_bytes(sizes, tokens, operators.get(layer), body > 0, narrow)
        found.append(kept + (2 * weights if copied else 0))
    return found


def _layer_bytes(sizes: Sizes, tokens: int, operator: Any, rest_trains: bool, narrow: bool = False) -> float:
    """Of what one layer keeps for gradients, counted in torch 2.13."""
    width, inner = sizes.shape.hidden, sizes.shape.intermediate
    each_its_own = (sizes.shape.heads, sizes.shape.heads)  # as what heads share is repeated
    if sizes.gated:  # as in a Llama: norms by hand, which stay float32, and keys and values of groups of heads
        norms, block = (6.0 if rest_trains else 2.0) * width, (4.0 if rest_trains else 3.0) * inner
        mixer = sizes.attention / width + 0.5 * width
    else:
        norms, block = 0.0, 2.0 * width + 2 * inner if rest_trains else 1.0 * width + inner
        mixer = (8.0 if rest_trains else 6.0) * width
    if isinstance(operator, HyenaConfig):
        rows = projection_rows(operator, sizes.between, each_its_own)
        mixer = 4.8 * width + 1.5 * rows if operator.heads else 1.5 * width + 1.5 * rows
        mixer += _near(operator, sizes)
    elif isinstance(operator, WindowConfig):
        mixer = 2.5 * width + 1.5 * projection_rows(operator, sizes.between, each_its_own) + _near(operator, sizes)
    elif operator is not None:
        mixer = 0
    least = NARROW_HEADS if getattr(operator, "heads", None) is not None else NARROW
    least = NARROW_NEAR if getattr(operator, "window", None) is not None else least
    block, mixer = (block * NARROW, mixer * least) if narrow else (block, mixer)
    return 4.0 * tokens * (norms + block + mixer)


def _logits(sizes: Sizes, tokens: int, use: str, device: str) -> int:
    return 4 * OF_LOGITS[use] * min(tokens * sizes.shape.vocabulary, max(LOGITS[device], sizes.shape.vocabulary))


def _statistics(spec: Any, sizes: Sizes) -> int:
    """Of looking at attention before it is replaced: its weights a few times, moments of its inputs, some inputs."""
    operators = _operators(spec, getattr(spec, "new_layers", ())).values()
    new = [operator for operator in operators if getattr(operator, "needs_statistics", False)]
    if not new:
        return 0
    weights: int = sizes.shape.heads * spec.sequence_length**2
    kept = 24 * sizes.shape.hidden**2
    near = sum(getattr(operator, "window", None) is not None for operator in new)
    kept = len(new) * kept + near * 4 * EXAMPLES * int(spec.sequence_length) * sizes.shape.hidden
    return 16 * weights + 8 * min(weights, WEIGHTS) + kept


def _operators(spec: Any, swapped: Layers) -> Mapping[int, Any]:
    """What is in each of these layers: as it is given, or as the stage has it."""
    if isinstance(swapped, Mapping):
        return swapped
    placed = getattr(spec, "operator", None)
    return dict.fromkeys(swapped) if placed is None else by_layer(placed, swapped)


def _parameters(operator: Any, sizes: Sizes) -> Operator:
    return operator_parameters(operator, sizes.shape.hidden, sizes.shape.max_length, sizes.between, sizes.heads)


def _trained_rest(spec: Any, sizes: Sizes, swapped: Layers) -> tuple[int, int]:
    """Parameters that train outside of operators: of blocks, and of embedding and head."""
    trains = spec.rest_trains if isinstance(spec, ThroughputSpec) else spec.optimizer.rest_scale > 0
    freeze = getattr(spec, "freeze", ())
    if not trains:
        return 0, 0
    frozen = [any(fnmatch.filter(names, glob) for glob in freeze) for names in (TABLE_NAMES, HEAD_NAMES)]
    tables = (0 if frozen[0] else sizes.embedding) + (0 if frozen[1] else sizes.head)
    return sizes.blocks - len(swapped) * sizes.attention, tables


def _near(config: HyenaConfig | WindowConfig, sizes: Sizes) -> float:
    """Numbers a position that the softmax of near positions keeps: weights of a block, and its keys and
    values, some of which the block before has too."""
    if config.window is None:
        return 0.0
    rows = max(config.window, NEAR_ROWS)
    seen = rows + config.window - 1
    heads = config.heads or sizes.shape.heads
    return 1.25 * heads * (seen + config.sinks) + (2 + 2 * seen / rows) * sizes.between
