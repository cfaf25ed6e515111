"""Operators against attention and a textbook Hyena: training, prefill and decode over widths, batches and lengths.

`python -m tests.benchmarks.operators --out DIR`, or `make bench`. One process, one thread, repeats of all contenders in
turn, medians; a ratio is the median of the ratios of one turn, above 1 where ours is faster. Floors stand beside them:
the projections alone as matrix products, and a copy of the inputs. What a rival takes over the former is the most that
any operator with these projections can reach. Contenders named "native" run through the compiled
core, where there is one; with `--device cuda` everything runs on the GPU, ours by kernels, those named "torch" without.
Not a test: figures depend on the machine.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import operators.gpu
from operators import native
from operators.config import HyenaConfig, ImplicitFilterConfig, ModalFilterConfig, OperatorConfig, WindowConfig
from operators.decoding.kept import frozen_filters
from operators.registry import build
from tests.benchmarks.contenders import Attention, TextbookHyena
from tests.benchmarks.drawing import NATIVE, plot, table

ROOT = Path(__file__).resolve().parents[2]
HEAD_WIDTH = 64
LENGTHS = (256, 1024, 2048, 8192, 32768)
QUADRATIC_LIMIT = 8192  # positions that O(L^2) contenders are measured up to, in training and prefill
DECODED = 32
IN_A_ROW = 10
EAGER = False  # with launches, on a GPU
ONLY: list[str] = []  # operators that are measured, all where it is empty
CLOCK = time.perf_counter  # or that of the process alone, where others use the machine
TORCH = " torch"
MOST_POSITIONS = {"prefill": 32768, "training": 16384, "decode": 65536}  # of a batch: attention takes minutes beyond
POSITIVE = ImplicitFilterConfig(positive=True, width=64, features=9)


def kinds(heads: int) -> dict[str, OperatorConfig]:
    """Our operators that are compared."""
    power = HyenaConfig(
        init="random", heads=heads, feature_map="power", key_dim=8, normalise=True, key_gate=True, filter=POSITIVE
    )
    return {
        "hyena-2": HyenaConfig(init="random"),
        "heads": HyenaConfig(init="random", heads=heads),
        "heads modal": HyenaConfig(init="random", heads=heads, filter=ModalFilterConfig(modes=8, positive=True)),
        "heads smooth": HyenaConfig(init="random", heads=heads, filter=ImplicitFilterConfig(sine_frequency=1.0)),
        "power": power,
        "power, window": dataclasses.replace(power, window=64, sinks=4),
        "tied window": HyenaConfig(
            init="random",
            heads=heads,
            feature_map="power",
            degree=8,
            normalise=True,
            window=64,
            sinks=4,
            tied=True,
            filter=POSITIVE,
        ),
        "squares, window": dataclasses.replace(
            power, degree=2, window=64, sinks=4, filter=ModalFilterConfig(modes=4, positive=True)
        ),
        "window alone": WindowConfig(init="random", heads=heads),
    }


def contenders(width: int, length: int, device: str = "cpu") -> dict[str, Any]:
    """Everything that is compared, built for a width and a longest sequence."""
    heads = max(1, width // HEAD_WIDTH)
    ours = {name: config for name, config in kinds(heads).items() if not ONLY or name in ONLY}
    found: dict[str, Any] = {"attention": Attention(width, heads), "textbook": TextbookHyena(width, length)}
    for name, config in ours.items():
        operator: Any = build(config, width, length)
        operator.initialise(None, torch.Generator().manual_seed(0))
        found[name] = operator
    for module in found.values():
        module.to(device)
    if device != "cpu":
        found |= {f"{name}{TORCH}": found[name] for name in ("hyena-2",) if name in found}
    elif native.available():
        found |= {f"{name}{NATIVE}": found[name] for name in ours}
    return found


def fits(name: str, mode: str, dtype: str, batch: int, length: int, device: str) -> bool:
    """Whether a contender is measured: the textbook has no state, and what is quadratic takes too long."""
    name = name.removesuffix(NATIVE).removesuffix(TORCH)
    quadratic = name in ("heads", "power", "power, window", "tied window") or (
        name == "heads smooth" and dtype == "float32"
    )
    if quadratic and device == "cpu" and (length > QUADRATIC_LIMIT or batch * length > 2 * QUADRATIC_LIMIT):
        return False
    return name != "textbook" or mode != "decode"


@contextlib.contextmanager
def core(name: str) -> Iterator[None]:
    """The compiled core for contenders that are named so, and no kernels for those that do without."""
    native.use(name.endswith(NATIVE))
    kernels = operators.gpu.triton
    if name.endswith(TORCH):
        operators.gpu.triton = None
    try:
        yield
    finally:
        native.use(False)
        operators.gpu.triton = kernels


def timed(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of a call; on a GPU of one in a row of `IN_A_ROW`, from idle to idle, replayed unless `EAGER`."""
    if device == "cpu":
        began = CLOCK()
        work()
        return CLOCK() - began
    work = work if EAGER else recorded(work)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(IN_A_ROW):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / IN_A_ROW


