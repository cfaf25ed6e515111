"""Records -> the answer: a table for the terminal, a Pareto picture, a Markdown report, a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from orchestrator.files import write_json, write_text
from orchestrator.record.answer.probe_table import LEGEND as PROBE_LEGEND
from orchestrator.record.answer.probe_table import draw_probes, drawn, probe_table, probed_rows
from orchestrator.record.answer.speed_table import LEGEND as SPEED_LEGEND
from orchestrator.record.answer.speed_table import crossovers, draw_speed, measured_rows, speed_table
from orchestrator.record.answer.task_table import LEGEND as TASK_LEGEND
from orchestrator.record.answer.task_table import task_table
from orchestrator.record.records import Record, best_path, ends, pareto_front
from orchestrator.study.plan import Plan

COLUMNS = ["row", "swapped", "tokens", "perplexity", "ratio", "agree", "hit", "miss"]
COLUMNS += ["copied", "greedy", "sampled", "prefill", "decode"]
LEGEND = (
    "swapped: attention layers replaced. tokens: trained by the student so far. ratio: perplexity over the teacher's.\n"
    "agree: top-1 equal to the teacher's. hit, miss: nats per token on tokens that complete a trigram already in the\n"
    "window, and on the others. copied: greedy tokens equal to the teacher's. greedy, sampled: the teacher's\n"
    "perplexity of what the row's model says so; near the teacher's own is good. prefill, decode: speed over the\n"
    "teacher's at {length} tokens, one sequence{core}; the teacher's own row shows the noise of that measurement."
)


def legend(records: list[Record], length: str) -> str:
    compiled = any(row["metrics"].get("core") == "native" for row in records)
    return LEGEND.format(length=length, core=", students by the compiled core" if compiled else "")


def write_report(plan: Plan, records: list[Record], run: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write `report.md`, `records.csv`, `records.json` and pictures into `folder`; returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in ("report.md", "records.json", "records.csv")}
    write_json(paths["records.json"], {"study": plan.study.study, "run": run, "records": records})
    write_text(paths["records.csv"], pd.json_normalize(records).to_csv(index=False))
    if draw_pareto(plan, records, folder / "pareto.png"):
        paths["pareto.png"] = folder / "pareto.png"
    if draw_probes(plan.study.study, probed_rows(records), folder / "probes.png"):
        paths["probes.png"] = folder / "probes.png"
    if draw_speed(plan.study.study, measured_rows(records), folder / "speed.png"):
        paths["speed.png"] = folder / "speed.png"
    write_text(paths["report.md"], markdown(plan, records, run))
    return paths


def answer(plan: Plan, records: list[Record], run: dict[str, Any], commands: list[str]) -> str:
    """What the terminal shows at the end: teacher, controls and the best path stage by stage, then what comes next."""
    length = str(max(plan.study.throughput.lengths))
    chosen = [row for row in records if row["kind"] in ("teacher", "control")]
    path = best_path(records)
    lines = [plan.study.question.strip() or plan.study.study, ""]
    lines += [text_table(table(chosen, length)), ""]
    if path:
        lines += [
            f"best path: {path[0]['trial']} {path[0]['words']}",
            text_table(table(path, length)),
            "",
        ]
    lines += [text_table(table(ends(records), length, "trial")), ""] if len(ends(records)) > 1 else []
    best = dict([*measured_rows(records).items()][:1]) if path else {}
    lines += [text_table(speed_table(best)), SPEED_LEGEND, crossovers(best), ""] if best else []
    probed = probed_rows(records)
    lines += [text_table(probe_table(probed)), PROBE_LEGEND, ""] if probed else []
    tasks = _tasks(records)
    lines += [text_table(task_table(tasks)), TASK_LEGEND, ""] if tasks else []
    lines += [legend(records, length), "", resources(run), "", *commands]
    return "\n".join(lines)


def markdown(plan: Plan, records: list[Record], run: dict[str, Any]) -> str:
    """The report as a page."""
    length = str(max(plan.study.throughput.lengths))
    study = plan.study
    path = best_path(records)
    controls = [row for row in records if row["kind"] in ("teacher", "control")]
    parts = [f"# {study.study}", study.question.strip(), "## Verdict", verdict(records)]
    parts += ["## Teacher and controls", pipe_table(table(controls, length))]
    if path:
        parts += [
            f"## Best path: {path[0]['trial']}",
            f"`{path[0]['words']}`",
            pipe_table(table(path, length)),
        ]
    parts += ["## Every trial at its last stage", pipe_table(table(ends(records), length, "trial"))]
    stages = [row for row in records if row["kind"] == "stage"]
    parts += ["## Quality against speed", "![Pareto picture](pareto.png)"]
    front = pareto_front(records, "prefill_ratio", length)
    parts += [pipe_table(table(front, length))] if front else []
    parts += ["## Every stage", pipe_table(table(stages, length)), legend(records, length)]
    if measured := measured_rows(records):
        parts += ["## Speed and memory by length", pipe_table(speed_table(measured)), SPEED_LEGEND]
        parts += [crossovers(measured), "![Speed and memory by length](speed.png)"]
    if probed := probed_rows(records):
        parts += ["## What perplexity hides", pipe_table(probe_table(probed)), PROBE_LEGEND]
        parts += ["![Loss by position and by length](probes.png)"] if drawn(probed) else []
    tasks = _tasks(records)
    parts += ["## Tasks", pipe_table(task_table(tasks)), TASK_LEGEND] if tasks else []
    parts += ["## Cost", resources(run)]
    return "\n\n".join(parts) + "\n"


def verdict(records: list[Record]) -> str:
    """The study's answer in two or three sentences, from the records alone."""
    path = best_path(records)
    if not path:
        return "No student is finished yet."
    end = path[-1]
    said = [
        f"The best student swaps {len(end['swapped_layers'])} of {end['total_layers']} layers at "
        f"{end['metrics']['perplexity_ratio']:.3f} times the teacher's perplexity after "
        f"{end['metrics']['student_tokens']:,} tokens ({end['trial']}, {end['operator']})."
    ]
    scratch = [r for r in records if r["kind"] == "control" and r["name"].startswith("scratch")]
    same = [r for r in scratch if r["operator"] == end["operator"]]
    if same:
        said.append(f"Trained from scratch the same operator reaches {same[0]['metrics']['perplexity_ratio']:.3f}.")
    single = [r for r in records if r["name"].startswith("skip ") and len(r["swapped_layers"]) == 1]
    if single:
        ranked = sorted(single, key=lambda row: row["metrics"]["perplexity_ratio"])
        told = ", ".join(f"{r['swapped_layers'][0]} ({r['metrics']['perplexity_ratio']:.2f})" for r in ranked)
        said.append(f"Layers by what leaving their attention out costs, cheapest first (perplexity ratio): {told}.")
    return " ".join(said)


