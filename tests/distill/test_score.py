"""Scores beside evaluations of the student that `distil` saves, means and errors by their definitions."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from operators.config import HyenaConfig, ImplicitFilterConfig, SkipConfig, WindowConfig
from orchestrator.distill.choosing import score as module
from orchestrator.distill.choosing.windows import read_sums
from orchestrator.distill.data import choice_windows
from orchestrator.distill.hits import trigram_hits
from orchestrator.distill.measuring import likelihood
from orchestrator.distill.models.student import load_student, load_teacher
from orchestrator.distill.stage import run_stage
from orchestrator.study.recipe import Losses, Numerics, Optimizer
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import DistilSpec, EvaluateSpec, PhaseSpec, ScoreSpec
from tests.texts import random_tokens, write_tokens

LENGTH, WINDOWS, READ, CHOSEN, SEED = 24, 11, 4, 5, 3
HYENA = HyenaConfig(heads=4)
TEXT_MATTERS = HyenaConfig(
    heads=4, feature_map="power", normalise=True, filter=ImplicitFilterConfig(positive=True, width=8)
)
SCORE = ScoreSpec(
    tokens="t", teacher="r", subject="s", layers=(0, 2), operator=HYENA, sequence_length=LENGTH, batch_size=2,
    text=LENGTH * CHOSEN, reported=LENGTH * READ, numerics=Numerics(), seed=SEED,
)  # fmt: skip
DISTIL = DistilSpec(
    tokens="t", teacher="r", parent="p", layers=(0, 2), new_layers=(0, 2), operator=HYENA, phases=(), batch_size=2,
    sequence_length=LENGTH, first_sequence=0, freeze=(), optimizer=Optimizer(), numerics=Numerics(), seed=SEED,
)  # fmt: skip
EVALUATE = EvaluateSpec(
    tokens="t", teacher="r", subject="s", sequence_length=LENGTH, numerics=Numerics(),
    evaluation=Evaluation(tokens=LENGTH * CHOSEN, batch_size=2, prompts=0),
)  # fmt: skip


@pytest.fixture
def inputs(tiny_teacher: Path, tmp_path: Path) -> dict[str, Path]:
    """Of a score of layers of the teacher; trigrams of its text come twice at times."""
    text = write_tokens(
        tmp_path / "tokens", valid=random_tokens(LENGTH * WINDOWS, above=6), train=random_tokens(LENGTH * 20)
    )
    return {"tokens": text, "teacher": tiny_teacher, "subject": tiny_teacher}


def chosen(inputs: dict[str, Path]) -> torch.Tensor:
    tokens = np.fromfile(inputs["tokens"] / "valid.bin", dtype=np.uint16)
    return choice_windows(tokens, LENGTH, LENGTH * READ, LENGTH * CHOSEN)


def scored(place: Any, inputs: dict[str, Path], name: str = "score", **changes: Any) -> dict[str, Any]:
    return run_stage(SCORE.changed(**changes), place(name, inputs))


def distilled(place: Any, inputs: dict[str, Path], name: str = "student", **changes: Any) -> Path:
    made = place(name, {**inputs, "parent": inputs["subject"]})
    run_stage(DISTIL.changed(**changes), made)
    return made.out  # type: ignore[no-any-return]


def evaluated(place: Any, inputs: dict[str, Path], student: Path, tmp_path: Path) -> dict[str, Any]:
    """What evaluation says of a student on the windows that scores read, which are all of its text."""
    text = write_tokens(tmp_path / "chosen", valid=chosen(inputs).flatten())
    return run_stage(EVALUATE, place("evaluation", {**inputs, "subject": student, "tokens": text}))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Sums are taken window by window, so they may differ in their last bits; one weight's last bit is 1e-8."""
    exact = {"rel": 1e-13, "abs": 1e-300}
    assert found["kl"] == pytest.approx(wanted["kl"], **exact)
    for name in ("", "teacher_"):
        assert found[f"{name}loss"] == pytest.approx(math.log(wanted[f"{name}perplexity"]), **exact)
        for kind in ("hit", "miss"):
            assert found[f"{name}{kind}_loss"] == pytest.approx(wanted[f"{name}{kind}_nll"], **exact)
    assert found["tokens"] == wanted["tokens"] == CHOSEN * (LENGTH - 1)


@pytest.mark.parametrize(
    "operator", [HYENA, TEXT_MATTERS, WindowConfig(window=4), SkipConfig()], ids=["hyena", "text", "window", "skip"]
)
def test_a_score_is_of_the_student_that_distil_begins_with(
    place: Any, inputs: dict[str, Path], tmp_path: Path, operator: Any
) -> None:
    found = scored(place, inputs, operator=operator, text_windows=7)
    student = distilled(place, inputs, operator=operator, text_windows=7)
    assert_same(found, evaluated(place, inputs, student, tmp_path))
    assert found["kl"] > 0


