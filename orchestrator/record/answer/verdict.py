"""The answer in sentences: the best student, what it cannot be told apart from, the knee, what a run cost.

Invariant: every sentence follows from the records alone.
"""

from __future__ import annotations

from typing import Any

from orchestrator.record.answer.frames import cell
from orchestrator.record.choice import SPEED, knee
from orchestrator.record.groups import Record, best_by_layers, noise, ratio_of, seeds_range, students, ties
from orchestrator.record.records import best_path, pareto_front

NAMED = 3  # students of a tie that are named
LEGEND = (
    "swapped: attention layers replaced. tokens: trained by the student so far. ratio: perplexity over the teacher's.\n"
    "agree: top-1 equal to the teacher's. hit, miss: nats per token on tokens that complete a trigram already in the\n"
    "window, and on the others. copied: greedy tokens equal to the teacher's. greedy, sampled: the teacher's\n"
    "perplexity of what the row's model says so; near the teacher's own is good. prefill, decode: speed over the\n"
    "teacher's at {length} tokens, one sequence{core}; the teacher's own row shows the noise of that measurement."
)
SEEDS = "×n: the mean of n seeds, ± one standard deviation."
INTERVALS = "x: ± a 95 % interval of the turns measured; same: it holds 1."


def legend(records: list[Record], length: str) -> str:
    """How to read the columns that these records fill."""
    compiled = any(row["metrics"].get("core") == "native" for row in records)
    lines = [LEGEND.format(length=length, core=", students by the compiled core" if compiled else "")]
    several = any(len(row["ratios"]) > 1 for row in students(records))
    sure = any(name.endswith("_interval") for row in records for name in row["metrics"])
    more = " ".join(said for said, told in ((SEEDS, several), (INTERVALS, sure)) if told)
    return "\n".join([*lines, *([more] if more else [])])


def verdict(records: list[Record]) -> str:
    """The study's answer in a few sentences."""
    path = best_path(records)
    if not path:
        return "No student is finished yet."
    end = path[-1]
    seeds = f", the mean of {len(end['ratios'])} seeds" if len(end["ratios"]) > 1 else ""
    said = [
        f"The best student swaps {len(end['swapped_layers'])} of {end['total_layers']} layers at "
        f"{cell(end, 'ratio', '')} times the teacher's perplexity after "
        f"{end['metrics']['student_tokens']:,} tokens ({end['label']}, {end['operator']}{seeds})."
    ]
    rows = students(records)
    last = [row for row in rows if row["last"]]
    said += _tie(end, [row for row in last if len(row["swapped_layers"]) == len(end["swapped_layers"])], rows)
    said += [] if seeds_range(rows) is not None else ["How far seeds alone move a number was not measured."]
    scratch = [r for r in records if r["kind"] == "control" and r["name"].startswith("scratch")]
    same = [r for r in scratch if r["operator"] == end["operator"]]
    if same:
        said.append(f"Trained from scratch the same operator reaches {ratio_of(same[0]):.3f}.")
    single = [r for r in records if r["name"].startswith("skip ") and len(r["swapped_layers"]) == 1]
    if single:
        ranked = sorted(single, key=ratio_of)
        told = ", ".join(f"{r['swapped_layers'][0]} ({ratio_of(r):.2f})" for r in ranked)
        said.append(f"Layers by what leaving their attention out costs, cheapest first (perplexity ratio): {told}.")
    return " ".join(said)


def _tie(best: Record, alike: list[Record], among: list[Record]) -> list[str]:
    found = ties(best, alike, among)
    if not found:
        return []
    least = noise(best, found[0], among)
    shown = ", ".join(f"{row['label']} ({cell(row, 'ratio', '')})" for row in found[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return [f"It is a tie with {shown}{more}: less than {least:.3f} apart, which is noise of seeds."]


def tied(records: list[Record]) -> list[str]:
    """A line for every number of swapped layers whose best student has others beside it that are as good."""
    rows = students(records)
    lines = []
    for best in best_by_layers(rows):
        count = len(best["swapped_layers"])
        others = ties(best, [row for row in rows if len(row["swapped_layers"]) == count], rows)
        if others:
            names = [f"{row['name']} ({cell(row, 'ratio', '')})" for row in others]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{count} swapped: {best['name']} is a tie with {', '.join(names[:NAMED])}{more}")
    return lines


def knee_of(records: list[Record], length: str) -> Record | None:
    """The student at the knee of the front of quality and prefill; None where no speed is known."""
    found = knee(pareto_front(records, SPEED, length), length)
    return found[0] if found else None


def knee_line(records: list[Record], length: str) -> str | None:
    """The knee in words."""
    row = knee_of(records, length)
    if row is None:
        return None
    speeds = ", ".join(f"{speed} {cell(row, speed, length)}" for speed in ("prefill", "decode"))
    return (
        f"knee: {row['name']} {row['words']}: {len(row['swapped_layers'])} of {row['total_layers']} layers at "
        f"{cell(row, 'ratio', '')} times the teacher's perplexity, {speeds}"
    )


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
