"""Every metric of a student from all logits of two plain models (`plain`), by its definition, one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from operators.config import HyenaConfig
from orchestrator.distill.stage import run_stage
from orchestrator.study.recipe import Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import DistilSpec, EvaluateSpec
from tests.distill import plain
from tests.distill.plain import Plain
from tests.texts import write_tokens

LENGTH, WINDOWS, EVERY = 20, 4, 3  # every third window of the text is read
PROMPTS, PROMPT, NEW = 4, 6, 16
WORDS = np.array([203, 72, 136, 182], dtype=np.uint16)  # what the tiny models say is among them at times
OPERATOR, SWAPPED = HyenaConfig(heads=4), (1,)


@pytest.fixture
def text(tmp_path: Path) -> Tensor:
    """The windows that are to be read, first and last of the text among them; many of their trigrams come twice."""
    count = EVERY * (WINDOWS - 1) + 1
    values = WORDS[np.random.default_rng(10).integers(0, 4, LENGTH * count + 7)]
    write_tokens(tmp_path / "tokens", valid=values, train=values[::-1])
    return torch.from_numpy(values[: LENGTH * count].astype(np.int64)).view(count, LENGTH)[::EVERY]


def student_of(place: Any, inputs: dict[str, Path]) -> Path:
    """A layer swapped for an operator, untrained."""
    made = place("student", {**inputs, "parent": inputs["teacher"]})
    spec = DistilSpec(
        tokens="t", teacher="r", parent="p", layers=SWAPPED, new_layers=SWAPPED, operator=OPERATOR, phases=(),
        batch_size=1,
        sequence_length=LENGTH, first_sequence=0, freeze=(), optimizer=Optimizer(), numerics=Numerics(), seed=3,
    )  # fmt: skip
    run_stage(spec, made)
    return made.out


def plain_pair(teacher: Path, student: Path) -> tuple[Plain, Plain]:
    weights = {n.replace("embed_out", "lm_head"): t for n, t in load_file(teacher / "model.safetensors").items()}
    pair = Plain(weights, 4), Plain(weights, 4)
    plain.put(pair[1], SWAPPED, OPERATOR, 96, seed=3, from_attention=True)
    pair[1].weights |= load_file(student / "student.safetensors")
    return pair


def repeats(ids: list[int], at: int) -> bool:
    """Whether the token at `at` and the two before it stand anywhere earlier in the window."""
    return at >= 2 and any(ids[i - 2 : i + 1] == ids[at - 2 : at + 1] for i in range(2, at))


def continued(model: Plain, prompts: Tensor, seed: int | None = None) -> list[list[int]]:
    """The likeliest token after all that was said so far, again and again; with a seed, a sample: of tokens that each
    wait for an exponential time at the rate of their probability, the first."""
    noise = None if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(NEW):
        chances_BV = plain.run(model, prompts).logits_BLV[:, -1].double().softmax(-1)
        if noise is not None:
            chances_BV /= torch.empty(chances_BV.shape, dtype=torch.float64).exponential_(generator=noise)
        prompts = torch.cat([prompts, chances_BV.argmax(-1)[:, None]], dim=1)
    return prompts[:, -NEW:].tolist()  # type: ignore[no-any-return]


def perplexity(reader: Plain, prompts: Tensor, said: list[list[int]]) -> float:
    """That of what was said after the prompts, token by token, to a model that reads it."""
    losses = []
    for prompt, words in zip(prompts.tolist(), said, strict=True):
        for at, word in enumerate(words):
            seen = torch.tensor([[*prompt, *words[:at]]])
            losses.append(-math.log(plain.run(reader, seen).logits_BLV[0, -1].double().softmax(-1)[word]))
    return math.exp(fmean(losses))


@torch.no_grad()
def test_every_metric_is_what_plain_torch_gives(place: Any, tiny_teacher: Path, tmp_path: Path, text: Tensor) -> None:
    inputs = {"tokens": tmp_path / "tokens", "teacher": tiny_teacher}
    inputs["subject"] = student_of(place, inputs)
    spec = EvaluateSpec(
        tokens="t", teacher="r", subject="s", sequence_length=LENGTH, numerics=Numerics(),
        evaluation=Evaluation(
            tokens=LENGTH * WINDOWS + 3, batch_size=3, prompts=PROMPTS, prompt_tokens=PROMPT, new_tokens=NEW, seed=6
        ),
    )  # fmt: skip
    found = run_stage(spec, place("evaluation", inputs))
    teacher, student = plain_pair(tiny_teacher, inputs["subject"])
    rows: list[dict[str, float]] = []
    for ids_L in text:
        wanted_LV, own_LV = (plain.run(m, ids_L[None]).logits_BLV[0].double().softmax(-1) for m in (teacher, student))
        for at in range(1, LENGTH):
            target, p, q = int(ids_L[at]), wanted_LV[at - 1], own_LV[at - 1]
            rows.append({
                "own": -math.log(q[target]), "wanted": -math.log(p[target]), "kl": float((p * (p / q).log()).sum()),
                "right": float(q.argmax() == target), "wanted_right": float(p.argmax() == target),
                "same": float(p.argmax() == q.argmax()), "hit": float(repeats(ids_L.tolist(), at)),
            })  # fmt: skip
    hits, misses = ([row for row in rows if row["hit"] == hit] for hit in (1.0, 0.0))
    own, teachers = (math.exp(fmean(row[name] for row in rows)) for name in ("own", "wanted"))
    prompts = text[:PROMPTS, :PROMPT]
    likeliest, samples = ([continued(m, prompts, seed) for m in (teacher, student)] for seed in (None, 6))
    equal = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(*likeliest, strict=True)]
    read = [perplexity(teacher, prompts, said) for said in (*likeliest, *samples)]
    assert found == pytest.approx(
        {
            "perplexity": own,
            "perplexity_ratio": own / teachers,
            "teacher_perplexity": teachers,
            "accuracy": fmean(row["right"] for row in rows),
            "teacher_accuracy": fmean(row["wanted_right"] for row in rows),
            "agreement": fmean(row["same"] for row in rows),
            "kl": fmean(row["kl"] for row in rows),
            "hit_share": len(hits) / len(rows),
            "hit_nll": fmean(row["own"] for row in hits),
            "miss_nll": fmean(row["own"] for row in misses),
            "teacher_hit_nll": fmean(row["wanted"] for row in hits),
            "teacher_miss_nll": fmean(row["wanted"] for row in misses),
            "tokens": WINDOWS * (LENGTH - 1),
            "generation_agreement": fmean(float(same) for row in equal for same in row),
            "generation_prefix": fmean([*row, False].index(False) for row in equal),
            "teacher_greedy_generation_perplexity": read[0],
            "greedy_generation_perplexity": read[1],
            "teacher_sampled_generation_perplexity": read[2],
            "sampled_generation_perplexity": read[3],
            "parameters": sum(tensor.numel() for tensor in student.weights.values()),
        },
        rel=1e-5,
    )
    assert 0 < found["generation_prefix"] < NEW * found["generation_agreement"]  # equal again after a difference
    assert 0 < found["agreement"] < 1 and found["accuracy"] > found["teacher_accuracy"] > 0
    assert samples[0] != samples[1] and len({round(value, 3) for value in read}) == 4
