"""Every metric against its definition written out plainly, and the teacher beside itself."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from operators.config import HyenaConfig
from orchestrator.distill.context import Workplace
from orchestrator.distill.hits import trigram_hits
from orchestrator.distill.measuring import generation, likelihood
from orchestrator.distill.measuring.evaluate import evaluate
from orchestrator.distill.measuring.generation import WAYS, compare, continued
from orchestrator.distill.models.student import load_teacher, parameter_count, save_student
from orchestrator.distill.models.swap import swap, swapped
from orchestrator.study.recipe import Numerics
from orchestrator.study.schema import Evaluation
from orchestrator.study.spec import EvaluateSpec
from tests.texts import random_tokens, write_tokens

LENGTH, WINDOWS = 24, 5
SPEC = EvaluateSpec(
    tokens="t", teacher="r", subject="s", sequence_length=LENGTH, numerics=Numerics(),
    evaluation=Evaluation(tokens=LENGTH * WINDOWS, batch_size=2, prompts=3, prompt_tokens=6, new_tokens=5),
)  # fmt: skip


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token file of exactly the windows that are evaluated, with repetitions in it."""
    return write_tokens(tmp_path / "tokens", valid=random_tokens(LENGTH * WINDOWS, above=6))


@pytest.fixture
def student(tiny_teacher: Path, teacher: Any, tmp_path: Path) -> Any:
    """A student, saved in `tmp_path / "student"`."""
    model = load_teacher(tiny_teacher)
    swap(model, (0, 1), HyenaConfig(heads=4), torch.Generator().manual_seed(0))
    (tmp_path / "student").mkdir()
    save_student(model, teacher.state_dict(), tmp_path / "student")
    return model


def evaluated(place: Any, subject: Path, teacher: Path, tokens: Path, spec: EvaluateSpec = SPEC) -> dict[str, Any]:
    made: Workplace = place(inputs={"teacher": teacher, "subject": subject, "tokens": tokens})
    return evaluate(spec, made)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocabulary", [2, 4, 30])
def test_a_hit_completes_a_trigram_that_stands_earlier_in_the_window(seed: int, vocabulary: int) -> None:
    window = np.random.default_rng(seed).integers(0, vocabulary, 40)
    words = window.tolist()
    wanted = [
        end >= 2 and any(words[end - 2 : end + 1] == words[at - 2 : at + 1] for at in range(2, end))
        for end in range(1, 40)
    ]
    assert trigram_hits(torch.from_numpy(window)[None]).tolist() == [wanted]


def test_a_window_that_repeats_itself_is_all_hits_after_the_first_time() -> None:
    assert trigram_hits(torch.tensor([[1, 2, 3, 1, 2, 3, 1]])).tolist() == [[False, False, False, False, True, True]]
    assert trigram_hits(torch.tensor([[7, 7, 7, 7]])).tolist() == [[False, False, True]]


def test_the_teacher_beside_itself_is_perfect(place: Any, tiny_teacher: Path, teacher: Any, tokens: Path) -> None:
    found = evaluated(place, tiny_teacher, tiny_teacher, tokens)
    assert (found["perplexity_ratio"], found["kl"], found["agreement"]) == (1.0, 0.0, 1.0)
    assert (found["generation_agreement"], found["generation_prefix"]) == (1.0, 5.0)
    for name in ("perplexity", "accuracy", "hit_nll", "miss_nll", *(f"{way}_generation_perplexity" for way in WAYS)):
        assert found[name] == found[f"teacher_{name}"]
    assert found["parameters"] == parameter_count(teacher)


def test_metrics_are_what_their_names_say(
    place: Any, tiny_teacher: Path, teacher: Any, student: Any, tokens: Path, tmp_path: Path
) -> None:
    found = evaluated(place, tmp_path / "student", tiny_teacher, tokens)
    windows = torch.from_numpy(np.fromfile(tokens / "valid.bin", dtype=np.uint16).astype(np.int64)).view(
        WINDOWS, LENGTH
    )
    rows: dict[str, list[float]] = {name: [] for name in ("own", "wanted", "kl", "right", "same", "hit")}
    for window in windows:
        with torch.no_grad():
            own, wanted = (model(window[None]).logits[0].double().softmax(-1) for model in (student, teacher))
        hits = trigram_hits(window[None])[0].tolist()
        for at in range(LENGTH - 1):
            target = int(window[at + 1])
            rows["own"].append(-math.log(float(own[at, target])))
            rows["wanted"].append(-math.log(float(wanted[at, target])))
            rows["kl"].append(float((wanted[at] * (wanted[at] / own[at]).log()).sum()))
            rows["right"].append(float(own[at].argmax() == target))
            rows["same"].append(float(own[at].argmax() == wanted[at].argmax()))
            rows["hit"].append(hits[at])
    mean = {name: sum(values) / len(values) for name, values in rows.items()}
    on_hits = [nll for nll, hit in zip(rows["own"], rows["hit"], strict=True) if hit]
    on_misses = [nll for nll, hit in zip(rows["wanted"], rows["hit"], strict=True) if not hit]
    assert found["tokens"] == WINDOWS * (LENGTH - 1)
    assert found["perplexity"] == pytest.approx(math.exp(mean["own"]), rel=1e-4)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(mean["wanted"]), rel=1e-4)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(mean["own"] - mean["wanted"]), rel=1e-4)
    assert found["kl"] == pytest.approx(mean["kl"], rel=1e-3)
    assert found["accuracy"] == pytest.approx(mean["right"])
    assert found["agreement"] == pytest.approx(mean["same"])
    assert found["hit_share"] == pytest.approx(mean["hit"])
    assert found["hit_nll"] == pytest.approx(sum(on_hits) / len(on_hits), rel=1e-4)
    assert found["teacher_miss_nll"] == pytest.approx(sum(on_misses) / len(on_misses), rel=1e-4)
    assert 0 < found["hit_share"] < 1 < found["perplexity_ratio"] != 1


