"""Memory of distillation stages, measured: bytes per parameter of what a stage holds, and the peak of its process.

`python -m tests.benchmarks.memory` runs a step or two of stages on GPT-NeoX teachers of 20 to 150 M parameters with
random weights, each in a process of its own, compares them with `orchestrator.study.memory`, and writes `memory.md`
beside this file. Held is what is there between the gradients of the second step and its update; the peak is that of
the process, over what it took before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from operators.config import HyenaConfig, ImplicitFilterConfig
from orchestrator.cli import PROCESS as PROCESS_OF_STAGES
from orchestrator.study.memory import PROCESS, held_bytes, passing_bytes, stage_bytes
from orchestrator.study.model_sizes import operator_parameters, sizes_of
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import Architecture, DistilSpec, EvaluateSpec, PhaseSpec, ProbesSpec, TeacherSpec

POWER = HyenaConfig(
    heads=4, feature_map="power", key_dim=8, normalise=True, key_gate=True,
    filter=ImplicitFilterConfig(positive=True, width=64, features=9), init="random",
)  # fmt: skip
SHAPES = {  # parameters of the teacher: its shape
    "20 M": Architecture(layers=6, hidden=384, heads=4, intermediate=1536, max_length=512, vocabulary=12_000),
    "57 M": Architecture(layers=10, hidden=576, heads=8, intermediate=2304, max_length=512, vocabulary=15_000),
    "150 M": Architecture(layers=16, hidden=768, heads=12, intermediate=3072, max_length=512, vocabulary=24_000),
}
LARGE = sizes_of(  # Llama-3.1-8B
    Architecture(
        layers=32, hidden=4096, heads=32, intermediate=14_336, max_length=8192, vocabulary=128_256, pretrained="8B"
    ),
    {"model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 8, "tie_word_embeddings": False},
)
HEAD = """\
# Memory of distillation stages

