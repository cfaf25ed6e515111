"""What probes found of a model, beside its teacher: for records, MLflow and the report.

Invariant: the store is read, nothing else. Of keys that its teacher finds no more often than by chance a model is told
nothing: it had nothing to lose.
"""

from __future__ import annotations

import contextlib
from typing import Any

from orchestrator.distill.measuring.scores import CHANCE_ERRORS
from orchestrator.run.store import Store
from orchestrator.study.stages import Step

Probed = dict[str, Any]  # the result of a stage of probes and, but for the teacher's own, the `teacher`'s
REFUSED = "teacher at chance"
NAMES = {"loss": "loss/position_", "hit_nll": "hit_nll/gap_", "nll": "nll/"}  # of metrics, by what they are of


def probe_result(store: Store, step: Step) -> Probed:
    """What is known of a step; empty before its probes and its teacher's are finished, or where they are damaged."""
    if not step.probed or not all(store.finished(spec.key) for spec in step.probed):
        return {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        teacher, own = (store.result(spec.key) for spec in step.probed)
        if step.probed[0] == step.probed[1]:
            return dict(own)
        needles = {
            length: {"refused": REFUSED} if at_chance(teacher["needle"][length]) else told
            for length, told in own["needle"].items()
        }
        return {**own, "needle": needles, "teacher": teacher}
    return {}


def at_chance(needle: dict[str, Any]) -> bool:
    """Whether an accuracy is within `CHANCE_ERRORS` standard errors of chance, or below it."""
    return bool(needle["accuracy"] - needle["chance"] <= CHANCE_ERRORS * needle.get("stderr", 1.0))


def probe_numbers(probed: Probed) -> dict[str, float]:
    """The numbers of a model as metrics of its run: `probes/loss/position_64`, `probes/hit_nll/gap_16`,
    `probes/nll/1024`, `probes/bits_per_byte`, and of keys the accuracy `probes/needle/1024`, with
    `probes/needle_margin/1024` and, by depth, `probes/needle_depth_0.5/1024`."""
    if not probed:
        return {}
    found = {"bits_per_byte": probed["bits_per_byte"]}
    for kind, name in NAMES.items():
        found |= {f"{name}{at}": value for at, value in probed[kind].items()}
    for length, told in probed["needle"].items():
        if "refused" not in told:
            found |= {f"needle/{length}": told["accuracy"], f"needle_margin/{length}": told["margin"]}
            found |= {f"needle_depth_{depth}/{length}": at["accuracy"] for depth, at in told["depths"].items()}
    return {f"probes/{name}": float(value) for name, value in found.items()}