def test_the_seed_and_the_first_text_of_the_path_matter_where_operators_start_from_them(
    place: Any, inputs: dict[str, Path]
) -> None:
    found = [
        scored(place, inputs, f"{n}", seed=seed, text_windows=limit, operator=operator)["kl"]
        for n, (seed, limit, operator) in enumerate(
            [(3, None, TEXT_MATTERS), (3, 7, TEXT_MATTERS), (3, None, HYENA), (4, None, HYENA)]
        )
    ]
    assert not HYENA.needs_statistics
    assert len(set(found)) == 4


def test_layers_are_swapped_beside_those_of_the_subject(place: Any, inputs: dict[str, Path], tmp_path: Path) -> None:
    first = distilled(place, inputs, "first", layers=(1,), new_layers=(1,))
    both = distilled(place, {**inputs, "subject": first}, layers=(0, 1), new_layers=(0,))
    found = scored(place, {**inputs, "subject": first}, layers=(0,))
    assert_same(found, evaluated(place, inputs, both, tmp_path))


def test_without_attention_is_with_zero_in_its_place(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    found = scored(place, inputs, operator=SkipConfig(), layers=(1,))
    teacher.gpt_neox.layers[1].attention.dense.weight.data.zero_()
    teacher.gpt_neox.layers[1].attention.dense.bias.data.zero_()
    windows = chosen(inputs)
    with torch.no_grad():
        logs = teacher(windows).logits[:, :-1].double().log_softmax(-1)
    assert found["loss"] == pytest.approx(-logs.gather(-1, windows[:, 1:, None]).mean().item(), rel=1e-5)


def test_the_teacher_itself_loses_nothing(place: Any, inputs: dict[str, Path]) -> None:
    found = scored(place, inputs, layers=())
    assert found["kl"] == found["kl_error"] == found["excess_loss"] == found["excess_hit_loss_error"] == 0.0
    assert found["loss"] == found["teacher_loss"] > 0
    assert found["loss_error"] == found["teacher_loss_error"] > 0


def test_with_the_teachers_own_score_at_hand_the_teacher_does_not_run_again(
    place: Any, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scored(place, inputs)
    own = place("own", inputs)
    run_stage(SCORE.of("s", (), None), own)
    ran: list[Any] = []
    usual = likelihood.final_hidden
    monkeypatch.setattr(likelihood, "final_hidden", lambda model, ids: (ran.append(model), usual(model, ids))[1])
    made = place("other", {**inputs, "reference": own.out})
    assert run_stage(SCORE, made) == wanted
    assert len(ran) == math.ceil(CHOSEN / 2)
    assert not any(each.training for model in ran for each in model.modules())
    assert not (made.out / module.TEACHER).exists()


def rows(inputs: dict[str, Path], student: Any, teacher: Any) -> list[dict[str, list[float]]]:
    """By window the numbers of its tokens, from all logits."""
    found = []
    for window in chosen(inputs):
        with torch.no_grad():
            own, wanted = (model(window[None]).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
        target = window[1:, None]
        found.append(
            {
                "kl": (wanted.exp() * (wanted - own)).sum(-1).tolist(),
                "loss": (-own.gather(1, target))[:, 0].tolist(),
                "teacher_loss": (-wanted.gather(1, target))[:, 0].tolist(),
                "hit": trigram_hits(window[None])[0].tolist(),
            }
        )
    return found


def of_hits(window: dict[str, list[float]], name: str, hit: bool) -> list[float]:
    return [value for value, is_hit in zip(window[name], window["hit"], strict=True) if is_hit == hit]


def ratio_error(sums: list[float], counts: list[float]) -> float:
    """Cochran (1977), equation 2.46 without the correction for a finite population, written out."""
    windows, mean = len(sums), sum(sums) / sum(counts)
    variance = sum((y - mean * n) ** 2 for y, n in zip(sums, counts, strict=True)) / (windows - 1)
    return math.sqrt(variance / windows) / (sum(counts) / windows)


def test_means_and_errors_are_what_their_names_say(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    found = scored(place, inputs)
    student = load_student(distilled(place, inputs), load_teacher(inputs["teacher"]))
    windows = rows(inputs, student, teacher)
    near = {"rel": 2e-4}
    for name in ("kl", "loss", "teacher_loss"):  # windows of as many tokens: the usual error of a mean
        means = [statistics.fmean(window[name]) for window in windows]
        assert found[name] == pytest.approx(statistics.fmean(means), **near)
        assert found[f"{name}_error"] == pytest.approx(statistics.stdev(means) / math.sqrt(CHOSEN), **near)
    apart = [statistics.fmean(w["loss"]) - statistics.fmean(w["teacher_loss"]) for w in windows]
    assert found["excess_loss"] == pytest.approx(statistics.fmean(apart), **near)
    assert found["excess_loss_error"] == pytest.approx(statistics.stdev(apart) / math.sqrt(CHOSEN), rel=1e-3)
    for kind, hit in (("hit", True), ("miss", False)):
        own, wanted = ([of_hits(w, name, hit) for w in windows] for name in ("loss", "teacher_loss"))
        counts = [float(len(values)) for values in own]
        assert len(set(counts)) > 1, "windows of unequal counts"
        sums = [sum(values) for values in own]
        assert found[f"{kind}_loss"] == pytest.approx(sum(sums) / sum(counts), **near)
        assert found[f"{kind}_loss_error"] == pytest.approx(ratio_error(sums, counts), rel=1e-3)
        more = [sum(a) - sum(b) for a, b in zip(own, wanted, strict=True)]
        assert found[f"excess_{kind}_loss"] == pytest.approx(sum(more) / sum(counts), rel=1e-3)
        assert found[f"excess_{kind}_loss_error"] == pytest.approx(ratio_error(more, counts), rel=1e-3)
    assert found["teacher_hit_loss"] == pytest.approx(found["hit_loss"] - found["excess_hit_loss"])


def test_sums_of_windows_are_kept(place: Any, inputs: dict[str, Path], teacher: Any) -> None:
    made = place("score", inputs)
    run_stage(SCORE, made)
    student = load_student(distilled(place, inputs), load_teacher(inputs["teacher"]))
    kept, windows = read_sums(made.out), rows(inputs, student, teacher)
    assert kept.counts["tokens"].tolist() == [LENGTH - 1] * CHOSEN
    assert kept.counts["hits"].tolist() == [sum(w["hit"]) for w in windows]
    assert kept.counts["misses"].tolist() == [LENGTH - 1 - sum(w["hit"]) for w in windows]
    for name in ("kl", "loss", "teacher_loss"):
        assert kept.sums[name] == pytest.approx([sum(w[name]) for w in windows], rel=1e-3)
    for kind, hit in (("hit", True), ("miss", False)):
        wanted = [sum(of_hits(w, "teacher_loss", hit)) for w in windows]
        assert kept.sums[f"teacher_{kind}_loss"] == pytest.approx(wanted, rel=1e-3)


def test_a_class_without_tokens_has_no_number(place: Any, inputs: dict[str, Path]) -> None:
    write_tokens(inputs["tokens"], valid=np.arange(1, LENGTH * WINDOWS + 1))  # no trigram comes twice
    found = scored(place, inputs)
    assert not [name for name in found if "hit" in name]
    assert found["miss_loss"] == found["loss"]


@pytest.mark.parametrize("operator", [HYENA, WindowConfig(window=4)], ids=["hyena", "fitted to the attention"])
def test_prepared_operators_are_those_of_another_student(
    place: Any, inputs: dict[str, Path], tmp_path: Path, operator: Any
) -> None:
    """Of a student all of whose weights were trained, the operators of the scored layers alone are taken."""
    phases = (PhaseSpec(losses=Losses(ce=1.0), steps=2),)
    trained = distilled(place, inputs, layers=(0, 1, 2), new_layers=(0, 1, 2), operator=operator, phases=phases)
    start = distilled(place, inputs, "start", operator=operator)
    taken = {
        name: tensor
        for name, tensor in load_file(trained / "student.safetensors").items()
        if ".operator." in name and ".layers.1.attention." not in name
    }
    before = load_file(start / "student.safetensors")
    assert taken.keys() == before.keys()
    assert not all(torch.equal(taken[name], before[name]) for name in taken)
    save_file(taken, start / "student.safetensors")
    found = scored(place, {**inputs, "prepared": trained}, operator=operator, prepared="k")
    assert_same(found, evaluated(place, inputs, start, tmp_path))


def test_another_operator_than_the_prepared_one_is_told(place: Any, inputs: dict[str, Path]) -> None:
    made = {**inputs, "prepared": distilled(place, inputs)}
    with pytest.raises(ValueError, match=r"layer 0 was prepared as .*heads=4.*, and not as .*heads=2.*: prepare that"):
        scored(place, made, "other", operator=HyenaConfig(heads=2), prepared="k")
    with pytest.raises(ValueError, match=r"layer 1 is not prepared: .* has those of 0, 2"):
        scored(place, made, "more", layers=(1,), prepared="k")
    with pytest.raises(ValueError, match=r"layer 0 is not prepared: .* has those of none"):
        scored(place, {**inputs, "prepared": inputs["teacher"]}, "none", prepared="k")


def test_a_student_that_diverged_is_told_so(place: Any, inputs: dict[str, Path]) -> None:
    subject = distilled(place, inputs, layers=(1,), new_layers=(1,))
    tensors = load_file(subject / "student.safetensors")
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()},
              subject / "student.safetensors")  # fmt: skip
    with pytest.raises(ArithmeticError, match=r"a score has no finite kl, .*: the student has diverged; lower recipe"):
        scored(place, {**inputs, "subject": subject}, layers=(0,))
