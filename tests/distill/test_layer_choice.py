"""Orders of layers, and how sure they are, from sums over windows that were written by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from orchestrator.distill.choosing.choice import DRAWS, drawn_means, kendall
from orchestrator.distill.choosing.windows import MEANS, Sums, write_sums
from orchestrator.distill.stage import run_stage
from orchestrator.files import read_json, write_json
from orchestrator.study.spec import Candidate, ChoiceSpec, Solve

TOKENS = 10.0
HITS = [1.0, 4.0, 0.0, 3.0]
# By layer the divergence of every window, summed over its ten tokens: means of 0.5, 0.3, 0.3 and 0.9 nats.
KL = {7: [4.0, 6.0, 5.0, 5.0], 2: [1.0, 5.0, 2.0, 4.0], 4: [5.0, 1.0, 4.0, 2.0], 0: [9.0, 9.0, 9.0, 9.0]}


def written(folder: Path, hits: list[float] = HITS, **sums: list[float]) -> Path:
    """The folder of a score, whose other sums are zero."""
    folder.mkdir()
    counts = {"tokens": np.full(len(hits), TOKENS), "hits": np.array(hits), "misses": TOKENS - np.array(hits)}
    write_sums(Sums(counts, {name: np.array(sums.get(name, [0.0] * len(hits))) for name in MEANS}), folder)
    return folder


def spec_of(layers: Any, **changes: Any) -> ChoiceSpec:
    candidates = tuple(Candidate(layer=layer, score=f"k{layer}") for layer in layers)
    return ChoiceSpec(subject="s", candidates=candidates, seed=3).changed(**changes)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Scores of layers; their losses on hits fall where divergences rise."""
    return {
        f"layer {layer}": written(tmp_path / f"{layer}", kl=kl, loss=[2 * v for v in kl], hit_loss=[9 - v for v in kl])
        for layer, kl in KL.items()
    }


def test_candidates_come_with_the_keys_of_their_scores() -> None:
    assert spec_of([7, 2], reference="r").parents == {
        "subject": "s",
        "reference": "r",
        "layer 7": "k7",
        "layer 2": "k2",
    }


def test_the_lowest_score_goes_first_and_equal_ones_by_number(place: Any, inputs: dict[str, Path]) -> None:
    made = place(inputs=inputs)
    found = run_stage(spec_of(KL), made)
    assert found["order"] == [2, 4, 7, 0]
    assert {layer: told["score"] for layer, told in found["scores"].items()} == {"0": 0.9, "2": 0.3, "4": 0.3, "7": 0.5}
    assert read_json(made.out / "choice.json") == found


def test_of_restored_layers_the_highest_goes_first(place: Any, inputs: dict[str, Path]) -> None:
    assert run_stage(spec_of(KL, ascending=False), place(inputs=inputs))["order"] == [0, 7, 2, 4]


def test_the_measure_says_which_mean_is_the_score(place: Any, inputs: dict[str, Path]) -> None:
    of_loss, of_hits = (run_stage(spec_of(KL, measure=name), place(name, inputs)) for name in ("loss", "hits"))
    assert of_loss["scores"]["7"]["score"] == pytest.approx(2 * 0.5)
    assert of_hits["order"] == [0, 7, 2, 4]
    assert of_hits["scores"]["7"]["score"] == pytest.approx((4 * 9 - 20) / sum(HITS))


def test_errors_are_over_windows(place: Any, inputs: dict[str, Path]) -> None:
    found = run_stage(spec_of(KL), place(inputs=inputs))
    assert found["scores"]["7"]["error"] == pytest.approx(np.std([0.4, 0.6, 0.5, 0.5], ddof=1) / 2)
    assert found["scores"]["0"]["error"] == pytest.approx(0.0)


def test_tied_is_what_is_within_two_errors_of_the_paired_difference_to_the_first(place: Any, tmp_path: Path) -> None:
    """The windows differ more than the layers do, which pairs take out."""
    hard = np.array([1.0, 40.0, 9.0, 20.0])
    more = {0: [0.0] * 4, 1: [1.0, 1.2, 1.1, 0.9], 2: [3.0, -1.0, 0.0, -1.0], 3: [0.0] * 4}
    inputs = {f"layer {n}": written(tmp_path / f"{n}", kl=list(hard + each)) for n, each in more.items()}
    found = run_stage(spec_of(more), place(inputs=inputs))
    assert found["order"] == [0, 3, 2, 1]  # 2 is 0.025 above the first, with an error of about 0.1
    assert found["tied"] == [3, 2]
    assert found["scores"]["1"]["error"] > 0.5  # alone it would seem tied


