"""What became of every type: swapped, with what its teacher cannot do either, or refused, with the reason."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from orchestrator.distill.models.sites import decoder_layers, sites
from orchestrator.distill.models.whole import check_again
from tests.models.checks import AS_TEACHER, CHECKS
from tests.models.tiny import NOT_MADE, TYPES, build

HYBRID = "those with softmax attention"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one type: why it is refused; else which layers are sites, and notes of the checks that it passed."""

    name: str
    refused: str = ""
    where: str = ""
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def told(self) -> str:
        """The notes in a line."""
        limits = [check for check, note in self.notes.items() if AS_TEACHER in note]
        rest = [note for note in self.notes.values() if AS_TEACHER not in note]
        return "; ".join([*rest, *([f"{AS_TEACHER}: {', '.join(limits)}"] if limits else [])])


def refusal(name: str) -> str:
    """Why a type is refused; empty if it is not."""
    if name in NOT_MADE:
        return NOT_MADE[name]
    try:
        model = build(name)
        sites(model)
        check_again(model)
    except ValueError as error:
        return str(error).rpartition("cannot be swapped: ")[2].rpartition(": ")[0]
    return ""


def outcome(name: str) -> Outcome:
    """All checks of a type; AssertionError from the first that fails."""
    if reason := refusal(name):
        return Outcome(name, reason)
    model = build(name)
    where = "all" if len(sites(model)) == len(decoder_layers(model)) else HYBRID
    notes = {check: note for check, run in CHECKS.items() if (note := run(name))}
    return Outcome(name, "", where, notes)


def table(outcomes: Iterable[Outcome]) -> str:
    """The tables of docs/families.md."""
    lines = ["| swapped | sites | notes |", "|---|---|---|"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for found in outcomes:
        if found.refused:
            reasons[found.refused].append(found.name)
        else:
            lines.append(f"| {found.name} | {found.where} | {found.told} |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(reasons.items(), key=lambda r: r[1])]
    return "\n".join(lines)


def summary(outcomes: Iterable[Outcome]) -> str:
    """The line of README."""
    good = sum(not found.refused for found in outcomes)
    return f"{good} of the {len(TYPES)} causal-LM types of transformers pass every check."
