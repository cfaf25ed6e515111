"""What the stage tree saves against plain tuning, and what it costs: `python -m tests.benchmarks.tree --out DIR`.

Both sides run the same trials with the same stage functions on the same machine in one session: plain Ray Tune, each
trial alone (plain.py), and `layerswap run`. Text and teacher are given to both and controls are left out on both, so
trials are compared with trials. Token budgets are multiplied by `--scale` and `--late-scale`; the shape of the tree,
which decides the ratios, stays.

A stage's core-seconds are the processor time of its process while it was computed. Busy seconds are those of every
process of a side, whatever it did. Not a test: figures depend on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.distill.context import RunContext
from orchestrator.files import read_json, write_json
from orchestrator.run.compute import compute
from orchestrator.study.plan import Plan
from tests.benchmarks.plain import give, load

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ("tokens", "tokens_per_layer")
FINER = [  # what a second user sweeps after the late-stage study: four of its values, and four between them
    {"kl": 1.0}, {"kl": 1.0, "ce": 0.25}, {"kl": 1.0, "ce": 0.5}, {"kl": 1.0, "ce": 1.0},
    {"kl": 1.0, "ce": 0.1}, {"kl": 1.0, "ce": 0.35}, {"kl": 1.0, "ce": 0.7}, {"kl": 1.0, "ce": 0.85},
]  # fmt: skip


@dataclasses.dataclass
class Side:
    """What one side of a comparison used, trials only."""

    stages: int = 0
    tokens: int = 0
    core_seconds: float = 0.0
    busy_seconds: float = 0.0
    wall_seconds: float = 0.0

    def __add__(self, other: Side) -> Side:
        return Side(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass
class Comparison:
    """Both sides of one study or several in a row, and where the tree side's time went."""

    plain: Side
    tree: Side
    stage_seconds: float  # core-seconds inside stages of any kind, of the tree side
    parts: Counter[str]  # busy seconds by process, of the tree side

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.plain + other.plain,
            self.tree + other.tree,
            self.stage_seconds + other.stage_seconds,
            self.parts + other.parts,
        )

    def told(self) -> dict[str, Any]:
        """Everything in JSON values, with ratios and the overhead."""
        plain, tree = dataclasses.asdict(self.plain), dataclasses.asdict(self.tree)
        return {
            "plain": plain,
            "tree": tree,
            "ratio": {key: plain[key] / tree[key] for key in plain},
            "overhead": 1 - self.stage_seconds / self.tree.busy_seconds,
            "parts": dict(self.parts),
        }


def main() -> None:
    """Run the comparisons and the measurements of cost, print them and write them."""
    options = _options()
    out: Path = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    default = scaled(ROOT / "studies/layerwise.yaml", out, options.scale)
    late = scaled(ROOT / "studies/late-stage.yaml", out, options.late_scale)
    finer = scaled(ROOT / "studies/late-stage.yaml", out, options.late_scale, "finer", {"recipe.joint.0.losses": FINER})
    given = prepare([default, late, finer], out / "given")
    result: dict[str, Any] = {"scale": {"default": options.scale, "late stage": options.late_scale}, "comparisons": {}}
    compared = result["comparisons"]
    if "default" in options.parts:
        compared["default"] = one_study(default, given, out / "default").told()
    if "late" in options.parts:
        first = one_study(late, given, out / "late")
        both = first + one_study(finer, given, out / "late")
        compared |= {"late stage": first.told(), "two studies": both.told()}
    if "start" in options.parts:
        result["start"] = start_up(default, given, out / "default" / "home", out / "start")
    if "parallel" in options.parts:
        result["parallel"] = parallel(late, given, out / "parallel", options.repeats)
    write_json(out / "tree.json", result)
    (out / "tree.md").write_text(table(result) + "\n")
    print(table(result))


def scaled(study: Path, out: Path, scale: float, name: str | None = None, space: Any = None) -> Path:
    """A copy of a study with every budget multiplied and no controls, in `out`."""
    document = yaml.safe_load(study.read_text())
    document = _multiplied(document, scale)
    document["controls"] = {"skip": False, "scratch": "none"}
    document["throughput"] = {"lengths": [64], "decode_tokens": 4, "repeats": 1}
    if space is not None:
        document["search"]["space"] = space
    document["study"] = name or document["study"]
    path = out / f"{document['study']}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def _multiplied(value: Any, scale: float) -> Any:
    if isinstance(value, dict):
        return {
            key: max(4096, int(item * scale)) if key in BUDGETS and isinstance(item, int) else _multiplied(item, scale)
            for key, item in value.items()
        }
    return [_multiplied(item, scale) for item in value] if isinstance(value, list) else value


