"""Operators against attention and a textbook Hyena: training, prefill and decode over widths, batches and lengths.

`python -m tests.benchmarks.operators --out DIR`, or `make bench`. One process, one thread, repeats of all contenders in
turn, medians; a ratio is the median of the ratios of one turn, above 1 where ours is faster. Floors stand beside them:
the projections alone as matrix products, and a copy of the inputs. Not a test: figures depend on the machine.

Shapes: B batch, L positions, D model width.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from operators.config import FilterConfig, HyenaConfig
from operators.registry import build
from tests.benchmarks.contenders import Attention, ModalHeads, TextbookHyena

ROOT = Path(__file__).resolve().parents[2]
HEAD_WIDTH = 64
LENGTHS = (256, 1024, 2048, 8192, 32768)
QUADRATIC_LIMIT = 8192  # positions that O(L^2) contenders are measured up to, in training and prefill
DECODED = 32
MODES_OF_A_HEAD = 8
MOST_POSITIONS = {"prefill": 32768, "training": 16384}  # of a batch: attention takes minutes beyond
HEADS = ("hyena-heads", "hyena-power", "hyena-heads modal", "hyena-heads smooth")
Timed = Callable[[], float]


def contenders(width: int, length: int) -> dict[str, Any]:
    """Everything that is compared, built for a width and a longest sequence."""
    heads = max(1, width // HEAD_WIDTH)
    positive = FilterConfig(positive=True, width=64, features=9)
    ours = {
        "hyena-2": HyenaConfig(init="random"),
        "hyena-heads": HyenaConfig(init="random", heads=heads),
        "hyena-heads smooth": HyenaConfig(init="random", heads=heads, filter=FilterConfig(sine_frequency=1.0)),
        "hyena-power": HyenaConfig(
            init="random", heads=heads, feature_map="power", key_dim=8, normalise=True, key_gate=True, filter=positive
        ),
    }
    found: dict[str, Any] = {"attention": Attention(width, heads), "textbook": TextbookHyena(width, length)}
    built: dict[str, Any] = {name: build(config, width, length) for name, config in ours.items()}
    built["hyena-heads modal"] = ModalHeads(ours["hyena-heads"], width, length, MODES_OF_A_HEAD)
    for name, operator in built.items():
        operator.initialise(None, torch.Generator().manual_seed(0))
        found[name] = operator
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def prefill(module: nn.Module, x: torch.Tensor, dtype: str) -> float:
    """Seconds of one forward pass without gradients."""
    with torch.no_grad(), precision(dtype):
        return timed(lambda: module(x))


def training(module: nn.Module, x: torch.Tensor, dtype: str) -> float:
    """Seconds of forward and backward, gradients of inputs included."""
    inputs = x.clone().requires_grad_()

    def step() -> None:
        with precision(dtype):
            output = module(inputs)
        output.float().square().mean().backward()

    seconds = timed(step)
    module.zero_grad(set_to_none=True)
    return seconds


def decode(module: Any, x: torch.Tensor, dtype: str) -> float:
    """Seconds of `DECODED` steps after the context before them."""
    batch, length, _ = x.shape
    context = length - DECODED
    with torch.no_grad(), precision(dtype):
        state = module.init_state(batch, length) if isinstance(module, Attention) else module.init_state(batch)
        module.extend(x[:, :context], state)
        parts = [x[:, t : t + 1] for t in range(context, length)]
        return timed(lambda: [module.extend(part, state) for part in parts])


MODES: dict[str, Callable[[Any, torch.Tensor, str], float]] = {
    "prefill": prefill, "training": training, "decode": decode
}  # fmt: skip


def precision(dtype: str) -> Any:
    """Automatic casts of projections, or none."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def floors(width: int, x: torch.Tensor, dtype: str) -> dict[str, float]:
    """Milliseconds of the projections of attention and order-2 Hyena as one matrix product, and of a copy of x."""
    matrix = torch.randn(width, 4 * width)
    rows = x.flatten(0, 1)
    with precision(dtype), torch.no_grad():
        product = statistics.median(timed(lambda: rows @ matrix) for _ in range(5))
    copied = statistics.median(timed(x.clone) for _ in range(5))
    return {"projections": 1e3 * product, "copy": 1e3 * copied}


