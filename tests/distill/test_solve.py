"""The cheapest set of swaps that is fast enough, beside a walk through all of them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.distill.choosing.solve import Pair, solved
from orchestrator.study.spec import Solve

COST = st.floats(0.0, 3.0).map(lambda value: round(value, 3))
ADDED = st.floats(-0.24, 0.1).map(lambda value: round(value, 3))  # of four layers at most: a token takes some time


def by_hand(scores: dict[Pair, float], added: dict[Pair, float], asked: Solve) -> float:
    """The lowest sum of scores over every assignment of an operator, or none, to every layer; infinite for none."""
    layers = sorted({layer for layer, _ in scores})
    best = math.inf
    for picks in itertools.product(*([None, *(pair for pair in scores if pair[0] == layer)] for layer in layers)):
        taken = [pair for pair in picks if pair is not None]
        time = asked.seconds + sum(added[pair] for pair in taken)
        fast = asked.decode is None or time <= asked.seconds / asked.decode + 1e-9
        if fast and asked.layers in (None, len(taken)):
            best = min(best, sum(scores[pair] for pair in taken))
    return best


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_is_the_best_of_all_sets(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    pairs = [(layer, operator) for layer in range(count) for operator in range(data.draw(st.integers(1, 3)))]
    scores, added = ({pair: data.draw(values) for pair in pairs} for values in (COST, ADDED))
    decode = data.draw(st.none() | st.floats(1.01, 2.0).map(lambda value: round(value, 2)))
    layers = data.draw(st.integers(1, count) if decode is None else st.none() | st.integers(1, count))
    asked = Solve(decode=decode, layers=layers, seconds=1.0, added=())
    wanted = by_hand(scores, added, asked)
    if math.isinf(wanted):
        with pytest.raises(ValueError, match="is out of reach"):
            solved(scores, added, asked)
        return
    found = solved(scores, added, asked)
    assert sum(scores[pair] for pair in found.items()) == pytest.approx(wanted, abs=1e-5)
    assert layers in (None, len(found))
    assert decode is None or 1.0 + sum(added[pair] for pair in found.items()) <= 1.0 / decode + 1e-5


def test_a_dear_fast_layer_may_be_worth_two_cheap_ones() -> None:
    scores = {(0, 0): 1.0, (1, 0): 1.1, (2, 0): 1.8, (2, 1): 5.0}
    added = {(0, 0): -0.002, (1, 0): -0.003, (2, 0): -0.005, (2, 1): -0.006}
    assert solved(scores, added, Solve(decode=2.0, layers=None, seconds=0.01, added=())) == {2: 0}
    assert solved(scores, added, Solve(decode=2.0, layers=2, seconds=0.01, added=())) == {0: 0, 1: 0}


def test_what_is_out_of_reach_names_the_fastest() -> None:
    scores, added = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 1.0}, {(0, 0): -0.001, (0, 1): -0.002, (1, 0): 0.001}
    with pytest.raises(ValueError, match=r"decode: 3 times .* out of reach: .* the fastest student has 1.250 times"):
        solved(scores, added, Solve(decode=3.0, layers=None, seconds=0.01, added=()))
    with pytest.raises(ValueError, match=r"the fastest student has 1.111 times"):
        solved(scores, added, Solve(decode=1.2, layers=2, seconds=0.01, added=()))
    with pytest.raises(ValueError, match=r"until.layers: 3 layers cannot be swapped of 2: lower it"):
        solved(scores, added, Solve(decode=None, layers=3, seconds=0.01, added=()))