def prepare(studies: list[Path], given: Path) -> Path:
    """A store that has the text and the teacher of the studies."""
    for study in studies:
        plan, locations = load(study)
        for spec in (plan.tokens, plan.teacher.train):
            compute(spec.model_dump_json(), RunContext(str(given), locations=locations))
    return given


def one_study(study: Path, given: Path, out: Path) -> Comparison:
    """Both sides of one study, the tree in the store that `out` has; `RuntimeError` where they end in other bits."""
    plan, _ = load(study)
    store, alone = out / "home" / "store", out / f"plain-{study.stem}"
    command = [sys.executable, "-m", "tests.benchmarks.plain", str(study), str(given), str(alone)]
    wall, busy, _ = measured(command, out / f"plain-{study.stem}.log")
    plain = _side([(alone / trial.name, spec) for trial in plan.trials for spec in _specs(trial.steps)], wall, busy)
    give(plan, given, store)
    before = {path.parent.name for path in store.glob("??/*/DONE.json")}
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--home", str(out / "home")]
    wall, busy, parts = measured(command, out / f"tree-{study.stem}.log")
    mine = {spec.key: spec for trial in plan.trials for spec in _specs(trial.steps) if spec.key not in before}
    tree = _side([(store, spec) for spec in mine.values()], wall, busy)
    _same_bits(plan, alone, store)
    comparison = Comparison(plain, tree, stage_seconds(store, before), parts)
    print(json.dumps({study.stem: comparison.told()}), flush=True)
    return comparison


def _specs(steps: Iterable[Any]) -> list[Any]:
    return [spec for step in steps for spec in (step.train, step.evaluate)]


def _side(folders: list[tuple[Path, Any]], wall: float, busy: float) -> Side:
    side = Side(busy_seconds=busy, wall_seconds=wall)
    for store, spec in folders:
        side.core_seconds += read_json(store / spec.key[:2] / spec.key / "DONE.json")["core_seconds"]
        if spec.kind == "distil":
            side.stages += 1
            side.tokens += sum(phase.steps for phase in spec.phases) * spec.batch_size * spec.sequence_length
    return side


def stage_seconds(store: Path, before: set[str]) -> float:
    """Core-seconds inside all stages, of any kind, that a run added to those `before` it."""
    manifests = [read_json(path) for path in store.glob("??/*/DONE.json") if path.parent.name not in before]
    return float(sum(manifest["core_seconds"] for manifest in manifests))


def _same_bits(plan: Plan, alone: Path, tree_store: Path) -> None:
    for trial in plan.trials:
        for spec in _specs(trial.steps):
            place = Path(spec.key[:2]) / spec.key / "DONE.json"
            one, other = (read_json(root / place) for root in (alone / trial.name, tree_store))
            if one["files"] != other["files"] or (spec.kind == "evaluate" and one["result"] != other["result"]):
                raise RuntimeError(
                    f"{trial.name}: {spec.kind} {spec.key[:8]} differs between plain tuning and the tree"
                )


