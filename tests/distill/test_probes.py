"""Every number of the probes against its definition written out plainly on a tiny student, and keys in real text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from operators.config import HyenaConfig
from orchestrator.distill.hits import trigram_gaps
from orchestrator.distill.measuring import needles as keys
from orchestrator.distill.measuring import probes as module
from orchestrator.distill.measuring.needles import DEPTHS, make_needles, margin
from orchestrator.distill.measuring.probes import bits_per_byte, by_gap, by_position, probe, windows_of
from orchestrator.distill.models.student import load_teacher, save_student
from orchestrator.distill.training import losses
from orchestrator.study.documents import DataError
from orchestrator.study.recipe import Numerics
from orchestrator.study.spec import ProbesSpec
from tests.conftest import TEXT
from tests.distill.students import student_of
from tests.texts import write_tokens

TEXTS = [text + "ab ab ab ab ab\n" * (number % 2) for number, text in enumerate(TEXT)]
WINDOWS, SHORT, LONG = 3, 20, 90
SPEC = ProbesSpec(
    tokens="t", teacher="r", subject="s", sequence_length=24, lengths=(SHORT, LONG), windows=WINDOWS, needles=0,
    numerics=Numerics(), seed=3,
)  # fmt: skip


@pytest.fixture
def tokenizer(tiny_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture
def ids(tokenizer: Any) -> list[int]:
    """Text of validation: documents and their ends."""
    return [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]


@pytest.fixture
def tokens(tokenizer: Any, ids: list[int], tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokens" / "tokenizer")
    return write_tokens(tmp_path / "tokens", valid=ids)


@pytest.fixture
def student(tiny_teacher: Path, teacher: Any, tmp_path: Path) -> Any:
    """A student with operators in two of its layers, saved in `tmp_path / "student"`."""
    model = student_of(tiny_teacher, {0: HyenaConfig(heads=4), 1: HyenaConfig()})
    (tmp_path / "student").mkdir()
    save_student(model, teacher.state_dict(), tmp_path / "student")
    return model


@pytest.fixture
def probed(place: Any, tiny_teacher: Path, tokens: Path, tmp_path: Path) -> Any:
    """Probes a model; the student where nothing else is said."""

    def run(spec: ProbesSpec = SPEC, subject: Path = tmp_path / "student", teacher: Path = tiny_teacher) -> Any:
        return probe(spec, place(inputs={"teacher": teacher, "subject": subject, "tokens": tokens}))

    return run


def spread(ids: list[int], length: int, count: int) -> list[list[int]]:
    """So many windows, from the first to the last, equally far apart."""
    last = len(ids) // length - 1
    return [ids[start * length :][:length] for start in (round(i * last / (count - 1)) for i in range(count))]


@torch.no_grad()
def nats(model: Any, window: list[int]) -> list[float]:
    """What every token but the first costs."""
    chances = model(torch.tensor([window])).logits[0].double().softmax(-1)
    return [-math.log(float(chances[at, token])) for at, token in enumerate(window[1:])]


def last_seen(window: list[int], end: int) -> int:
    """How far before `end` the trigram that ends there ended last; 0 where it did not."""
    wanted = window[end - 2 : end + 1]
    return next((end - at for at in range(end - 1, 1, -1) if end >= 2 and window[at - 2 : at + 1] == wanted), 0)


def test_numbers_are_what_their_names_say(probed: Any, student: Any, tokenizer: Any, ids: list[int]) -> None:
    found = probed()
    windows = spread(ids, LONG, WINDOWS)
    told = [
        (end, last_seen(window, end), cost)
        for window in windows
        for end, cost in enumerate(nats(student, window), start=1)
    ]
    bins: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}
    for end, gap, cost in told:
        bins.setdefault(str(2 ** int(math.log2(end))), []).append(cost)
        if gap:
            hits.setdefault(str(max(least for least in (1, 16, 64, 128) if least <= gap)), []).append(cost)
    assert found["loss"] == pytest.approx({name: sum(each) / len(each) for name, each in bins.items()}, rel=1e-4)
    assert found["loss"].keys() == {"1", "2", "4", "8", "16", "32", "64"}
    assert found["hit_nll"] == pytest.approx({name: sum(each) / len(each) for name, each in hits.items()}, rel=1e-4)
    assert found["hit_tokens"] == {name: len(each) for name, each in hits.items()}
    assert len(hits) > 1
    # Every sign of a token of a byte-level BPE stands for a byte; the end of text is none of the text.
    written = [t for window in windows for t in window[1:] if t != tokenizer.eos_token_id]
    count = sum(len(token) for token in tokenizer.convert_ids_to_tokens(written))
    assert len(written) < sum(len(window) - 1 for window in windows)
    total = sum(cost for _, _, cost in told)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / count, rel=1e-4)
    short = [cost for window in spread(ids, SHORT, WINDOWS * LONG // SHORT) for cost in nats(student, window)]
    wanted = {str(LONG): total / len(told), str(SHORT): sum(short) / len(short)}
    assert found["nll"] == pytest.approx(wanted, rel=1e-4)
    assert found["needle"] == {}


def test_in_chunks_it_is_the_same(probed: Any, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = probed()
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 7 * 300)  # seven positions
    monkeypatch.setattr(module, "PASSED", 2 * SHORT)
    for name, value in probed().items():
        assert value == pytest.approx(at_once[name], rel=1e-6), name


def test_the_teacher_is_measured_as_it_is(probed: Any, teacher: Any, tiny_teacher: Path, ids: list[int]) -> None:
    costs = [cost for window in spread(ids, LONG, WINDOWS) for cost in nats(teacher, window)]
    found = probed(SPEC.of("r"), tiny_teacher)
    assert found["nll"][str(LONG)] == pytest.approx(sum(costs) / len(costs), rel=1e-4)


def test_a_bin_ends_before_the_next_power_of_two() -> None:
    nll_BP = torch.arange(1.0, 9.0, dtype=torch.float64)[None]  # what is lost at a position is its number
    assert by_position(nll_BP) == {"1": 1.0, "2": 2.5, "4": 5.5, "8": 8.0}


def test_a_distance_belongs_to_the_class_that_begins_at_or_before_it() -> None:
    window = list(range(1000, 2000))
    at = 3
    for gap in (15, 16, 63, 64, 127, 128):  # each trigram is new, and stands again so much later
        window[at : at + 3] = window[at + gap : at + gap + 3] = [gap, gap + 500, gap + 900]
        at += 150
    [gaps] = trigram_gaps(torch.tensor([window]))
    assert sorted(gap for gap in gaps.tolist() if gap) == [15, 16, 63, 64, 127, 128]
    found = by_gap(gaps[None].double(), torch.tensor([window]))
    assert found["hit_nll"] == {"1": 15.0, "16": (16 + 63) / 2, "64": (64 + 127) / 2, "128": 128.0}
    assert found["hit_tokens"] == {"1": 1, "16": 2, "64": 2, "128": 1}


def test_the_distance_is_that_to_the_last_time() -> None:
    windows_BL = torch.tensor([[1, 2, 3, 1, 2, 3, 9, 1, 2, 3, 3, 3, 3], [1, 2, 3, 9, 3, 3, 3, 3, 9, 1, 2, 3, 1]])
    assert trigram_gaps(windows_BL).tolist() == [
        [0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, 0],
    ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_window_that_is_too_short_for_two_trigrams_has_no_hit(length: int) -> None:
    assert trigram_gaps(torch.zeros(2, length, dtype=torch.long)).tolist() == [[0] * (length - 1)] * 2


def test_bytes_are_those_of_the_text_without_the_windows_first_token(tokenizer: Any) -> None:
    window = [5, *tokenizer("aü")["input_ids"], tokenizer.eos_token_id]
    nll_BP = torch.full((1, len(window) - 1), math.log(2), dtype=torch.float64)  # a bit each
    assert bits_per_byte(nll_BP, torch.tensor([window]), tokenizer) == pytest.approx((len(window) - 1) / 3)


def test_windows_of_another_length_begin_with_the_beginning_of_text_and_have_none_inside(place: Any) -> None:
    made = place(inputs={"tokens": write_tokens(place().out, valid=[9, 1, 2, 3, 9, 4, 5, 6, 9, 7, 8])})
    spec = SPEC.model_copy(update={"sequence_length": 4})
    text, begin = module.validation_text(spec, made)
    assert (text.tolist(), begin) == ([9, 1, 2, 3, 9, 4, 5, 6, 9, 7, 8], None)
    told = made.inputs["tokens"] / "tokens.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "begin_of_text": 9}))
    text, begin = module.validation_text(spec, made)
    assert (text.tolist(), begin) == ([1, 2, 3, 4, 5, 6, 7, 8], 9)
    assert windows_of(text, begin, 5, 10).tolist() == [[9, 1, 2, 3, 4], [9, 5, 6, 7, 8]]
    assert windows_of(text, begin, 3, 14).shape == (4, 3)  # as many as have the tokens, where the text has them


def test_every_length_has_as_many_tokens_where_the_text_is_short(
    probed: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    usual = module.token_losses

    def looked(model: Any, windows_BL: Any, *more: Any) -> Any:
        seen.append(tuple(windows_BL.shape))
        return usual(model, windows_BL, *more)

    monkeypatch.setattr(module, "token_losses", looked)
    probed(SPEC.model_copy(update={"windows": 10_000}))
    (count, length), (others, short) = seen
    assert (length, short) == (LONG, SHORT)
    assert others == count * LONG // SHORT


def test_a_length_that_the_text_has_not_is_told_with_what_to_do(probed: Any, student: Any, tokens: Path) -> None:
    write_tokens(tokens, valid=range(1, 80))
    with pytest.raises(
        DataError, match=r"^evaluation\.probes\.lengths: 90 exceeds the 79 tokens .*: lower it, or give"
    ):
        probed()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_diverged_is_told_so(
    probed: Any, teacher: Any, student: Any, tmp_path: Path, tiny_teacher: Path, who: str
) -> None:
    model = student if who == "student" else teacher
    with torch.no_grad():
        model.get_output_embeddings().weight[0].fill_(float("inf"))
    if who == "student":
        save_student(student, load_teacher(tiny_teacher).state_dict(), tmp_path / "student")
        spec, folders = SPEC, (tmp_path / "student", tiny_teacher)
    else:
        teacher.save_pretrained(tmp_path / "teacher")
        spec, folders = SPEC.of("r"), (tmp_path / "teacher", tmp_path / "teacher")
    with pytest.raises(ArithmeticError, match=rf"^probes gave no finite loss 1: the {who} has diverged; lower"):
        probed(spec, *folders)


ASKED = SPEC.model_copy(update={"needles": 5, "lengths": (88,)})
ROOMY = 200  # tokens, more than the model has positions, for what is only made


def made(ids: list[int], tokenizer: Any, spec: ProbesSpec, length: int, depth: float, begin: int | None = None) -> Any:
    return make_needles(np.array(ids), begin, tokenizer, spec, length, depth)


@pytest.mark.parametrize("begin", [None, 0])
def test_a_needle_is_eight_lines_in_real_text_and_a_question_at_its_end(
    tokenizer: Any, ids: list[int], begin: int | None
) -> None:
    for depth in DEPTHS:
        several = made(ids, tokenizer, ASKED, ROOMY, depth, begin)
        assert len(several) == 5
        for needle in several:
            values = [tokenizer.decode(value) for value in needle.values]
            assert len(set(values)) == 8 and all(len(word) == 4 and word.isalpha() for word in values)
            lines = "".join(f"\nKEY_{key} = '{word}'" for key, word in enumerate(values)) + "\n"
            before, after = tokenizer.decode(needle.text[begin is not None :]).split(lines)
            question = f"\nKEY_{needle.right} = '"
            assert after.endswith(question)
            assert len(needle.text) + max(map(len, needle.values)) == ROOMY
            if begin is not None:
                assert needle.text[0] == begin
            parts = [len(tokenizer(text)["input_ids"]) for text in (before, after.removesuffix(question))]
            assert parts[0] / sum(parts) == pytest.approx(depth, abs=0.05)
            assert before + after.removesuffix(question) in "<eos>".join(TEXTS)


def test_values_are_the_same_at_every_length_and_others_at_another_depth_or_with_another_seed(
    tokenizer: Any, ids: list[int]
) -> None:
    def asked(spec: ProbesSpec, length: int, depth: float) -> list[Any]:
        return [(needle.values, needle.right) for needle in made(ids, tokenizer, spec, length, depth)]

    first = asked(ASKED, ROOMY, 0.1)
    assert asked(ASKED, ROOMY + 60, 0.1) == first
    assert all(one not in asked(ASKED, ROOMY, 0.9) for one in first)
    assert len({str(values) for values, _ in first}) == 5
    other = asked(ASKED.model_copy(update={"seed": 4}), ROOMY, 0.1)
    assert all(one not in other for one in first)
    many = asked(ASKED.model_copy(update={"needles": 200}), ROOMY, 0.1)
    assert np.bincount([right for _, right in many], minlength=8).min() > 10  # of 25 expected each


@torch.no_grad()
def chance(model: Any, text: list[int], value: list[int]) -> float:
    """Log-probability of a value after a text, without a cache."""
    logs = model(torch.tensor([[*text, *value]])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(text) - 1 + at, token]) for at, token in enumerate(value))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_margin_is_the_right_value_against_the_likeliest_other(teacher: Any, student: Any, who: str) -> None:
    model = student if who == "student" else teacher
    values = ([7, 8, 9], [7, 8, 10], [11], [7, 12], [13, 14, 15, 16], [17, 18], [19, 20], [21, 22, 23])
    for right in (0, 2, 4):
        needle = keys.Needle(list(range(30, 90)), tuple(values), right)
        chances = [chance(model, needle.text, value) for value in values]
        wanted = chances[right] - max(one for place, one in enumerate(chances) if place != right)
        assert margin(model, needle, ASKED, "cpu") == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_right_is_a_margin_above_zero_by_depth_and_in_all(
    probed: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([1.0, -2.0, 0.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(keys, "margin", lambda *_: next(told))
    monkeypatch.setattr(keys, "make_needles", lambda *_: ["one", "two"])
    found = probed(ASKED)["needle"]["88"]
    depths = {depth: (each["accuracy"], each["margin"], each["items"]) for depth, each in found.pop("depths").items()}
    assert depths == {"0.1": (0.5, -0.5, 2), "0.5": (0.5, 1.5, 2), "0.9": (1.0, 4.5, 2)}
    # The standard error of a mean of six, four of them 1: the deviations are 1/3 four times and 2/3 twice.
    error = math.sqrt((4 * (1 / 3) ** 2 + 2 * (2 / 3) ** 2) / 5 / 6)
    assert found == pytest.approx({"accuracy": 4 / 6, "margin": 11 / 6, "items": 6, "stderr": error, "chance": 1 / 8})


def test_a_length_that_the_lines_fill_is_said_and_has_no_number(probed: Any, student: Any, said: list[str]) -> None:
    assert probed(ASKED)["needle"] == {}  # of a vocabulary of 300, where the lines alone are more tokens
    assert said == ["evaluation.probes: no needle in 88 tokens, which the lines with keys fill"]


def test_needles_are_asked_of_every_length_that_holds_them(
    probed: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KEYS", 3)
    found = probed(ASKED.model_copy(update={"lengths": (16, 70, 90)}))["needle"]
    assert found.keys() == {"70", "90"}
    for told in found.values():
        assert told["items"] == 15 and set(told["depths"]) == {"0.1", "0.5", "0.9"}


def test_text_that_has_fewer_windows_than_needles_comes_again(tokenizer: Any, ids: list[int]) -> None:
    several = made(ids[:210], tokenizer, ASKED, ROOMY, 0.5)
    assert len(several) == 5