def table(rows: list[Record], length: str, name: str = "name") -> pd.DataFrame:
    """The rows as a frame of texts with the columns of the report; what was not measured is a dash."""
    lines = []
    for row in rows:
        metrics = row["metrics"]
        values = f" {row['words']}" if name == "trial" else ""
        lines.append(
            {
                "row": f"{row[name]}{values}",
                "swapped": f"{len(row['swapped_layers'])}/{row['total_layers']}",
                "tokens": f"{metrics['student_tokens']:,}",
                "perplexity": _number(metrics.get("perplexity"), 2),
                "ratio": _number(metrics.get("perplexity_ratio"), 3),
                "agree": _number(metrics.get("agreement"), 3),
                "hit": _number(metrics.get("hit_nll"), 3),
                "miss": _number(metrics.get("miss_nll"), 3),
                "copied": _number(metrics.get("generation_agreement"), 2),
                "greedy": _number(metrics.get("greedy_generation_perplexity"), 2),
                "sampled": _number(metrics.get("sampled_generation_perplexity"), 2),
                "prefill": _number(metrics.get("prefill_ratio", {}).get(length), 2, "x"),
                "decode": _number(metrics.get("decode_ratio", {}).get(length), 2, "x"),
            }
        )
    return pd.DataFrame(lines, columns=COLUMNS, dtype=str)


