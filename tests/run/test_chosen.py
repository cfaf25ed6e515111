"""Choices, gates and searches that learn, as commands: run, looked at, and run again without a stage more."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def layerswap(home: Path, *words: str) -> str:
    """What a command prints, which must succeed."""
    command = [sys.executable, "-m", "orchestrator.cli", *words, "--home", str(home)]
    environment = {**os.environ, "TMPDIR": str(home.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished(home: Path) -> dict[str, Any]:
    """By key what every stage of the home published."""
    return {path.parent.name: json.loads(path.read_text()) for path in home.glob("store/??/*/DONE.json")}


def test_choices_and_gates_decide_what_runs_and_are_made_once(tmp_path: Path) -> None:
    home, study = tmp_path / "home", str(ROOT / "tests/chaos/chosen.yaml")
    before = json.loads(layerswap(home, "plan", study, "--json"))
    assert before["most"] == 9 and before["later"].keys() == {f"trial-0{n}" for n in range(6)}
    told = layerswap(home, "run", study)
    assert "chosen trial-00" in told and "above 1: trained on" in told
    after = json.loads(layerswap(home, "plan", study, "--json"))
    assert (after["later"], after["done"], after["all_done"]) == ({}, after["distinct"], after["all_stages"])
    done = finished(home)
    choices = [manifest["result"] for manifest in done.values() if manifest["kind"] == "choice"]
    assert len(choices) == 4  # that at the teacher is one for two trials
    first = after["tree"]
    shared = [node for node in first if node["trials"] > 1]
    assert shared and any(set(node["ends"]) == {"trial-01"} for node in shared)
    again = layerswap(home, "run", study)
    assert "0 to do" in again and finished(home) == done


def test_layers_come_to_operators_of_their_own_one_by_one_or_all_at_once(tmp_path: Path) -> None:
    """By the lowest score of a layer; and by a program, which is beside a walk through all sets here."""
    home, study = tmp_path / "home", str(ROOT / "tests/chaos/chosen.yaml")
    operators = "operator=[{kind: hyena, heads: 4}, {kind: window, window: 8, sinks: 1}]"
    schedule = "schedule={choice: {score: kl, texts: 1024, take: 2, until: {layers: 2}}}"
    solvers = "search={space: {schedule.choice.solver: [greedy, exact]}}"
    layerswap(home, "run", study, "--set", operators, "--set", schedule, "--set", solvers)
    results = [manifest["result"] for manifest in finished(home).values() if manifest["kind"] == "choice"]
    [one_by_one] = [result for result in results if "speed" not in result]
    [at_once] = [result for result in results if "speed" in result]
    scores = {
        (int(layer), int(own)): told["score"]
        for layer, every in one_by_one["pairs"].items()
        for own, told in every.items()
    }
    assert scores.keys() == {(layer, own) for layer in range(3) for own in range(2)}
    best = {layer: min((0, 1), key=lambda own: scores[layer, own]) for layer in range(3)}
    assert one_by_one["operators"] == {str(layer): own for layer, own in best.items()}
    assert one_by_one["order"] == sorted(best, key=lambda layer: scores[layer, best[layer]])
    sets = [
        {first: one, second: other}
        for first, second in itertools.combinations(range(3), 2)
        for one, other in itertools.product((0, 1), repeat=2)
    ]
    cheapest = min(sets, key=lambda chosen: sum(scores[pair] for pair in chosen.items()))
    assert at_once["operators"] == {str(layer): own for layer, own in cheapest.items()}
    layerswap(home, "report", "chosen", "--json", str(tmp_path / "records.json"))
    told = json.loads((tmp_path / "records.json").read_text())["records"]
    [ends] = [{row["stage_key"] for row in told if row["kind"] == "stage"}]  # both come to the same student
    student = json.loads(next(home.glob(f"store/*/{ends.pop()}/spec.json")).read_text())
    assert student["layers"] == sorted(cheapest) and not ends


def test_a_search_that_learns_goes_on_where_it_was(tmp_path: Path) -> None:
    home, study = tmp_path / "home", str(ROOT / "tests/chaos/drawn.yaml")
    assert "6 trials are drawn at run time: tpe, 2 at a time, by ratio" in layerswap(home, "plan", study)
    layerswap(home, "run", study)
    done = finished(home)
    draws = [manifest["result"]["points"] for manifest in done.values() if manifest["kind"] == "draw"]
    assert sorted(map(len, draws)) == [2, 2, 2]
    assert len({json.dumps(point, sort_keys=True) for points in draws for point in points}) == 6
    again = layerswap(home, "run", study)
    assert "0 to do" in again and finished(home) == done