`python -m tests.benchmarks.memory`: teachers held in bfloat16, what trains in float32, Muon, one text of 64 tokens a
step. Held are weights, gradients and the optimizer's state; counted is the same by `orchestrator.study.memory`; the
goal is 2.1 N + 16 O bytes with operators alone trained, 16 N with all. The peak, and what `plan` tells of it, are over
the 660 MB that a worker's process takes before its stage.
"""
NARROW = Numerics(dtype="bfloat16", teacher_dtype="bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage of a teacher: its kind, and what of a student trains."""

    shape: Architecture
    kind: str = "distil"
    rest_scale: float = 0.0
    numerics: Numerics = NARROW
    operator: HyenaConfig = POWER
    batch: int = 1
    length: int = 64
    again: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.shape.layers)) if self.kind == "distil" else ()

    @property
    def spec(self) -> Any:
        common: dict[str, Any] = {"tokens": "t", "sequence_length": self.length, "numerics": self.numerics}
        train: dict[str, Any] = {
            "batch_size": self.batch,
            "optimizer": Optimizer(rest_scale=self.rest_scale),
            "seed": 0,
        }
        if self.kind == "evaluate":
            settings = Evaluation(tokens=16 * self.batch * self.length, batch_size=self.batch)
            return EvaluateSpec(**common, teacher="r", subject="r", evaluation=settings)
        if self.kind == "probes":
            lengths = (self.length // 4, self.length)
            return ProbesSpec(
                **common, teacher="r", subject="r", lengths=lengths, windows=8 * self.batch, needles=2, seed=0
            )
        if self.kind == "teacher":
            numerics = self.numerics.model_copy(update={"teacher_dtype": "float32"})
            budget = 2 * self.batch * self.length
            made = {**common, **train, "numerics": numerics, "optimizer": Optimizer(rest_scale=1.0)}
            return TeacherSpec(**made, architecture=self.shape, token_budget=budget)
        return DistilSpec(
            **common, **train, teacher="r", parent="r", layers=self.layers, new_layers=self.layers, first_sequence=0,
            operator=self.operator, phases=(PhaseSpec(losses=Losses(kl=1.0), steps=2),), freeze=(),
            checkpoint_activations=self.again,
        )  # fmt: skip


def measured(case: Case) -> dict[str, float]:
    """Bytes held in the second step of the stage (0 where it does not train), and its peak over what there was before.

    Runs in a new process, which has loaded what a stage's process has.
    """
    told = {**dataclasses.asdict(case), "shape": case.shape.model_dump(), "numerics": case.numerics.model_dump()}
    told["operator"] = dataclasses.asdict(case.operator)
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--case", json.dumps(told)]
    variables = {**os.environ, **PROCESS_OF_STAGES, "OMP_NUM_THREADS": "1"}  # what it changes in memory is measured too
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


def expected(case: Case) -> float:
    """What the plan would tell, but for what a process takes before its stage."""
    found = stage_bytes(case.spec, sizes_of(case.shape), case.layers)
    assert found is not None
    return found - PROCESS["cpu"]


def _here(told: dict[str, Any]) -> dict[str, float]:
    """`measured`, in this process."""
    import ray  # noqa: F401 (the processes of stages have loaded it)

    from orchestrator.distill.context import RunContext, Workplace
    from orchestrator.distill.models.student import new_teacher
    from orchestrator.distill.stage import run_stage
    from orchestrator.distill.training import loop
    from orchestrator.distill.training.memory import give_back_freed_memory, peak_mb, reset_peak
    from tests.held import held_bytes as bytes_now
    from tests.texts import random_tokens, save_tokenizer, write_tokens

    filters = ImplicitFilterConfig(**told["operator"].pop("filter"))
    case = Case(**{
        **told, "shape": Architecture(**told["shape"]), "numerics": Numerics(**told["numerics"]),
        "operator": HyenaConfig(**told["operator"], filter=filters),
    })  # fmt: skip
    held: list[int] = []
    usual = loop.average_gradients
    loop.average_gradients = lambda parameters: (held.append(bytes_now()), usual(parameters))[1]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        text = random_tokens(case.length * max(64, 16 * case.batch))
        write_tokens(root / "tokens", train=text, valid=text)
        save_tokenizer(root / "tokens" / "tokenizer", ["a long convolution"], 300)
        for folder in ("work", "out"):
            (root / folder).mkdir()
        if case.kind != "teacher":
            new_teacher(case.shape, 0).save_pretrained(root / "teacher")
        inputs = {"tokens": root / "tokens", **dict.fromkeys(("teacher", "parent", "subject"), root / "teacher")}
        context = RunContext(store=name, checkpoint_seconds=1e9)
        give_back_freed_memory()
        before = bytes_now()
        reset_peak("cpu")
        began = peak_mb("cpu")
        run_stage(case.spec, Workplace(inputs, root / "work", root, root / "out", context, print))
        peak = peak_mb("cpu")
    return {"held": held[-1] - before if held else 0, "peak": (peak - began) * 2**20}


def report() -> str:
    """The table, and what follows for a model of 8 B parameters."""
    lines = [
        "| teacher | trained | teacher N, operators O | held | counted | bytes a number of N | goal | peak | `plan` |"
    ]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, shape in SHAPES.items():
        sizes = sizes_of(shape)
        count = shape.layers * operator_parameters(POWER, shape.hidden, shape.max_length).trained
        for rest_scale, trained in ((0.0, "operators"), (0.1, "all")):
            case = Case(shape, rest_scale=rest_scale)
            found, told = measured(case), expected(case)
            counted = held_bytes(case.spec, sizes, case.layers) or 0
            goal = 16 * sizes.parameters if rest_scale else 2.1 * sizes.parameters + 16 * count
            lines.append(
                f"| {name} | {trained} | {sizes.parameters / 1e6:.1f} M, {count / 1e6:.1f} M | {_mb(found['held'])} "
                f"| {_mb(counted)} | {found['held'] / sizes.parameters:.2f} | {_mb(goal)} | {_mb(found['peak'])} "
                f"| {_mb(told)} |"
            )
            print(lines[-1], flush=True)
    return "\n".join([*lines, "", extrapolated()])


def extrapolated() -> str:
    """What stages of a Llama of 8 B parameters hold, as counted."""
    held = []
    for rest_scale in (0.0, 0.1):
        case = Case(LARGE.shape, rest_scale=rest_scale, length=8192)
        held.append((held_bytes(case.spec, LARGE, case.layers) or 0) / 1e9)
    count = 32 * operator_parameters(POWER, 4096, 8192).trained
    return (
        f"Counted so, stages of Llama-3.1-8B ({LARGE.parameters / 1e9:.2f} B parameters; operators with power features "
        f"in every\nlayer, {count / 1e9:.2f} B) hold {held[0]:.0f} GB with operators alone trained, {held[1]:.0f} GB "
        f"with all: {1e9 * held[1] / LARGE.parameters:.1f} bytes a number. A step\nof 8,192 tokens with operators "
        f"alone trained takes {_gb(False)} GB more on a GPU, {_gb(True)} GB with\n`recipe.checkpoint_activations`."
    )


def _gb(again: bool) -> str:
    case = Case(LARGE.shape, again=again, length=8192)
    return f"{passing_bytes(case.spec, LARGE, case.layers, 'cuda') / 1e9:.0f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    if "--case" in sys.argv:
        print(json.dumps(_here(json.loads(sys.argv[2]))))
    else:
        table = report()
        Path(__file__).with_name("memory.md").write_text(f"{HEAD}\n{table}\n", encoding="utf-8")
        print(table.split("\n\n")[-1])