def test_generation_counts_equal_tokens_and_the_prefix_before_the_first_difference(
    place: Any, tiny_teacher: Path, teacher: Any, student: Any, tokens: Path, tmp_path: Path
) -> None:
    found = evaluated(place, tmp_path / "student", tiny_teacher, tokens)
    windows = np.fromfile(tokens / "valid.bin", dtype=np.uint16).astype(np.int64).reshape(WINDOWS, LENGTH)
    prompts = torch.from_numpy(windows[:3, :6])
    same = [
        [a == b for a, b in zip(own, wanted, strict=True)]
        for own, wanted in zip(*(naive_greedy(model, prompts, 5) for model in (student, teacher)), strict=True)
    ]
    prefixes = [row.index(False) if False in row else 5 for row in same]
    assert found["generation_agreement"] == pytest.approx(sum(map(sum, same)) / 15)
    assert found["generation_prefix"] == pytest.approx(sum(prefixes) / 3)


def test_tokens_that_are_equal_again_after_a_difference_are_no_prefix() -> None:
    def said(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return {way: torch.tensor(rows) for way in WAYS} | {f"{way}_nll": torch.zeros(3, 5) for way in WAYS}

    found = compare(said([[1, 2, 9, 4, 5], [9, 2, 3, 4, 5], [1, 2, 3, 4, 5]]), said([[1, 2, 3, 4, 5]] * 3))
    assert found["generation_agreement"] == pytest.approx(13 / 15)
    assert found["generation_prefix"] == pytest.approx((2 + 0 + 5) / 3)


@torch.no_grad()
def test_samples_come_as_often_as_the_model_says(teacher: Any) -> None:
    """Chi-squared of the second of two tokens after a prompt, over those that are expected ten times or more."""
    count, prompt = 20_000, torch.tensor([[5, 6, 7]])
    first, second = continued(teacher, prompt.expand(count, -1), 2, torch.Generator().manual_seed(3)).T
    begun = int(first.mode().values)
    chances = teacher(torch.cat([prompt, torch.tensor([[begun]])], dim=1)).logits[0, -1].double().softmax(-1)
    found = torch.bincount(second[first == begun], minlength=len(chances)).double()
    wanted = chances * found.sum()
    often = wanted >= 10
    assert often.sum() > 10
    freedom = int(often.sum()) - 1
    apart = float(((found - wanted)[often] ** 2 / wanted[often]).sum())
    assert apart < freedom + 4 * math.sqrt(2 * freedom)


def test_a_text_as_long_as_the_teacher_takes_has_nothing_to_go_on_with(
    place: Any, tiny_teacher: Path, tokens: Path
) -> None:
    spec = SPEC.model_copy(update={"sequence_length": 96})
    spec = spec.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"prompt_tokens": 96})})
    found = evaluated(place, tiny_teacher, tiny_teacher, tokens, spec)
    assert not any("generation" in name for name in found)