def recorded(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a graph of kernels, which replays without the time that launching each takes."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def prefill(module: nn.Module, x: torch.Tensor, dtype: str) -> float:
    """Seconds of one forward pass without gradients."""
    with torch.no_grad(), precision(dtype, x.device.type):
        return timed(lambda: module(x), x.device.type)


def training(module: nn.Module, x: torch.Tensor, dtype: str) -> float:
    """Seconds of forward and, from a gradient of the output on, backward, gradients of inputs included."""
    inputs, gradient = x.clone().requires_grad_(), torch.randn_like(x)
    given = {gradient.dtype: gradient, torch.bfloat16: gradient.bfloat16()}

    def step() -> None:
        module.zero_grad(set_to_none=True)
        with precision(dtype, x.device.type):
            output = module(inputs)
        output.backward(given[output.dtype])

    seconds = timed(step, x.device.type)
    module.zero_grad(set_to_none=True)
    inputs.grad = None
    return seconds


def decode(module: Any, x: torch.Tensor, dtype: str) -> list[float]:
    """Seconds of each of the last `DECODED` positions, after the context before them."""
    batch, length, _ = x.shape
    context = length - DECODED
    with torch.no_grad(), precision(dtype, x.device.type):
        state = module.init_state(batch, length) if isinstance(module, Attention) else module.init_state(batch)
        module.extend(x[:, :context], state)
        parts = [x[:, t : t + 1] for t in range(context, length)]
        if x.is_cuda:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for part in parts:
                module.extend(part, state)
            torch.cuda.synchronize()
            return [(time.perf_counter() - began) / len(parts)] * len(parts)
        return [timed(lambda part=part: module.extend(part, state)) for part in parts]  # type: ignore[misc]


def saved_bytes(module: nn.Module, x: torch.Tensor, dtype: str) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and inputs left out."""
    known = {part.untyped_storage().data_ptr() for part in [*module.parameters(), *module.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision(dtype, x.device.type):
        output = module(x.requires_grad_())
    del output
    return sum(kept.values())


def precision(dtype: str, device: str) -> Any:
    """Automatic casts of projections, or none."""
    return torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def floors(width: int, x: torch.Tensor, dtype: str, mode: str) -> dict[str, float]:
    """Milliseconds of the two projections of attention and order-2 Hyena alone, for training with their gradients,
    everything in `dtype` before; and of a copy of x."""
    device, trained = x.device.type, mode == "training"
    rows = x.flatten(0, 1).to(getattr(torch, dtype)).requires_grad_(trained)
    weights = [torch.randn(count * width, width, device=device, dtype=rows.dtype) for count in (3, 1)]
    gradients = [torch.randn(len(rows), len(weight), device=device, dtype=rows.dtype) for weight in weights]

    def products() -> None:
        outputs = [nn.functional.linear(rows, weight.requires_grad_(trained)) for weight in weights]
        if trained:
            torch.autograd.grad(outputs, [rows, *weights], gradients)

    with torch.set_grad_enabled(trained):
        taken = {"projections": products, "copy": x.clone}
        return {
            name: 1e3 * statistics.median(timed(work, device) for _ in range(5))  # type: ignore[arg-type]
            for name, work in taken.items()
        }


def measure(
    mode: str, dtype: str, width: int, batch: int, length: int, repeats: int, device: str
) -> dict[str, Any] | None:
    """One row: milliseconds by contender (of a token in decode) and ratios; None where it takes too long."""
    if batch * length > MOST_POSITIONS[mode] * (8 if device == "cuda" else 1):
        return None
    context = DECODED if mode == "decode" else 0
    made = contenders(width, length + context, device)
    modules = {name: module for name, module in made.items() if fits(name, mode, dtype, batch, length, device)}
    x = torch.randn(batch, length + context, width, generator=torch.Generator().manual_seed(1)).to(device)
    row: dict[str, Any] = {"mode": mode, "dtype": dtype, "D": width, "B": batch, "L": length}
    row["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    turns = []
    with frozen_filters(nn.ModuleList(modules.values())):  # as a server would; training reads none
        for turn in range(repeats + 1):
            taken: dict[str, Any] = {}
            for name, module in modules.items():
                with core(name):
                    taken[name] = {"prefill": prefill, "training": training, "decode": decode}[mode](module, x, dtype)  # type: ignore[operator]
            if turn:  # the first warms up
                turns.append(taken)
            if device == "cuda":
                torch.cuda.empty_cache()
    if mode == "decode":
        row["worst"] = {
            name: statistics.median(max(t[name]) / statistics.mean(t[name]) for t in turns) for name in modules
        }
        turns = [{name: statistics.mean(t[name]) for name in modules} for t in turns]
    row["ms"] = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in modules}
    for rival in ("attention", "textbook"):
        ours = [name for name in modules if name not in ("attention", "textbook")]
        if rival in modules:
            row[f"vs_{rival}"] = {name: statistics.median(t[rival] / t[name] for t in turns) for name in ours}
    if mode != "decode":
        row["floors"] = floors(width, x, dtype, mode)
    if mode == "training":
        row["saved_mb"] = {}
        for name, module in modules.items():
            with core(name):
                row["saved_mb"][name] = saved_bytes(module, x.clone(), dtype) / 2**20
    return row


def main() -> None:
    """Measure, print and write every row."""
    global EAGER, CLOCK, ONLY
    options = _options()
    ONLY = options.only
    EAGER, CLOCK = options.eager, time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # filters with random weights have such lags, trained ones none
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in options.modes:
        for dtype in ["float32"] if mode == "decode" else options.dtypes:
            for width in options.widths:
                for batch in options.batches:
                    for length in options.lengths:
                        repeats = options.repeats if length < QUADRATIC_LIMIT else max(3, options.repeats // 3)
                        row = measure(mode, dtype, width, batch, length, repeats, options.device)
                        gc.collect()
                        if row is not None:
                            rows.append(row)
                            print(json.dumps(row), flush=True)
                            (options.out / "operators.json").write_text(json.dumps(rows, indent=1))
    (options.out / "operators.md").write_text(table(rows) + "\n")
    plot(rows, options.out / "operators.png")
    print(table(rows))


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def words(text: str) -> list[str]:
        return text.split(",")

    def names(text: str) -> list[str]:
        return text.split(";")

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.operators", description=__doc__)
    parser.add_argument("--modes", type=words, default=list(MOST_POSITIONS), help=", ".join(MOST_POSITIONS))
    parser.add_argument("--widths", type=numbers, default=[128, 512])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--lengths", type=numbers, default=list(LENGTHS))
    parser.add_argument("--only", type=names, default=[], help="operators, as 'power;window alone'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--eager", action="store_true", help="on a GPU, time launches too instead of recorded graphs")
    parser.add_argument("--busy", action="store_true", help="on a CPU that others use, count the process's own time")
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="turns of all contenders; a third from 8k positions on")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder for JSON, table and plot")
    return parser.parse_args()


if __name__ == "__main__":
    main()