def text_table(frame: pd.DataFrame) -> str:
    """Aligned columns for a terminal, numbers to the right."""
    cells = [list(frame.columns), *frame.to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def pipe_table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    head = "| " + " | ".join(frame.columns) + " |"
    rule = "|---" + "|---:" * (len(frame.columns) - 1) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in frame.to_numpy().tolist())])


def resources(run: dict[str, Any]) -> str:
    """What the run cost, as far as it is known."""
    said = [f"{run['seconds'] / 60:.1f} min"] if "seconds" in run else []
    if "trained" in run:
        said.append(f"{len(run['trained'])} stages trained, {run['reused']} reused")
    if run.get("peak_rss_mb"):
        said.append(f"peak memory of all processes {run['peak_rss_mb'] / 1024:.2f} GB")
    if "disk_mb" in run:
        said.append(f"disk {run['disk_mb'] / 1024:.2f} GB")
    return "cost: " + ", ".join(said) if said else ""


def draw_pareto(plan: Plan, records: list[Record], path: Path) -> bool:
    """Quality against speed, prefill and decode side by side; False where nothing was measured."""
    length = str(max(plan.study.throughput.lengths))
    students = [row for row in records if row["kind"] == "stage" and length in row["metrics"].get("prefill_ratio", {})]
    if not students:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    operators = sorted({row["operator"] for row in students})
    for axis, speed in zip(axes, ("prefill_ratio", "decode_ratio"), strict=True):
        for index, operator in enumerate(operators):
            mine = [row for row in students if row["operator"] == operator]
            x = [row["metrics"][speed][length] for row in mine]
            y = [row["metrics"]["perplexity_ratio"] for row in mine]
            sizes = [25 + 18 * len(row["swapped_layers"]) for row in mine]
            axis.scatter(x, y, s=sizes, color=f"C{index}", alpha=0.7, label=operator, edgecolors="none")
        front = pareto_front(records, speed, length)
        xs = [row["metrics"][speed][length] for row in front]
        ys = [row["metrics"]["perplexity_ratio"] for row in front]
        axis.plot(xs, ys, color="0.3", linewidth=1, linestyle="--", label="Pareto front")
        _label_front(axis, front, xs, ys)
        scratch = [r for r in records if r["name"].startswith("scratch") and length in r["metrics"].get(speed, {})]
        if scratch:
            x = [row["metrics"][speed][length] for row in scratch]
            y = [row["metrics"]["perplexity_ratio"] for row in scratch]
            axis.scatter(x, y, marker="x", color="0.4", label="from scratch")
        axis.scatter([1], [1], marker="*", s=160, color="k", label="teacher")
        axis.axvline(1, color="0.85", zorder=0)
        axis.set_xlabel(f"{speed.split('_')[0]} speed over the teacher's at {length} tokens (right is faster)")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
    axes[0].set_ylabel("perplexity over the teacher's (down is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"{plan.study.study}: every stage of every trial; larger dots swap more of {plan.total_layers} layers"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _label_front(axis: Any, front: list[Record], xs: list[float], ys: list[float]) -> None:
    seen: set[int] = set()
    for row, x, y in zip(front, xs, ys, strict=True):
        count = len(row["swapped_layers"])
        if count not in seen:
            seen.add(count)
            axis.annotate(f"{count} swapped", (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8)


def _tasks(records: list[Record]) -> dict[str, dict[str, Any]]:
    """By row what students were asked; a stage that several trials share has one."""
    rows: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for row in records:
        if row["kind"] == "stage" and row.get("tasks") and row["stage_key"] not in seen:
            seen.add(row["stage_key"])
            rows[row["name"]] = row["tasks"]
    return rows


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"