def naive_greedy(model: Any, prompts: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy continuations by asking for the whole sequence again at every token."""
    for _ in range(new):
        with torch.no_grad():
            prompts = torch.cat([prompts, model(prompts, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompts[:, -new:].tolist()  # type: ignore[no-any-return]


def test_greedy_goes_on_past_the_end_of_text(teacher: Any) -> None:
    with torch.no_grad():  # a model that says nothing but the end of text
        teacher.get_output_embeddings().weight.zero_()
        teacher.get_output_embeddings().weight[0] = 1.0
        teacher.gpt_neox.final_layer_norm.weight.zero_()
        teacher.gpt_neox.final_layer_norm.bias.fill_(1.0)
    assert naive_greedy(teacher, torch.tensor([[5, 6]]), 1) == [[0]]
    assert continued(teacher, torch.tensor([[5, 6]]), 4).tolist() == [[0] * 4]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"num_beams": 4},
        {"return_dict_in_generate": True},
        {"do_sample": True, "temperature": 5.0},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [*range(7, 300)]},
        {"cache_implementation": "static", "eos_token_id": [*range(300)]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_greedy_is_greedy_whatever_the_teachers_settings_of_generation_are(
    tiny_teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    told = json.loads((tmp_path / "teacher" / "generation_config.json").read_text())
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps({**told, **settings}))
    model, prompts = load_teacher(tmp_path / "teacher"), torch.randint(1, 300, (3, 8))
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())
    assert continued(model, prompts, 6).tolist() == naive_greedy(load_teacher(tiny_teacher), prompts, 6)


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_attentions": True}, {"use_cache": False}])
def test_a_teacher_whose_configuration_asks_for_other_outputs_is_evaluated(
    place: Any, tiny_teacher: Path, tokens: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    told = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**told, **settings}))
    found = evaluated(place, tmp_path / "teacher", tmp_path / "teacher", tokens)
    assert found == evaluated(place, tiny_teacher, tiny_teacher, tokens)


def test_without_prompts_nothing_is_generated(place: Any, tiny_teacher: Path, tokens: Path) -> None:
    spec = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"prompts": 0})})
    assert not [name for name in evaluated(place, tiny_teacher, tiny_teacher, tokens, spec) if "generation" in name]


def test_a_class_without_tokens_has_no_number(place: Any, tiny_teacher: Path, tokens: Path) -> None:
    write_tokens(tokens, valid=np.arange(1, LENGTH + 1))  # no trigram comes twice
    found = evaluated(place, tiny_teacher, tiny_teacher, tokens)
    assert found["hit_share"] == 0.0
    assert "hit_nll" not in found
    assert "miss_nll" in found


@pytest.mark.parametrize("prompts", [0, 3])
def test_with_the_teachers_own_evaluation_at_hand_the_teacher_does_not_run_again(
    place: Any, tiny_teacher: Path, student: Any, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    prompts: int,
) -> None:  # fmt: skip
    spec = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"prompts": prompts})})
    wanted = evaluated(place, tmp_path / "student", tiny_teacher, tokens, spec)
    inputs = {"teacher": tiny_teacher, "subject": tiny_teacher, "tokens": tokens}
    own = place("own", inputs)
    evaluate(spec, own)
    ran: list[int] = []
    for room, name in ((likelihood, "final_hidden"), (generation, "continued")):
        usual = getattr(room, name)
        monkeypatch.setattr(room, name, lambda m, *a, usual=usual: (ran.append(len(swapped(m))), usual(m, *a))[1])
    found = evaluate(spec, place("other", {**inputs, "subject": tmp_path / "student", "reference": own.out}))
    assert found == wanted
    assert set(ran) == {2}, "layers that are swapped in what ran"


def test_batches_change_nothing(place: Any, tiny_teacher: Path, student: Any, tokens: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"batch_size": 5})})
    by_two, at_once = (evaluated(place, tmp_path / "student", tiny_teacher, tokens, s) for s in (SPEC, spec))
    assert at_once == pytest.approx(by_two, rel=1e-4)


DIVERGED = {
    "not a number": lambda weight: weight.fill_(float("nan")),
    "one infinite": lambda weight: weight[0].fill_(float("inf")),
    "finite, above 709 nats": lambda weight: weight.normal_(std=1e4),
    "finite, logits beyond float32": lambda weight: weight.fill_(3e38),
}


@pytest.mark.parametrize("how", DIVERGED)
def test_a_student_that_diverged_is_told_so_with_what_to_do(
    place: Any, teacher: Any, tiny_teacher: Path, student: Any, tokens: Path, tmp_path: Path, how: str
) -> None:
    with torch.no_grad():
        DIVERGED[how](student.get_output_embeddings().weight)
    save_student(student, teacher.state_dict(), tmp_path / "student")
    told = (
        r"^evaluation gave no finite perplexity, .*: the student has diverged; lower recipe\.optimizer\.lr or matrix_lr"
    )
    with pytest.raises(ArithmeticError, match=told):
        evaluated(place, tmp_path / "student", tiny_teacher, tokens)


def test_a_teacher_that_diverged_is_not_blamed_on_the_student(
    place: Any, teacher: Any, tokens: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        teacher.get_output_embeddings().weight.normal_(std=1e4)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ArithmeticError, match=r"no finite .*: the teacher has diverged; lower teacher\.optimizer\.lr"):
        evaluated(place, tmp_path / "teacher", tmp_path / "teacher", tokens)


def test_no_new_tokens_are_none(teacher: Any) -> None:
    assert continued(teacher, torch.tensor([[5, 6, 7], [1, 2, 3]]), 0).shape == (2, 0)
