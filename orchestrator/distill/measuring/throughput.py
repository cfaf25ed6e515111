"""Speed of a student's architecture against its teacher's: training, prefill and decode.

Weights do not change speed, so a measurement belongs to an architecture, and to which of it trains; every student of
that shape shares it. Random filters have lags that have decayed below the smallest normal number, which CPUs multiply
slowly: they count as zero, for those of students have none.
Both models run in turn in one process that has the machine to itself; ratios are medians of ratios by turn, with an
interval of 95 %. Turns go on beyond those asked for while that is cheap and the interval is wide.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from operators import native
from operators.decoding.kept import frozen_filters
from orchestrator.distill.context import Workplace
from orchestrator.distill.measuring.intervals import median_interval, narrow
from orchestrator.distill.models.cache import cache_bytes
from orchestrator.distill.models.sites import attention_of, decoder_layers, longest_text
from orchestrator.distill.models.student import load_teacher, own_what_trains, sharing
from orchestrator.distill.models.swap import SwappedAttention, swap, swapped
from orchestrator.distill.training.loop import autocast, prepare
from orchestrator.distill.training.losses import next_token_loss, train_operators_only
from orchestrator.distill.training.memory import peak_mb, reset_peak
from orchestrator.distill.training.optimizers import set_trainable
from orchestrator.study.placing import by_layer
from orchestrator.study.spec import CHEAP_SECONDS, ThroughputSpec

Timed = Callable[[Any], float]  # model -> seconds
NARROW = 0.02  # of the ratio, to either side
MOST_TURNS = 31


@contextlib.contextmanager
def _denormals_as_zero() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@native.as_found()
@_denormals_as_zero()
def measure_throughput(spec: ThroughputSpec, place: Workplace) -> dict[str, Any]:
    """Tokens per second and ratios to the teacher (above 1 is faster).

    Returns:
        train_tokens_per_s and train_ratio; prefill_tokens_per_s, prefill_ratio, decode_tokens_per_s and decode_ratio as
        mappings from length, as is cache_mb, the memory that decoding goes on from (without what crops need); beside
        each ratio its turns in order and, of several, its interval [low, high];
        train_peak_mb, the process's peak memory in a training step; with `teacher_*` beside them;
        core, what prefill and decode ran through: the compiled one where there is one ("native"), else "torch".
    """
    prepare(spec.numerics)
    device = place.context.device
    core = "native" if native.use(device == "cpu") else "torch"
    teacher = load_teacher(place.inputs["teacher"], spec.numerics.teacher_dtype).to(device)
    student = sharing(teacher)
    operators = by_layer(spec.operator, spec.layers)
    swap(student, spec.layers, operators, torch.Generator().manual_seed(0), dtype=torch.float32)
    for model in (student, teacher):
        _choose_gradients(model, spec)
        own_what_trains(model, teacher)
    settings = spec.throughput
    result: dict[str, Any] = {"core": core}
    longest = longest_text(teacher.config)
    batch, size = settings.batch_size, (spec.train_batch_size, spec.sequence_length)
    for length in settings.lengths:
        if length > longest or length <= settings.decode_tokens:
            raise ValueError(
                f"throughput.lengths: {length} must exceed decode_tokens {settings.decode_tokens} and be at most the "
                f"teacher's {longest} positions"
            )
        context = length - settings.decode_tokens
        measured = {
            "prefill": (batch * length, lambda model, n=length: _prefill(model, batch, n, spec, device)),
            "decode": (
                batch * settings.decode_tokens,
                lambda model, n=context: _decode(model, batch, n, settings.decode_tokens, spec, device),
            ),
        }
        for name, (tokens, timed) in measured.items():
            for key, value in _compare(timed, tokens, teacher, student, settings.repeats).items():
                result.setdefault(key.format(name), {})[str(length)] = value
    native.use(spec.numerics.core == "native")
    train = _compare(lambda m: _train(m, *size, spec, device), size[0] * size[1], teacher, student, settings.repeats)
    result |= {key.format("train"): value for key, value in train.items()}
    reset_peak(device)
    _train(student, *size, spec, device)
    result["train_peak_mb"] = peak_mb(device)
    native.use(device == "cpu")
    for key, model in (("cache_mb", student), ("teacher_cache_mb", teacher)):
        result[key] = {str(length): _cache_mb(model, batch, length, spec, device) for length in settings.lengths}
    return result


def _compare(timed: Timed, tokens: int, teacher: Any, student: Any, repeats: int) -> dict[str, Any]:
    with frozen_filters(student):  # as a server would; training reads none
        timed(teacher), timed(student)  # warm-up
        pairs: list[tuple[float, float]] = []
        ratios: list[float] = []
        began = time.perf_counter()
        while len(pairs) < repeats or (repeats > 1 and _worth_more(ratios, time.perf_counter() - began)):
            pairs.append((timed(teacher), timed(student)))
            ratios.append(pairs[-1][0] / pairs[-1][1])
    bounds = median_interval([ratios])
    return {
        "teacher_{}_tokens_per_s": tokens / statistics.median(first for first, _ in pairs),
        "{}_tokens_per_s": tokens / statistics.median(second for _, second in pairs),
        "{}_ratio": statistics.median(ratios),
        "{}_turns": ratios,
        **({} if bounds is None else {"{}_interval": list(bounds)}),
    }


def _worth_more(ratios: list[float], seconds: float) -> bool:
    """Whether one more turn is cheap and could tell more."""
    return seconds < CHEAP_SECONDS and len(ratios) < MOST_TURNS and not narrow(ratios, NARROW)


@torch.no_grad()
def _prefill(model: Any, batch: int, length: int, spec: ThroughputSpec, device: str) -> float:
    model.eval()
    ids = _ids(model, batch, length, device)
    with _clock(device) as clock, autocast(spec.numerics, device):
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return clock.seconds


@torch.no_grad()
def _cache_mb(model: Any, batch: int, length: int, spec: ThroughputSpec, device: str) -> float:
    """Of what a prompt leaves."""
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, SwappedAttention)]
    before = [layer.croppable for layer in layers]
    for layer in layers:
        layer.croppable = False
    with autocast(spec.numerics, device):
        cache = model(input_ids=_ids(model, batch, length, device), use_cache=True, logits_to_keep=1).past_key_values
    for layer, croppable in zip(layers, before, strict=True):
        layer.croppable = croppable
    return round(cache_bytes(cache) / 2**20, 3)


@torch.no_grad()
def _decode(model: Any, batch: int, context: int, tokens: int, spec: ThroughputSpec, device: str) -> float:
    model.eval()
    with autocast(spec.numerics, device):
        output = model(input_ids=_ids(model, batch, context, device), use_cache=True, logits_to_keep=1)
        with _clock(device) as clock:
            for _ in range(tokens):
                following = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return clock.seconds


def _choose_gradients(model: Any, spec: ThroughputSpec) -> None:
    """Let training take the gradients that the study's stages take; of the teacher, those of the attention that is
    replaced in the operators' place.

    Where that leaves nothing, as in a skipped layer with all else frozen, the gradient is that of what enters the
    lowest of the layers: what any operator there would need.
    """
    mixers = [parameter for layer in spec.layers for parameter in attention_of(model, layer).parameters()]
    set_trainable(model, spec.rest_trains, spec.freeze, mixers if not swapped(model) else ())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        lowest = decoder_layers(model)[min(spec.layers, default=0)]
        lowest.register_forward_pre_hook(_with_gradient)


def _with_gradient(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled():
        arguments[0].requires_grad_()


def _train(model: Any, batch: int, length: int, spec: ThroughputSpec, device: str) -> float:
    train_operators_only(model)
    ids = _ids(model, batch, length, device)
    with _clock(device) as clock:
        with autocast(spec.numerics, device):
            loss = next_token_loss(model, ids)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return clock.seconds


def _ids(model: Any, batch: int, length: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)


class _clock:
    """Seconds spent inside the context, work on the device included."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> _clock:
        self._wait()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
