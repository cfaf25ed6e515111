"""A second computation of what stages compute, in plain torch, from definitions; of the project only the operator.

A GPT-NeoX is a dictionary of tensors under the names of its state dict and a function of it. Nothing here is fast, in
chunks or resumable, so what it has in common with a stage is the definition.

Sources: Andonian et al. 2021 (GPT-NeoX), Su et al. 2021 (rotary embedding), Loshchilov and Hutter 2019 (AdamW), Jordan
et al. 2024 (Muon), Hinton et al. 2015 (temperature).

Shapes: B sequences, L positions, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.registry import build
from operators.transfer.attention import AttentionStatistics, AttentionWeights

Weights = dict[str, Tensor]
MATRICES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "in_proj", "out_proj")  # for Muon


@dataclasses.dataclass
class Plain:
    """A model: its weights by name, its operators by layer, and what a configuration says of attention."""

    weights: Weights
    heads: int
    rotary: float = 0.25
    dropout: float = 0.0
    operators: dict[int, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    @property
    def layers(self) -> int:
        return sum(name.endswith("input_layernorm.weight") for name in self.weights)


@dataclasses.dataclass
class Flow:
    """What flows through a model: inputs and outputs of what mixes positions, the residual stream after every layer."""

    mixed_from: list[Tensor] = dataclasses.field(default_factory=list)
    mixed: list[Tensor] = dataclasses.field(default_factory=list)
    stream: list[Tensor] = dataclasses.field(default_factory=list)
    logits_BLV: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


def run(model: Plain, ids_BL: Tensor) -> Flow:
    """The whole model: pre-norm blocks whose attention and network both read the stream before the block."""
    w, flow = model.weights, Flow()
    x_BLD = drop(w["gpt_neox.embed_in.weight"][ids_BL], model)
    for layer in range(model.layers):
        at = f"gpt_neox.layers.{layer}"
        flow.mixed_from.append(norm(x_BLD, w, f"{at}.input_layernorm"))
        flow.mixed.append(mixer(model, layer, flow.mixed_from[-1]))
        within = F.gelu(linear(norm(x_BLD, w, f"{at}.post_attention_layernorm"), w, f"{at}.mlp.dense_h_to_4h"))
        attended = drop(flow.mixed[-1], model)
        x_BLD = x_BLD + attended + drop(linear(within, w, f"{at}.mlp.dense_4h_to_h"), model)
        flow.stream.append(x_BLD)
    flow.logits_BLV = F.linear(norm(x_BLD, w, "gpt_neox.final_layer_norm"), w["lm_head.weight"]).float()
    return flow


def mixer(model: Plain, layer: int, x_BLD: Tensor) -> Tensor:
    """What mixes the positions of a layer: its operator, or attention with a causal softmax."""
    at, w = f"gpt_neox.layers.{layer}.attention", model.weights
    if layer in model.operators:
        own = {name.removeprefix(f"{at}.operator."): tensor for name, tensor in w.items() if f"{at}.operator." in name}
        mixed_BLD: Tensor = torch.func.functional_call(model.operators[layer], own, (x_BLD,))
        return mixed_BLD
    weights_BHLL, v_BHLS = attention(model, layer, x_BLD)
    return linear((weights_BHLL @ v_BHLS).transpose(1, 2).flatten(2), w, f"{at}.dense")


def attention(model: Plain, layer: int, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Causal softmax weights (B, H, L, L) of an attention, and its values (B, H, L, D / H)."""
    size = x_BLD.shape[2] // model.heads
    fused = linear(x_BLD, model.weights, f"gpt_neox.layers.{layer}.attention.query_key_value")
    q_BHLS, k_BHLS, v_BHLS = fused.unflatten(2, (model.heads, 3, size)).transpose(1, 2).unbind(3)
    q_BHLS, k_BHLS = (rotated(part, int(size * model.rotary)) for part in (q_BHLS, k_BHLS))
    future = torch.ones(x_BLD.shape[1], x_BLD.shape[1], dtype=torch.bool).triu(1)
    scores_BHLL = (q_BHLS @ k_BHLS.mT / math.sqrt(size)).masked_fill(future, -math.inf)
    return scores_BHLL.softmax(-1).to(v_BHLS.dtype), v_BHLS


