"""The plan as people see it: every stretch of stages once, trials at the leaves, a screen for the default study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.files import write_json
from orchestrator.run.store import Store

ROOT = Path(__file__).resolve().parents[2]
TREE = """\
teacher  3 layers, 61 k tokens
├─ hyena-2  0-1 → 2 → joint  26 k  trial-00  operator=hyena-2
└─ hyena-4h  0-1 → 2         15 k
   ├─ joint                  10 k  trial-01  losses=kl:1.0
   └─ joint                  10 k  trial-02  losses=kl:1.0,ce:0.5
controls: scratch hyena-2, scratch hyena-4h, skip (4)

3 trials ask for 9 stages, 7 distinct: sharing factor 1.29 in stages, 1.25 in tokens
in the store: 0 of them; with teacher and controls 0 of 14
memory of a stage: teacher 695 MB, evaluate 680-681 MB, probes 670-671 MB, throughput 673-680 MB, scratch 678-680 MB,
                   distil 661-686 MB
to do: 174 k tokens to train; time and disk are unknown: nothing like it was measured here
       (unknown: distil, evaluate, probes, scratch, skip, teacher, throughput, tokens)
"""


def plan(home: Path, *given: str, study: str = "smoke") -> str:
    words = ["plan", str(ROOT / "studies" / f"{study}.yaml"), "--home", str(home), *given]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def summary(home: Path, *given: str, study: str = "smoke") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(home, "--json", *given, study=study))
    return found


def done(store: Store, key: str, kind: str, **result: Any) -> None:
    write_json(store.folder(key) / "DONE.json", {"kind": kind, "result": result, "seconds": 12.0, "files": {}})


def test_a_shared_beginning_is_told_once_and_trials_stand_at_the_leaves(tmp_path: Path) -> None:
    assert plan(tmp_path / "home").split("\n\n", 1)[1] == TREE


def test_the_default_study_fits_a_screen(tmp_path: Path) -> None:
    lines = plan(tmp_path / "home", study="layerwise").splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 120
    assert sum("trial-" in line for line in lines) == 14


def test_memory_is_told_for_every_stage_that_holds_a_model(tmp_path: Path) -> None:
    found = summary(tmp_path / "home", study="layerwise")["memory"]
    kinds = {told["kind"] for told in found.values()}
    assert kinds == {"teacher", "evaluate", "throughput", "scratch", "distil", "score"}
    named = {told["name"]: told["megabytes"] for told in found.values()}
    assert named["skip 0"] < named["hyena-2 in layers 0, 1"] < named["hyena-3 in layers 0, 1, 2, 3, 4, 5"] < 900
    assert {f"{before}the teacher" for before in ("", "evaluation of ", "speed of ")} < named.keys()


def test_operators_are_told_by_name_and_by_what_tells_those_of_one_name_apart(tmp_path: Path) -> None:
    power = "kind: hyena, heads: 4, feature_map: power"
    modal = f"{{{power}, filter: {{kind: modal, modes: 4}}}}"
    tried = f"[{{{power}, key_dim: 4}}, {{{power}, key_dim: 8}}, {modal}, {{kind: skip}}]"
    words = summary(tmp_path / "home", "--set", f"search.space={{operator: {tried}, seed: [0]}}")["words"]
    assert list(words.values()) == [
        "operator=hyena-4h-power(key_dim:4) seed=0",
        "operator=hyena-4h-power(key_dim:8) seed=0",
        "operator=hyena-4h-power-modal seed=0",
        "operator=skip seed=0",
    ]


def test_a_trial_that_ends_where_another_goes_on_stands_at_its_own_stage(tmp_path: Path) -> None:
    told = plan(tmp_path / "home", "--set", "search.space={recipe.joint: [[], [{tokens: 10_240, losses: {kl: 1.0}}]]}")
    [ends] = [line for line in told.splitlines() if "trial-00" in line]
    [goes_on] = [line for line in told.splitlines() if "trial-01" in line]
    assert ends.startswith("└─ hyena-4h  0-1 → 2") and goes_on.startswith("   └─ joint")


def test_sharing_is_of_stages_and_of_tokens(tmp_path: Path) -> None:
    told = summary(tmp_path / "home")
    assert (told["stages"], told["distinct"], told["sharing"]) == (9, 7, pytest.approx(9 / 7))
    assert (told["tokens"], told["distinct_tokens"]) == (76_800, 61_440)
    assert told["sharing_tokens"] == pytest.approx(1.25)
    assert told["estimate"]["wall_seconds"] is None


def test_a_stage_that_was_done_is_no_longer_to_do(tmp_path: Path) -> None:
    told = summary(tmp_path)
    done(Store(tmp_path / "store"), told["teacher"]["key"], "teacher")
    assert summary(tmp_path)["tokens_to_train"] == told["tokens_to_train"] - 61_440 == 112_640


def test_the_plan_of_another_device_is_of_other_stages(tmp_path: Path) -> None:
    """What the CPU took says nothing of it, and its memory is the accelerator's."""
    here, there = summary(tmp_path), summary(tmp_path, "--device", "cuda")
    assert here["teacher"]["key"] != there["teacher"]["key"]
    assert here["memory"].keys().isdisjoint(there["memory"])  # measurements of speed are among them
    done(Store(tmp_path / "store"), here["teacher"]["key"], "teacher")
    lines = plan(tmp_path, "--device", "cuda").splitlines()
    assert lines[2] == "teacher  3 layers, 61 k tokens"
    assert any(line.startswith("GPU memory of a stage: teacher ") for line in lines)
    assert lines[-2] == "to do: 174 k tokens to train; time and disk are unknown: nothing like it was measured here"


def test_stages_that_are_begun_or_done_are_marked(tmp_path: Path) -> None:
    told = summary(tmp_path)
    store = Store(tmp_path / "store")
    key = told["tree"][1]["key"]
    write_json(store.folder(key) / "attempt.json", {})
    assert "hyena-4h  0-1 … → 2 " in plan(tmp_path)
