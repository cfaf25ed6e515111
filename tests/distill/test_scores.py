"""Scores, errors and what is compared of them, by hand and by the definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from orchestrator.distill.measuring.scores import Items, compare, read_items, write_items

ONES = (1.0,) * 6
STUDENT = Items("mean", (1.0, 0.0, 1.0, 1.0, 0.0, 0.0), ONES, (0.25,) * 6)
TEACHER = Items("mean", (1.0, 1.0, 1.0, 1.0, 1.0, 0.0), ONES, (0.25,) * 6)
LOGS, WORDS = (-6.0, -8.0, -3.0), (2.0, 4.0, 2.0)


def test_a_mean_has_the_error_that_lm_eval_gives_it() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    assert STUDENT.value == 0.5 and STUDENT.guess == 0.25
    assert STUDENT.stderr == pytest.approx(metrics.mean_stderr(STUDENT.sums), rel=1e-12)
    assert STUDENT.stderr == pytest.approx(math.sqrt(0.3 / 6), rel=1e-12)  # 6 squares of 0.5 over 5, over 6 items


def test_a_perplexity_is_that_of_all_words_and_its_error_goes_through_its_slope() -> None:
    perplexity, bits = Items("perplexity", LOGS, WORDS), Items("bits", LOGS, WORDS)
    assert perplexity.value == pytest.approx(math.exp(17 / 8), rel=1e-12)
    assert bits.value == pytest.approx(17 / 8 / math.log(2), rel=1e-12)
    left = [-6 + 2 * 17 / 8, -8 + 4 * 17 / 8, -3 + 2 * 17 / 8]
    error = math.sqrt(sum(each**2 for each in left) * 3 / 2) / 8
    assert perplexity.stderr == pytest.approx(math.exp(17 / 8) * error, rel=1e-12)
    assert bits.stderr == pytest.approx(error / math.log(2), rel=1e-12)


def test_the_relative_score_and_its_error_are_those_of_a_ratio_of_paired_means() -> None:
    told = compare(STUDENT, TEACHER)
    assert told["relative"] == pytest.approx((0.5 - 0.25) / (5 / 6 - 0.25), rel=1e-12)
    (var_s, cov), (_, var_t) = np.cov(np.subtract(STUDENT.sums, 0.25), np.subtract(TEACHER.sums, 0.25))
    ratio, above = told["relative"], 5 / 6 - 0.25
    by_definition = math.sqrt((var_s - 2 * ratio * cov + ratio**2 * var_t) / 6) / above
    assert told["relative_stderr"] == pytest.approx(by_definition, rel=1e-12)
    assert compare(TEACHER, TEACHER) == {"relative": 1.0, "relative_stderr": 0.0}


def test_items_of_several_numbers_of_options_have_chances_of_their_own() -> None:
    chance = (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)
    own, theirs = (Items("mean", each.sums, ONES, chance) for each in (STUDENT, TEACHER))
    assert own.guess == pytest.approx(1 / 3)
    assert compare(own, theirs)["relative"] == pytest.approx((0.5 - 1 / 3) / (5 / 6 - 1 / 3), rel=1e-12)


@pytest.mark.parametrize(("right", "refused"), [(8, True), (9, False)])
def test_a_teacher_within_two_errors_of_chance_refuses(right: int, refused: bool) -> None:
    """Of 16 items, 8 are 0.5 +- 0.129, less than two above 0.25; 9 are 0.5625 +- 0.128, more than two."""
    ones = (1.0,) * 16
    teacher = Items("mean", (1.0,) * right + (0.0,) * (16 - right), ones, (0.25,) * 16)
    assert (compare(teacher, teacher) == {"refused": "teacher at chance"}) is refused


def test_a_teacher_that_is_never_right_refuses_though_it_has_no_error() -> None:
    never = Items("mean", (0.0,) * 6, ONES, (0.0,) * 6)
    assert compare(STUDENT, never) == {"refused": "teacher at chance"}
    assert compare(Items("mean", (1.0,), (1.0,), (0.0,)), Items("mean", (1.0,), (1.0,), (0.0,))) == {
        "refused": "one item has no error"
    }


def test_perplexities_have_a_ratio_whose_error_is_of_the_differences() -> None:
    student, teacher = (Items("perplexity", logs, WORDS) for logs in (LOGS, (-5.0, -6.0, -2.5)))
    told = compare(student, teacher)
    assert told["ratio"] == pytest.approx(student.value / teacher.value, rel=1e-12)
    left = [1 - 2 * 3.5 / 8, 2 - 4 * 3.5 / 8, 0.5 - 2 * 3.5 / 8]
    error = math.sqrt(sum(each**2 for each in left) * 3 / 2) / 8
    assert told["ratio_stderr"] == pytest.approx(told["ratio"] * error, rel=1e-12)


def test_what_has_no_level_of_chance_is_not_compared() -> None:
    plain = Items("mean", STUDENT.sums, ONES)
    assert compare(plain, plain) == {} and compare(Items("bits", LOGS, WORDS), Items("bits", LOGS, WORDS)) == {}


def test_items_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = {"acc": STUDENT, "word_perplexity": Items("perplexity", LOGS, WORDS)}
    write_items(tmp_path, found)
    assert read_items(tmp_path) == found