def measure(mode: str, dtype: str, width: int, batch: int, length: int, repeats: int) -> dict[str, Any] | None:
    """One row: milliseconds by contender and ratios to attention and textbook; None where it takes too long."""
    if batch * length > MOST_POSITIONS.get(mode, batch * length):
        return None
    modules = contenders(width, length)
    if mode == "decode":
        del modules["textbook"]  # it has no state
    elif length > QUADRATIC_LIMIT:
        for name in ("hyena-heads", "hyena-power", *(["hyena-heads smooth"] if dtype == "float32" else [])):
            del modules[name]  # masked
    x = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    run = MODES[mode]
    for module in modules.values():
        run(module, x, dtype)
    turns = [{name: run(module, x, dtype) for name, module in modules.items()} for _ in range(repeats)]
    ours = [name for name in modules if name.startswith("hyena")]
    row: dict[str, Any] = {"mode": mode, "dtype": dtype, "D": width, "B": batch, "L": length, "floors": {}}
    row["ms"] = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in modules}
    for rival in ("attention", "textbook"):
        if rival in modules:
            row[f"vs_{rival}"] = {name: statistics.median(t[rival] / t[name] for t in turns) for name in ours}
    if mode == "prefill":
        row["floors"] = floors(width, x, dtype)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: milliseconds of the rivals, and how many times faster ours are."""
    lines = [
        "| mode | dtype | D | B | L | attention ms | textbook ms | hyena-2 vs attention | vs textbook "
        "| heads vs attention | power vs attention | modal heads vs attention | smooth heads vs attention |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ratio, textbook = row["vs_attention"], row.get("vs_textbook", {})
        cells = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "-" for name in ("attention", "textbook")]
        cells += [_times(ratio.get("hyena-2")), _times(textbook.get("hyena-2"))]
        cells += [_times(ratio.get(name)) for name in HEADS]
        lead = [row["mode"], row["dtype"], row["D"], row["B"], row["L"]]
        lines.append("| " + " | ".join(map(str, [*lead, *cells])) + " |")
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed over attention by length, a panel for every mode, at the largest width and batch 1."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = max(row["D"] for row in rows)
    figure, panels = pyplot.subplots(1, len(MODES), figsize=(13, 4), sharey=True)
    for panel, mode in zip(panels, MODES, strict=True):
        mine = [row for row in rows if (row["mode"], row["D"], row["B"]) == (mode, width, 1)]
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            for name in ("hyena-2", *HEADS):
                points = [
                    (r["L"], r["vs_attention"][name]) for r in mine if r["dtype"] == dtype and name in r["vs_attention"]
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), style, marker="o", label=f"{name} {dtype}")
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=f"{mode}, D {width}, B 1", xlabel="positions", xscale="log", yscale="log")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("times as fast as attention")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and write every row."""
    options = _options()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in options.modes:
        dtypes = ["float32"] if mode == "decode" else ["float32", "bfloat16"]
        for dtype in dtypes:
            for width in options.widths:
                for batch in options.batches:
                    for length in options.lengths:
                        repeats = options.repeats if length < QUADRATIC_LIMIT else max(3, options.repeats // 3)
                        row = measure(mode, dtype, width, batch, length, repeats)
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

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.operators", description=__doc__)
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), help=", ".join(MODES))
    parser.add_argument("--widths", type=numbers, default=[128, 512])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--lengths", type=numbers, default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=9, help="turns of all contenders; a third from 8k positions on")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder for JSON, table and plot")
    return parser.parse_args()


if __name__ == "__main__":
    main()