def seen_on_text(model: Plain, layer: int, ids_BL: Tensor) -> AttentionStatistics:
    """The mean logarithm of an attention's weights by lag, over the second half of the positions where it looks back so
    far from all of them, else over those that can; mean and covariance of what it reads."""
    x_BLD = run(model, ids_BL).mixed_from[layer]
    logs_BHLL = attention(model, layer, x_BLD)[0].double().clamp(min=1e-9).log()
    length = ids_BL.shape[1]
    profile = []
    for lag in range(length):
        at = range(max(lag, length // 2), length)
        profile.append(torch.stack([logs_BHLL[:, :, t, t - lag] for t in at]).mean((0, 1)))
    x_ND = x_BLD.flatten(0, 1).double()
    return AttentionStatistics(torch.stack(profile, dim=1), x_ND.mean(0), x_ND.t().cov(correction=0))


def rotated(x_BHLS: Tensor, count: int) -> Tensor:
    """The first `count` channels turned by the position, channel i with channel i + count / 2."""
    half = count // 2
    angle = torch.arange(x_BHLS.shape[2])[:, None] * 10_000.0 ** (-2 * torch.arange(half) / count)
    cos, sin = angle.cos().to(x_BHLS.dtype), angle.sin().to(x_BHLS.dtype)
    first, second, rest = x_BHLS[..., :half], x_BHLS[..., half:count], x_BHLS[..., count:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def drop(x: Tensor, model: Plain) -> Tensor:
    return F.dropout(x, model.dropout) if model.dropout else x


def put(
    model: Plain,
    layers: tuple[int, ...],
    config: Any,
    max_length: int,
    seed: int,
    from_attention: bool = True,
    text_BL: Tensor | None = None,
) -> None:
    """Operators in the place of attention, all drawn from one generator, and from what each does on the text."""
    seen = {} if text_BL is None else {layer: seen_on_text(model, layer, text_BL) for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    w, width = model.weights, model.weights["lm_head.weight"].shape[1]
    for layer in layers:
        at = f"gpt_neox.layers.{layer}.attention"
        operator: Any = build(config, width, max_length)
        replaced = dataclasses.replace(attention_of(model, at), statistics=seen.get(layer))
        operator.initialise(replaced if from_attention else None, generator)
        for name in [name for name in w if name.startswith(f"{at}.")]:
            del w[name]
        for name, parameter in operator.named_parameters():
            w[f"{at}.operator.{name}"] = parameter.detach().clone()
        model.operators[layer] = operator


def attention_of(model: Plain, at: str) -> AttentionWeights:
    """Query, key and value of a head lie next to each other in GPT-NeoX's fused projection."""
    w, heads = model.weights, model.heads
    weight, bias = w[f"{at}.query_key_value.weight"], w[f"{at}.query_key_value.bias"]
    rows = weight.unflatten(0, (heads, 3, -1)), bias.unflatten(0, (heads, 3, -1))
    query, key, value = (rows[0][:, which].flatten(0, 1) for which in range(3))
    biases = dict(zip(("query_bias", "key_bias", "value_bias"), (b.flatten() for b in rows[1].unbind(1)), strict=True))
    dense = f"{at}.dense"
    return AttentionWeights(query, key, value, w[f"{dense}.weight"], heads, output_bias=w[f"{dense}.bias"], **biases)


def sequences(tokens: np.ndarray[Any, Any], length: int, seed: int, limit: int | None = None) -> Iterator[Tensor]:
    """The text cut into windows, every epoch all of them once, in the order drawn from (seed, epoch); for ever.

    With a limit, the first so many of the first epoch alone; the first time as they come.
    """
    windows = torch.from_numpy(tokens.astype(np.int64))[: len(tokens) // length * length].view(-1, length)
    epoch = 0
    if limit is not None:
        windows = windows[torch.from_numpy(np.random.default_rng((seed, 0)).permutation(len(windows)))][:limit]
        yield from windows
        epoch = 1
    while True:
        yield from windows[torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(len(windows)))]
        epoch += 1


def what_tokens_count(ids_BL: Tensor, hit: float) -> Tensor:
    """Of predicted tokens, (B, L - 1): `hit` where the last three tokens stand earlier in the window, else 1; over
    their mean."""
    counts_BP = torch.ones(ids_BL.shape[0], ids_BL.shape[1] - 1)
    for row, window in enumerate(ids_BL.tolist()):
        for end in range(3, len(window)):
            before = [window[at - 2 : at + 1] for at in range(2, end)]
            if window[end - 2 : end + 1] in before:
                counts_BP[row, end - 1] = hit
    return counts_BP / counts_BP.mean()


def surprise(model: Plain, ids_BL: Tensor, hit: float = 1.0) -> Tensor:
    """Cross-entropy of the next token, nats per token that has one before it."""
    logs_BLV = run(model, ids_BL).logits_BLV[:, :-1].log_softmax(-1)
    return -(logs_BLV.gather(2, ids_BL[:, 1:, None])[:, :, 0] * what_tokens_count(ids_BL, hit)).mean()


def divergence(teacher: Plain, student: Plain, ids_BL: Tensor, temperature: float, hit: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats per predicted position, times the squared temperature."""
    with torch.no_grad():
        wanted = (run(teacher, ids_BL).logits_BLV[:, :-1] / temperature).log_softmax(-1)
    have = (run(student, ids_BL).logits_BLV[:, :-1] / temperature).log_softmax(-1)
    each_BP = (wanted.exp() * (wanted - have)).sum(-1)
    return (each_BP * what_tokens_count(ids_BL, hit)).mean() * temperature**2


def mixer_error(teacher: Plain, student: Plain, ids_BL: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Mean squared difference of operators and attention, both fed what the teacher's attention reads."""
    with torch.no_grad():
        flow = run(teacher, ids_BL)
    each = [(mixer(student, i, flow.mixed_from[i]) - flow.mixed[i]).float().pow(2).mean() for i in layers]
    return torch.stack(each).mean()


def stream_error(teacher: Plain, student: Plain, ids_BL: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Mean squared difference of the residual streams after the layers, each model fed its own."""
    with torch.no_grad():
        wanted = run(teacher, ids_BL).stream
    own = run(student, ids_BL).stream
    return torch.stack([(own[i] - wanted[i]).float().pow(2).mean() for i in layers]).mean()


@dataclasses.dataclass(frozen=True)
class Rates:
    """How weights are trained: the fields of a study's `optimizer` and the globs that it freezes."""

    muon: bool
    matrix_lr: float
    lr: float
    rest_scale: float
    weight_decay: float
    betas: tuple[float, float]
    gradient_clip: float
    warmup: float
    decay: float
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    average: Mapping[str, float | None] | None = None


@dataclasses.dataclass
class Taught:
    """What a training run told of every step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    factors: list[float] = dataclasses.field(default_factory=list)


def train(model: Plain, loss: Callable[[int], Tensor], steps: int, rates: Rates) -> Taught:
    """Change the weights by `steps` gradients of `loss(step)`."""
    taught, w = Taught(), model.weights
    trained = [name for name in w if trains(model, name, rates)]
    memory: dict[str, dict[str, Any]] = {name: {} for name in trained}
    past: list[Weights] = []
    for step in range(steps):
        rising = (step + 1) / (rates.warmup * steps) if rates.warmup else 1.0
        falling = (steps - step) / (rates.decay * steps) if rates.decay else 1.0
        factor = min(rising, 1.0, falling)
        for name in trained:
            w[name] = w[name].detach().requires_grad_()
        value = loss(step)
        found = torch.autograd.grad(value, [w[name] for name in trained], allow_unused=True)
        gradients = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
        size = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        for name, g in gradients.items():
            g = g * min(1.0, rates.gradient_clip / size)
            scale = factor * (1.0 if ".operator." in name else rates.rest_scale) * by_depth(model, name, rates)
            muon = rates.muon and is_matrix(name)
            update = by_muon if muon else by_adamw
            rate = scale * (rates.matrix_lr if muon else rates.lr)
            w[name] = update(w[name].detach() * (1 - rate * rates.weight_decay), g, rate, rates, memory[name])
        taught.losses.append(float(value.detach()))
        taught.norms.append(size)
        taught.factors.append(factor)
        past.append({name: w[name].detach() for name in trained})
    model.weights = {name: tensor.detach() for name, tensor in w.items()}
    if rates.average:
        model.weights |= averaged(past, **rates.average)
    return taught


def by_depth(model: Plain, name: str, rates: Rates) -> float:
    """The factor of each layer's rates for every layer above it, which for the embedding are all."""
    if ".layers." in name:
        above = model.layers - 1 - int(name.split(".layers.")[1].split(".")[0])
    else:
        above = model.layers if "embed_in" in name else 0
    return rates.layer_decay**above


def averaged(past: list[Weights], ema: float | None = None, last: float | None = None) -> Weights:
    """Of the weights after each step, written out as a weighted sum."""
    count = len(past) if last is None else math.ceil(last * len(past))
    chosen = past[len(past) - count :]
    if ema is None:
        shares = [1 / count] * count
    else:
        shares = [ema ** (count - 1)] + [(1 - ema) * ema ** (count - 1 - i) for i in range(1, count)]
    names = chosen[0]
    return {name: sum(s * w[name] for s, w in zip(shares, chosen, strict=True)) for name in names}  # type: ignore[misc]


def trains(model: Plain, name: str, rates: Rates) -> bool:
    """All but what a glob freezes, what an operator holds fixed, and the rest where its learning rate is 0."""
    if any(fnmatch(name, glob) for glob in rates.freeze):
        return False
    if ".operator." not in name:
        return rates.rest_scale > 0
    at, own = name.split(".attention.operator.")
    return bool(model.operators[int(at.rsplit(".", 1)[1])].get_parameter(own).requires_grad)


def is_matrix(name: str) -> bool:
    """Maps between hidden states: neither tables (embedding, output head) nor filters nor short convolutions."""
    return ".filter." not in name and name.endswith(".weight") and name.split(".")[-2] in MATRICES


def by_adamw(p: Tensor, g: Tensor, rate: float, rates: Rates, memory: dict[str, Any]) -> Tensor:
    """Adam's step; the decay of weights was done."""
    (first, second), t = rates.betas, memory.get("t", 0) + 1
    memory["t"] = t
    memory["m"] = first * memory.get("m", torch.zeros_like(p)) + (1 - first) * g
    memory["v"] = second * memory.get("v", torch.zeros_like(p)) + (1 - second) * g**2
    return p - rate * (memory["m"] / (1 - first**t)) / ((memory["v"] / (1 - second**t)).sqrt() + 1e-8)


def by_muon(p: Tensor, g: Tensor, rate: float, rates: Rates, memory: dict[str, Any]) -> Tensor:
    """Nesterov momentum 0.95, orthogonal by five rounds of Newton and Schulz, larger for tall ones; in bfloat16, or
    from it on in float32 on CPUs that have no other products."""
    memory["m"] = 0.95 * memory.get("m", torch.zeros_like(p)) + 0.05 * g
    x = (0.95 * memory["m"] + 0.05 * g).bfloat16()
    x = x if torch.ops.mkldnn._is_mkldnn_bf16_supported() else x.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        square = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, square, x, beta=3.4445)
    return p - rate * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * (x.T if tall else x).float()