def measured(command: list[str], log: Path) -> tuple[float, float, Counter[str]]:
    """Run a command; wall seconds, and processor seconds of it and all below it, in all and by part."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    used: dict[int, float] = {}
    names: dict[int, str] = {}
    with log.open("wb") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        known: dict[int, psutil.Process] = {process.pid: process}
        while process.poll() is None:
            for child in _below(process):
                known.setdefault(child.pid, child)
            for pid, one in known.items():
                try:
                    times = one.cpu_times()
                    used[pid] = max(used.get(pid, 0.0), times.user + times.system)
                    names[pid] = _part(one, names.get(pid))
                except psutil.Error:
                    continue
            time.sleep(0.2)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    parts: Counter[str] = Counter()
    for pid, seconds in used.items():
        parts["driver" if pid == process.pid else names[pid]] += seconds
    return time.monotonic() - began, sum(used.values()), parts


def _part(process: psutil.Process, before: str | None) -> str:
    """What a process below a driver is: broker, trial, worker (it computes stages) or Ray's own."""
    title = (process.cmdline() or [""])[0]
    for start, name in {"ray::Broker": "broker", "ray::ImplicitFunc": "trials"}.items():
        if title.startswith(start):
            return name
    return before or "ray" if not title.startswith("ray::") or title == "ray::IDLE" or "Agent" in title else "workers"


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def start_up(study: Path, given: Path, finished: Path, out: Path) -> dict[str, float]:
    """Seconds from the command to the first training step (text given), and of a run that finds all done."""
    plan, _ = load(study)
    store = out / "store"
    (store / plan.tokens.key[:2]).mkdir(parents=True)
    (store / plan.tokens.key[:2] / plan.tokens.key).symlink_to(given / plan.tokens.key[:2] / plan.tokens.key)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(study), "--home"]
    measured([*command, str(finished)], out / "finish.log")  # if it is not yet
    began = time.monotonic()
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = store / plan.teacher.train.key[:2] / plan.teacher.train.key / "journal.jsonl"
    while not journal.exists():  # it is opened right before the first step
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before its first step")
        time.sleep(0.02)
    first = time.monotonic() - began
    process.terminate()
    process.wait()
    idle = [measured([*command, str(finished)], out / "idle.log")[0] for _ in range(3)]
    return {"first_step_seconds": first, "nothing_to_do_seconds": statistics.median(idle)}


def parallel(study: Path, given: Path, out: Path, repeats: int) -> dict[str, Any]:
    """Two stages one after the other against two at a time, in turn; the median of the ratios of wall time."""
    import ray

    plan, locations = load(study)
    stages = [trial.steps[0].train for trial in plan.trials[:1]]
    twin = stages[0].model_copy(update={"seed": 1})
    stages.append(type(twin).model_validate(twin.model_dump()))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.mkdtemp(prefix="tree-"))
    task = ray.remote(compute).options(num_cpus=1)

    def run(name: str, *, together: bool) -> float:
        give(plan, given, out / name)
        context = RunContext(str(out / name), locations=locations)
        began = time.monotonic()
        if together:
            ray.get([task.remote(stage.model_dump_json(), context) for stage in stages])
        else:
            for stage in stages:
                ray.get(task.remote(stage.model_dump_json(), context))
        return time.monotonic() - began

    run("warm", together=True)
    pairs = [(run(f"one-{i}", together=False), run(f"two-{i}", together=True)) for i in range(repeats)]
    ray.shutdown()
    return {"pairs": pairs, "ratio": statistics.median(one / two for one, two in pairs)}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        f"Token budgets x {result['scale']['default']} of the default study, x {result['scale']['late stage']} of the "
        "others; text and teacher given to both sides, no controls.",
        "",
        "| trials | side | stages | tokens | core-seconds in stages | busy seconds | wall seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, told in result["comparisons"].items():
        for side in ("plain", "tree"):
            one = told[side]
            lines.append(
                f"| {name} | {side} | {one['stages']} | {one['tokens']:,} | {one['core_seconds']:.1f} "
                f"| {one['busy_seconds']:.1f} | {one['wall_seconds']:.1f} |"
            )
        ratio = told["ratio"]
        cells = " | ".join(f"{ratio[key]:.2f}x" for key in ("stages", "tokens", "core_seconds", "busy_seconds"))
        lines.append(f"| {name} | ratio | {cells} | {ratio['wall_seconds']:.2f}x |")
    lines.append("")
    if result["comparisons"]:
        overheads = ", ".join(f"{name} {told['overhead']:.1%}" for name, told in result["comparisons"].items())
        lines += [
            "- same student bits on both sides for every stage of every trial: yes (checked by digest)",
            f"- overhead, 1 - core-seconds in stages / busy seconds of all processes: {overheads}",
        ]
    if "parallel" in result:
        lines.append(f"- two stages at a time against one after the other: {result['parallel']['ratio']:.2f}x")
    if "start" in result:
        lines.append(f"- from the command to the first training step: {result['start']['first_step_seconds']:.1f} s")
        lines.append(f"- run with nothing to do: {result['start']['nothing_to_do_seconds']:.1f} s")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tree", description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="factor on every token budget of the default study")
    parser.add_argument("--late-scale", type=float, default=0.1, help="factor on those of the other two")
    parser.add_argument("--parts", default="default,late,start,parallel", help="which to measure, by comma")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of the parallel measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-tree", help="folder to write, emptied first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
