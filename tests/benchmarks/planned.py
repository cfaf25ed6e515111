"""What `plan` tells of memory beside what stages took: `python -m tests.benchmarks.planned STUDY[=HOME]...`.

Reads finished runs of the studies on this machine, each in its usual home or another, and writes `planned.md` beside
this file: one row a study and kind of stage, with the largest peak, what was told of that stage, and the furthest that
any stage is off.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from orchestrator.record.given import load, store_of
from orchestrator.run.hardware import hardware
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan, stage_memory, throughput_specs

HEAD = """\
# What the plan tells of memory, and what was taken

`python -m tests.benchmarks.planned`: the largest peak of a kind of stage in MB of 10^6 bytes, what `plan` tells of that
stage, and the stages that are furthest from what was told of them.
"""
MB = 1e6


def pairs(plan: Plan, store: Store) -> Iterator[tuple[str, float, float]]:
    """Kind, told and taken bytes of every finished stage that the plan tells the memory of."""
    for key, memory in stage_memory(plan, throughput_specs(plan, hardware()), "cpu").items():
        if store.finished(key):
            peak = store.done(key).get("peak_mb")
            if peak is not None:
                yield memory.spec.kind, memory.bytes, peak * 2**20


def rows(name: str, found: list[tuple[str, float, float]]) -> Iterator[str]:
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for kind, told, taken in found:
        by_kind[kind].append((told, taken))
    for kind, each in sorted(by_kind.items()):
        told, taken = max(each, key=lambda pair: pair[1])
        off = sorted(told / taken - 1 for told, taken in each)
        sizes = f"{taken / MB:,.0f} | {told / MB:,.0f} | {off[0]:+.0%} to {off[-1]:+.0%}"
        yield f"| {name} | {kind} | {len(each)} | {sizes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="+", metavar="STUDY[=HOME]")
    lines = [
        "| study | kind of stage | stages | largest peak | told of it | told over taken |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for word in parser.parse_args().studies:
        path, _, home = word.partition("=")
        plan, _ = load(Path(path), None, look=True)
        store = store_of(Path(path), Path(home) if home else None)
        lines += rows(plan.study.study, list(pairs(plan, store)))
    table = "\n".join(lines)
    print(table)
    Path(__file__).with_name("planned.md").write_text(f"{HEAD}\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
