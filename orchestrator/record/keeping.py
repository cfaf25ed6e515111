"""What of a study is kept: weights dropped by a rule with all numbers kept, or the study forgotten as a whole.

Place in the flow: between what the home remembers and the store. Invariant: nothing that another study of the home
needs, and nothing that is being computed, is touched; what would go is listed first.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Sequence
from typing import Literal

from orchestrator.record.home import Home
from orchestrator.record.records import Record, best_path, pareto_front
from orchestrator.record.remembered import Variant, variants
from orchestrator.record.speeds import measured_again
from orchestrator.run.store import Store, tree_bytes
from orchestrator.study.plan import Plan
from orchestrator.study.spec import short

Keep = Literal["best", "front", "all", "none"]
SPEEDS = ("prefill_ratio", "decode_ratio")


@dataclasses.dataclass(frozen=True)
class Room:
    """What would be dropped: stages with their bytes, those that most deserve it first, and why others stay."""

    stages: tuple[tuple[str, int], ...]
    shared: int  # stages that stay since other studies of the home need them

    @property
    def bytes(self) -> int:
        """Of all stages that would be dropped."""
        return sum(size for _, size in self.stages)


def to_prune(
    plan: Plan, store: Store, records: Sequence[Record], keep: Keep, budget: int | None, elsewhere: Collection[str]
) -> Room:
    """The students whose weights the rule drops.

    Args:
        keep: `best`, the last stage of the best path; `front`, every student that no other beats in quality and speed;
            `all`; or `none`.
        budget: bytes of all students' weights; where the rule leaves more, those of the highest perplexity go too.
        elsewhere: keys that other studies of the home need.
    """
    rows = {row["stage_key"]: row for row in records if row["kind"] == "stage"}
    kept = _kept(plan, records, keep)
    students = {step.train.key for trial in plan.trials for step in trial.steps}
    students |= {step.train.key for name, step in plan.controls.items() if name.startswith("scratch")}
    there = [key for key in students if store.finished(key) and not store.dropped(key)]
    sizes = {key: tree_bytes(store.artefacts(key)) for key in there}
    free = [key for key in there if key not in elsewhere]

    def worth(key: str) -> float:
        return -float(rows[key]["metrics"]["perplexity_ratio"]) if key in rows else float("-inf")

    dropped = [key for key in sorted(free, key=worth) if key not in kept]
    left = sum(sizes.values()) - sum(sizes[key] for key in dropped)
    for key in sorted((key for key in free if key in kept), key=worth):
        if budget is None or left <= budget:
            break
        dropped.append(key)
        left -= sizes[key]
    stays = sum(key in elsewhere and key not in kept for key in there)
    return Room(tuple((key, sizes[key]) for key in dropped), stays)


def _kept(plan: Plan, records: Sequence[Record], keep: Keep) -> set[str]:
    rows = list(records)
    length = str(max(plan.study.throughput.lengths))
    match keep:
        case "none":
            return set()
        case "all":
            return {row["stage_key"] for row in rows}
        case "best":
            return {row["stage_key"] for row in best_path(rows)[-1:]}
        case "front":
            front = [row for speed in SPEEDS for row in pareto_front(rows, speed, length)]
            return {row["stage_key"] for row in [*front, *best_path(rows)[-1:]]}


def prune(store: Store, room: Room) -> int:
    """Drop what was planned; returns the bytes freed."""
    return sum(store.drop(key) for key, _ in room.stages)


def room_text(room: Room, done: bool) -> str:
    """A line for each stage, and the sum."""
    lines = [f"{short(key)}  {size / 2**20:8.1f} MB  {'dropped' if done else ''}".rstrip() for key, size in room.stages]
    stays = f"; {room.shared} stay, which other studies of this home need" if room.shared else ""
    verb = "freed" if done else "would be freed by --yes"
    numbers = "all numbers stay" if room.stages else "nothing to drop"
    return "\n".join(
        [*lines, f"weights of {len(room.stages)} students, {room.bytes / 2**20:.1f} MB {verb}; {numbers}{stays}"]
    )


def needed_elsewhere(home: Home, variant: Variant) -> set[str]:
    """Keys of stages that other variants and studies of the home need."""
    return {key for other in variants(home) if other != variant for key in other.needed()}


def to_delete(home: Home, variant: Variant, store: Store) -> Room:
    """The stages that only this variant needs."""
    elsewhere = needed_elsewhere(home, variant)
    needed = variant.needed()
    mine = sorted(key for key in needed | measured_again(store, needed) if store.folder(key).is_dir())
    sizes = {key: tree_bytes(store.folder(key)) for key in mine}
    return Room(tuple((key, sizes[key]) for key in mine if key not in elsewhere), sum(key in elsewhere for key in mine))


def delete(variant: Variant, store: Store, room: Room) -> list[str]:
    """Forget a variant and delete its stages; a line for each stage that stays since it is being computed."""
    shutil.rmtree(variant.folder)
    link = variant.folder.parent / "newest"
    if link.is_symlink() and not link.exists():
        link.unlink()
    return [f"{short(key)} stays: it is being computed" for key, _ in room.stages if not store.remove(key)]