@pytest.mark.parametrize(("factor", "tied"), [(1.99, [1]), (2.01, [])])
def test_the_bound_is_two_errors(place: Any, tmp_path: Path, factor: float, tied: list[int]) -> None:
    apart = np.array([1.0, -1.0, 2.0, -2.0])
    error = float(np.std(apart, ddof=1) / 2)
    inputs = {
        "layer 0": written(tmp_path / "0", kl=[5.0] * 4),
        "layer 1": written(tmp_path / "1", kl=list(5.0 + apart + factor * error)),
    }
    assert run_stage(spec_of([0, 1]), place(inputs=inputs))["tied"] == tied


def test_the_teacher_stands_beside_them(place: Any, inputs: dict[str, Path], tmp_path: Path) -> None:
    more = {**inputs, "reference": written(tmp_path / "teacher", loss=[1.0, 2.0, 3.0, 4.0])}
    of_kl, of_loss = (run_stage(spec_of(KL, measure=name, reference="r"), place(name, more)) for name in ("kl", "loss"))
    assert of_kl["teacher"] == {"score": 0.0, "error": 0.0}
    assert of_loss["teacher"] == {"score": 0.25, "error": pytest.approx(np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2)}
    assert "teacher" not in run_stage(spec_of(KL), place("alone", inputs))


def test_tau_is_kendalls() -> None:
    means_SC = np.random.default_rng(0).normal(size=(20, 5))
    wanted = [scipy.stats.kendalltau(range(5), row).statistic for row in means_SC]
    assert kendall(means_SC) == pytest.approx(wanted)
    assert kendall(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 2.0]])).tolist() == [1.0, -1.0, 2 / 3]


def test_draws_are_of_windows_with_replacement_the_same_for_all_candidates() -> None:
    """Every sample of three windows out of three, as often as it should come; the second candidate is the first's."""
    sums = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    means_SC = drawn_means(sums, np.full(3, 1.0), seed=0)
    assert means_SC.shape == (DRAWS, 2)
    assert np.array_equal(means_SC[:, 1], 2 * means_SC[:, 0])
    all_of_them = [sum(each) / 3 for each in itertools.product([1.0, 10.0, 100.0], repeat=3)]
    for value in set(all_of_them):
        wanted = all_of_them.count(value) / 27
        found = float(np.isclose(means_SC[:, 0], value).mean())
        assert abs(found - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / DRAWS)


def test_draws_without_a_token_that_counts_are_left_out() -> None:
    means_SC = drawn_means(np.array([[6.0, 0.0]]), np.array([3.0, 0.0]), seed=0)
    assert 0.7 * DRAWS < len(means_SC) < 0.8 * DRAWS
    assert set(means_SC[:, 0].tolist()) == {2.0}


