"""What a student costs with further layers swapped and nothing trained: by it layers are chosen.

Place in the flow: many scores of one text make a `choice`. The student is, to the bit, what `distil` would begin to
train. Invariant: the text is none that `evaluate` reads, so a choice does not flatter what is reported of it.

Shapes: B windows, L positions, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from operators.decoding.kept import frozen_filters
from orchestrator.distill.choosing.windows import MEANS, Sums, ratio, window_sums, write_sums
from orchestrator.distill.context import Workplace
from orchestrator.distill.data import choice_windows, load_tokens
from orchestrator.distill.hits import trigram_hits
from orchestrator.distill.measuring.likelihood import hidden_states, token_table
from orchestrator.distill.models.student import load_student, sharing
from orchestrator.distill.start import swap_layers
from orchestrator.distill.training.frozen import frozen_teacher
from orchestrator.distill.training.loop import DIVERGED, prepare
from orchestrator.study.spec import ScoreSpec

TEACHER = "teacher.safetensors"


def score(spec: ScoreSpec, place: Workplace) -> dict[str, Any]:
    """Measure a student whose further layers have operators as they start, or as the prepared student has them.

    Beside the result, `windows.json` has the sums that its means are made of, window by window. The score of the
    teacher itself keeps the teacher's hidden states too, which others read.

    Returns:
        Means in nats per token: kl (teacher || student), loss, hit_loss and miss_loss (on tokens that complete a
        trigram already seen in their window, and on the others); as `teacher_*` the losses of the teacher, as
        `excess_*` how much higher the student's are. Of each, as `*_error`, the standard error over windows (that of a
        ratio of sums, see `windows.ratio`; of an excess that of paired differences). A class without tokens has no
        entries. And tokens, the number of predicted ones.

    Raises:
        ValueError: held-out text has too few windows; a layer is swapped already, or is not in the prepared student.
        ArithmeticError: a number is not finite, since the student (or the teacher) has diverged.
    """
    prepare(spec.numerics, spec.seed)
    tokens = load_tokens(place.inputs["tokens"], "valid")
    windows_BL = choice_windows(tokens, spec.sequence_length, spec.reported, spec.text)
    teacher = frozen_teacher(spec, place)
    student = load_student(place.inputs["subject"], sharing(teacher))
    swap_layers(student, spec.layers, spec, place)
    student.eval()
    hidden_BLD = _teacher_hidden(teacher, windows_BL, spec, place)
    with torch.no_grad(), frozen_filters(student):
        device = place.context.device
        table = token_table(teacher, student, hidden_BLD, windows_BL, spec.batch_size, spec.numerics, device)
    sums = window_sums(table, trigram_hits(windows_BL))
    result = _means(sums)
    _check_finite(result)
    write_sums(sums, place.out)
    return {**result, "tokens": int(sums.counts["tokens"].sum())}


def _teacher_hidden(teacher: Any, windows_BL: Tensor, spec: ScoreSpec, place: Workplace) -> Tensor:
    """The teacher's last hidden states, (B, L, D): of its own score, or made; the teacher's own keeps them."""
    if "reference" in place.inputs:
        return load_file(place.inputs["reference"] / TEACHER)["hidden"]
    hidden_BLD = hidden_states(teacher, windows_BL, spec.batch_size, spec.numerics, place.context.device)
    save_file({"hidden": hidden_BLD}, place.out / TEACHER)
    return hidden_BLD


def _means(sums: Sums) -> dict[str, float]:
    """Every mean of `MEANS` that has tokens, and how much higher the student's losses are, with errors."""
    found: dict[str, tuple[float, float]] = {}
    for name, (_, over) in MEANS.items():
        counts = sums.counts[over]
        if not counts.any():
            continue
        found[name] = ratio(sums.sums[name], counts)
        if f"teacher_{name}" in MEANS:
            found[f"excess_{name}"] = ratio(sums.sums[name] - sums.sums[f"teacher_{name}"], counts)
    means = {name: mean for name, (mean, _) in found.items()}
    return means | {f"{name}_error": error for name, (_, error) in found.items()}


def _check_finite(result: dict[str, float]) -> None:
    bad = [name for name, value in result.items() if not math.isfinite(value)]
    if bad:
        role = "teacher" if any(name.startswith("teacher_") for name in bad) else "student"
        raise ArithmeticError(f"a score has no finite {', '.join(bad)}: {DIVERGED[role]}")
