"""Which layers go next: candidates in order of their scores, and how sure the order is.

Shapes: C candidates, W windows, S draws of windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orchestrator.distill.choosing.blend import GATES
from orchestrator.distill.choosing.solve import solved
from orchestrator.distill.choosing.windows import Numbers, Sums, difference, ratio, read_sums
from orchestrator.distill.context import Workplace
from orchestrator.files import read_json, write_json
from orchestrator.study.spec import ChoiceSpec

CHOICE = "choice.json"
MEASURES = {"kl": "kl", "loss": "loss", "hits": "hit_loss"}
DRAWS = 1_000
SHARE = 0.95  # of draws whose tau lies in the interval
TIED = 2.0  # standard errors of the difference to the first: up to there a layer could as well be first


def choose(spec: ChoiceSpec, place: Workplace) -> dict[str, Any]:
    """Put the candidates in order. The result is kept as `choice.json` too.

    Returns:
        order: layers, the one that goes first at the start; equal ones by number.
        scores: by layer, as text, its `score` and its `error`; of a blend, whose `score` is a gate, without errors.

        Of candidates also, all over windows drawn anew, the same for every candidate:

        operators: where layers have several, by layer, as text, the place of the best in the study's list: a layer's
            score is that of this operator. pairs: by layer and place `score` and `error` of each. Of a choice that is
            solved exactly all of these but pairs are of the chosen layers alone, and speed is the predicted one of
            decoding over the teacher's.
        teacher: score and error of the teacher itself, where its own score is given.
        tied: layers whose difference to the first is at most two standard errors, paired over windows; in order.
        tau: `mean` and, as `low` and `high`, the 95 % interval of Kendall's tau between the order and those of 1,000
            draws (Efron and Tibshirani 1993, chapter 13); none of one candidate, which has no pairs.

    Raises:
        ValueError: scores are of different texts, or the text has none of the tokens that the measure is of.
    """
    if spec.blend is not None:
        gates: dict[str, float] = read_json(place.inputs["blend"] / GATES)
        order = sorted(map(int, gates), key=lambda layer: (-gates[str(layer)], layer))
        result: dict[str, Any] = {"order": order, "scores": {layer: {"score": gate} for layer, gate in gates.items()}}
    else:
        result = _of_candidates(spec, place)
    write_json(place.out / CHOICE, result)
    return result


def _of_candidates(spec: ChoiceSpec, place: Workplace) -> dict[str, Any]:
    name, sign = MEASURES[spec.measure], 1.0 if spec.ascending else -1.0
    every = {(each.layer, each.operator): read_sums(place.inputs[each.role]) for each in spec.candidates}
    _check_same_text(every)
    all_means = {pair: ratio(*each.of(name)) for pair, each in every.items()}
    ranked = sorted(every, key=lambda pair: (sign * all_means[pair][0], *pair))
    best = dict(reversed(ranked))  # the first of each layer stands last
    if spec.solve is not None:
        added = {
            (each.layer, each.operator): time for each, time in zip(spec.candidates, spec.solve.added, strict=True)
        }
        best = solved({pair: mean for pair, (mean, _) in all_means.items()}, added, spec.solve)
    order = [layer for layer, operator in ranked if best.get(layer) == operator]
    found = {layer: every[layer, best[layer]] for layer in order}
    means = {layer: all_means[layer, best[layer]] for layer in order}
    result: dict[str, Any] = {"order": order, "scores": {str(layer): _told(means[layer]) for layer in sorted(order)}}
    if spec.solve is not None:
        result["speed"] = spec.solve.seconds / (spec.solve.seconds + sum(added[pair] for pair in best.items()))
    if len(every) > len(order):
        result["operators"] = {str(layer): best[layer] for layer in sorted(order)}
        result["pairs"] = {}
        for layer, operator in sorted(every):
            result["pairs"].setdefault(str(layer), {})[str(operator)] = _told(all_means[layer, operator])
    if "reference" in place.inputs:
        result["teacher"] = _told(ratio(*read_sums(place.inputs["reference"]).of(name)))
    result["tied"] = [layer for layer in order[1:] if _tied(*difference(found[layer], found[order[0]], name))]
    if len(order) > 1:
        sums_CW = sign * np.stack([found[layer].of(name)[0] for layer in order])
        taus_S = kendall(drawn_means(sums_CW, found[order[0]].of(name)[1], spec.seed))
        low, high = np.quantile(taus_S, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        result["tau"] = {"mean": float(taus_S.mean()), "low": float(low), "high": float(high)}
    return result


def drawn_means(sums_CW: Numbers, counts_W: Numbers, seed: int) -> Numbers:
    """The means over tokens in as many windows as there are, drawn anew with replacement, (S, C).

    A draw without a single token that counts has no mean and is left out.
    """
    windows = len(counts_W)
    times_SW = np.random.default_rng(seed).multinomial(windows, np.full(windows, 1 / windows), size=DRAWS)
    counts_S = times_SW @ counts_W
    some = counts_S > 0
    means_SC: Numbers = (times_SW[some] @ sums_CW.T) / counts_S[some, None]
    return means_SC


def kendall(means_SC: Numbers) -> Numbers:
    """Kendall's tau between the order that the candidates stand in and that of their means, (S,), lowest first.

    The share of pairs in the same order less that in the other; a pair of equal means is in neither.
    """
    candidates = means_SC.shape[1]
    agreeing_S = np.zeros(len(means_SC))
    for first in range(candidates):
        agreeing_S += np.sign(means_SC[:, first + 1 :] - means_SC[:, first, None]).sum(1)
    taus_S: Numbers = agreeing_S / (candidates * (candidates - 1) / 2)
    return taus_S


def _tied(apart: float, error: float) -> bool:
    return abs(apart) <= TIED * error


def _told(mean: tuple[float, float]) -> dict[str, float]:
    return {"score": mean[0], "error": mean[1]}


def _check_same_text(found: Mapping[tuple[int, int], Sums]) -> None:
    (first, *_), *others = sorted(found)
    wanted = found[min(found)].counts
    for pair in others:
        for name, counts in wanted.items():
            if not np.array_equal(counts, found[pair].counts[name]):
                raise ValueError(f"the scores of layers {first} and {pair[0]} are of different texts: score them alike")