def test_tau_tells_how_sure_the_order_is(place: Any, inputs: dict[str, Path]) -> None:
    sure = {name: inputs[name] for name in ("layer 7", "layer 0")}  # each window says the same
    unsure = {name: inputs[name] for name in ("layer 2", "layer 4")}
    assert run_stage(spec_of([7, 0]), place("sure", sure))["tau"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    found = run_stage(spec_of([2, 4]), place("unsure", unsure))["tau"]
    assert (found["low"], found["high"]) == (-1.0, 1.0)
    assert abs(found["mean"]) < 0.2
    assert run_stage(spec_of([2, 4], ascending=False), place("down", unsure))["tau"]["mean"] == -found["mean"]
    assert run_stage(spec_of([7, 0], ascending=False), place("first", sure))["tau"]["mean"] == 1.0


def test_the_interval_has_19_of_20_draws(place: Any, tmp_path: Path) -> None:
    sums = np.random.default_rng(5).normal(size=(9, 12)) + 0.15 * np.arange(9)[:, None]
    inputs = {f"layer {n}": written(tmp_path / f"{n}", hits=[1.0] * 12, kl=list(row)) for n, row in enumerate(sums)}
    found = run_stage(spec_of(range(9)), place(inputs=inputs))
    taus = np.sort(kendall(drawn_means(sums[found["order"]], np.full(12, TOKENS), 3)))
    assert found["tau"]["mean"] == pytest.approx(taus.mean())
    assert taus[24] <= found["tau"]["low"] <= taus[25] < found["tau"]["mean"] < taus[974]
    assert taus[974] <= found["tau"]["high"] <= taus[975] < 1.0


def test_draws_are_seeded(place: Any, inputs: dict[str, Path]) -> None:
    first, again, other = (
        run_stage(spec_of(KL, seed=seed), place(f"{n}", inputs))["tau"] for n, seed in enumerate((3, 3, 4))
    )
    assert first == again != other


def test_one_candidate_has_no_pairs(place: Any, inputs: dict[str, Path]) -> None:
    found = run_stage(spec_of([7]), place(inputs={"layer 7": inputs["layer 7"]}))
    assert (found["order"], found["tied"]) == ([7], [])
    assert "tau" not in found


def test_scores_of_other_texts_are_told(place: Any, inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs["layer 2"] = written(tmp_path / "other", hits=[1.0, 4.0, 0.0, 2.0], kl=KL[2])
    with pytest.raises(ValueError, match="scores of layers 0 and 2 are of different texts"):
        run_stage(spec_of(KL), place(inputs=inputs))


def test_a_text_without_hits_does_not_choose_by_them(place: Any, tmp_path: Path) -> None:
    inputs = {f"layer {n}": written(tmp_path / f"{n}", hits=[0.0] * 4) for n in range(2)}
    with pytest.raises(ValueError, match="the text has no hits, whose mean hit_loss is: hold out more text"):
        run_stage(spec_of([0, 1], measure="hits"), place(inputs=inputs))


@pytest.mark.parametrize("ascending", [True, False])
def test_of_a_blend_the_highest_gate_goes_first(place: Any, tmp_path: Path, ascending: bool) -> None:
    write_json(tmp_path / "gates.json", {"10": 0.5, "9": 0.5, "3": 0.1, "0": 0.9})
    spec = ChoiceSpec(subject="s", blend="b", ascending=ascending, seed=0)
    made = place(inputs={"blend": tmp_path})
    found = run_stage(spec, made)
    assert found["order"] == [0, 9, 10, 3]
    assert found["scores"]["3"] == {"score": 0.1}
    assert read_json(made.out / "choice.json") == found


def pairs_of(tmp_path: Path, kl: dict[tuple[int, int], list[float]]) -> tuple[ChoiceSpec, dict[str, Path]]:
    """A choice over layers and operators by divergences of windows, and its inputs."""
    candidates = tuple(Candidate(layer=layer, operator=number, score=f"{layer}.{number}") for layer, number in kl)
    inputs = {
        each.role: written(tmp_path / each.role, kl=kl[each.layer, each.operator], hit_loss=[1.0] * 4)
        for each in candidates
    }
    return spec_of([], candidates=candidates), inputs


def test_a_layer_has_the_score_of_its_best_operator(place: Any, tmp_path: Path) -> None:
    """Two layers by two operators, and one of which both are equal: there the first one counts."""
    kl = {(1, 0): [9.0] * 4, (1, 1): KL[2], (5, 0): KL[7], (5, 1): [8.0] * 4, (6, 0): [6.0] * 4, (6, 1): [6.0] * 4}
    spec, inputs = pairs_of(tmp_path, kl)
    found = run_stage(spec, place(inputs=inputs))
    assert (found["order"], found["operators"]) == ([1, 5, 6], {"1": 1, "5": 0, "6": 0})
    assert {layer: told["score"] for layer, told in found["scores"].items()} == {"1": 0.3, "5": 0.5, "6": 0.6}
    assert {number: told["score"] for number, told in found["pairs"]["1"].items()} == {"0": 0.9, "1": 0.3}
    alone = spec_of([1, 5, 6])
    same = {**inputs, "layer 1": inputs["layer 1 operator 1"]}
    wanted = run_stage(alone, place("alone", same))
    assert {name: found[name] for name in wanted} == wanted and set(found) - set(wanted) == {"operators", "pairs"}


def test_all_pairs_are_of_one_text(place: Any, tmp_path: Path) -> None:
    spec, inputs = pairs_of(tmp_path, {(1, 0): KL[2], (1, 1): KL[4], (2, 0): KL[7]})
    inputs["layer 1 operator 1"] = written(tmp_path / "other", hits=[1.0, 4.0, 0.0, 2.0], kl=KL[4])
    with pytest.raises(ValueError, match="the scores of layers 1 and 1 are of different texts"):
        run_stage(spec, place(inputs=inputs))


def test_a_solved_choice_has_the_chosen_layers_alone(place: Any, tmp_path: Path) -> None:
    """Layer 5 by its second operator, though the first costs less, for it alone is fast enough."""
    spec, inputs = pairs_of(tmp_path, {(1, 0): KL[7], (5, 0): KL[2], (5, 1): [8.0] * 4, (6, 0): [9.0] * 4})
    solve = Solve(decode=2.0, layers=None, seconds=0.01, added=(-0.001, -0.001, -0.005, -0.004))
    found = run_stage(spec.changed(solve=solve), place(inputs=inputs))
    assert (found["order"], found["operators"], found["speed"]) == ([5], {"5": 1}, pytest.approx(2.0))
    assert found["scores"] == {"5": {"score": 0.8, "error": pytest.approx(0.0)}}
    assert found["pairs"].keys() == {"1", "5", "6"} and found["tied"] == []
