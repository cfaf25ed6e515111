"""Whole models: a teacher of Pythia-70M's shape and its all-swapped students, prefill and a step of distillation.

`python -m tests.benchmarks.models --device cuda`. Weights are random: speed does not depend on them. A step is the
teacher's forward pass, the student's forward and backward pass under autocast to bfloat16, the divergence of logits,
and AdamW on all weights; the teacher's own step has cross entropy instead. Medians of turns of all models, wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from operators import native
from operators.config import HyenaConfig
from orchestrator.distill.models.swap import swap
from tests.benchmarks.operators import kinds

STUDENTS = {name: config for name, config in kinds(heads=8).items() if name in ("hyena-2", "heads modal", "power")}


def build(length: int, config: HyenaConfig | None, device: str) -> Any:
    """A random model of 6 layers and width 512, all swapped where there is a configuration."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50304, max_position_embeddings=length, **shape))
    model.config.use_cache = False
    if config is not None:
        swap(model, range(6), config, torch.Generator().manual_seed(0))
    return model.to(device)


def stepper(model: Any, teacher: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """One step of training: distillation, or of the teacher itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            if model is teacher:
                logits = model(tokens).logits[:, :-1]
                loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            else:
                with torch.no_grad():
                    wanted = teacher(tokens).logits.log_softmax(-1)
                loss = functional.kl_div(
                    model(tokens).logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
                )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None], device: str, calls: int) -> float:
    """Of one of several calls in a row."""
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.models", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    native.use(options.device == "cpu")
    shape, calls = (options.batch, options.length), 3 if options.device == "cuda" else 1
    tokens = torch.randint(50304, shape, generator=torch.Generator().manual_seed(1)).to(options.device)
    teacher = build(options.length, None, options.device)
    models = {"teacher": teacher} | {k: build(options.length, v, options.device) for k, v in STUDENTS.items()}

    def prefill(model: Any) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad(), torch.autocast(options.device, dtype=torch.bfloat16):
                model.base_model(tokens)

        return forward

    works = {name: (prefill(model), stepper(model, teacher, tokens)) for name, model in models.items()}
    turns: list[dict[str, list[float]]] = []
    for turn in range(options.repeats + 1):
        taken = {name: [seconds(work, options.device, calls) for work in pair] for name, pair in works.items()}
        turns += [taken] if turn else []  # the first warms up
    print(f"{torch.cuda.get_device_name() if options.device == 'cuda' else 'cpu'}, batch and length {shape}")
    print("| | prefill, tokens/s | over the teacher's | step, tokens/s | over the teacher's |\n|---|--:|--:|--:|--:|")
    for name in models:
        cells = []
        for part in range(2):
            ratio = statistics.median(turn["teacher"][part] / turn[name][part] for turn in turns)
            rate = tokens.numel() / statistics.median(turn[name][part] for turn in turns)
            cells += [f"{rate:,.0f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
