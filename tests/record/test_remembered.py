"""What a home remembers of its studies: as they were asked for, by variant and by run, without their inputs."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import read_json, write_json
from orchestrator.record.home import Home
from orchestrator.record.provenance import Provenance
from orchestrator.record.remembered import (
    UnknownStudyError,
    Variant,
    as_written,
    identity,
    named,
    variant_of,
    variants,
)
from orchestrator.study.loader import read_document
from orchestrator.study.sources import resolve
from tests.record.handmade import Hand, asked

WHO = Provenance("layerswap run s.yaml", "ada", "there", "a processor x2", "3.11", {"torch": "2"}, "abc")


def remembered(hand: Hand, started: float = 1.0) -> Variant:
    """The variant of a handmade study that was run once."""
    variant = variant_of(hand.home, hand.plan)
    variant.remember(hand.asked, set(hand.plan.specs))
    with variant.running(WHO) as run:
        run.tell(started=started)
    return variant


def other(hand: Hand, tmp_path: Path, *overrides: str) -> Hand:
    """The same study in the same home, with other values."""
    folder = tmp_path / f"with-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    made = Hand(folder, *overrides)
    made.home = hand.home
    return made


def test_a_plan_is_the_same_without_the_files_it_was_made_from(hand: Hand, tmp_path: Path) -> None:
    variant = remembered(hand)
    (tmp_path / "text.txt").unlink()
    hand.file.unlink()
    found = variant.asked()
    assert found == hand.asked
    plan = found.plan()
    assert plan == hand.plan
    assert (variant.folder / "study.yaml").read_text() == hand.asked.text
    assert variant.needed() == set(hand.plan.specs)


def test_trials_keep_their_numbers_and_the_order_in_which_they_are_told(hand: Hand, tmp_path: Path) -> None:
    """A grid counts its last axis first, and names say what differs in the order of the file."""
    losses = "{kl: 1.0, ce: 0.5}"
    given = asked(tmp_path, f"search.space={{seed: [0, 1], recipe.joint.0.losses: [{{kl: 1.0}}, {losses}]}}")
    variant = variant_of(hand.home, given.plan())
    variant.remember(given, set())
    told = [list(trial.values.items()) for trial in variant.asked().plan().trials]
    assert [(values[0], list(values[1][1])) for values in told] == [
        (("seed", 0), ["kl"]), (("seed", 0), ["kl", "ce"]), (("seed", 1), ["kl"]), (("seed", 1), ["kl", "ce"]),
    ]  # fmt: skip
    assert told == [list(trial.values.items()) for trial in given.plan().trials]


def test_equal_plans_are_one_variant_and_others_have_an_id_of_their_own(hand: Hand, tmp_path: Path) -> None:
    mine = identity(hand.plan)
    assert len(mine) == 8
    same = ["question=Another one?", "controls.skip=true"]
    assert {identity(other(hand, tmp_path, override).plan) for override in same} == {mine}
    values = ["seed=1", "throughput.lengths=[16]", "controls.skip=false", "recipe.batch_size=4", "evaluation.tokens=32"]
    values += ["search.early_stopping={grace_layers: 1}"]
    ids = [identity(other(hand, tmp_path, value).plan) for value in values]
    assert len({mine, *ids}) == 1 + len(values)


def test_a_variant_is_found_by_what_its_file_says(hand: Hand, tmp_path: Path) -> None:
    assert as_written(hand.home, read_document(hand.file)) is None
    variant = remembered(hand)
    assert as_written(hand.home, read_document(hand.file)) == variant
    assert as_written(hand.home, read_document(hand.file, ("question=What else?",))) == variant
    assert as_written(hand.home, read_document(hand.file, ("seed=1",))) is None
    seeded = remembered(other(hand, tmp_path, "seed=1"))
    assert as_written(hand.home, read_document(hand.file, ("seed=1",))) == seeded


def test_of_equal_values_with_other_text_the_newest_is_meant(hand: Hand, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("another text\n")
    resolved = resolve(hand.plan.study, tmp_path)
    changed = other(hand, tmp_path)
    changed.asked = dataclasses.replace(hand.asked, resolved=resolved)
    changed.plan = changed.asked.plan()
    first, second = remembered(hand, 1.0), remembered(changed, 2.0)
    assert first.id != second.id
    assert as_written(hand.home, read_document(hand.file)) == second


def test_a_name_means_the_variant_that_was_run_last(hand: Hand, tmp_path: Path) -> None:
    old, new = remembered(hand, 10.0), remembered(other(hand, tmp_path, "seed=1"), 20.0)
    assert named(hand.home, "handmade") == new
    assert variants(hand.home) == [new, old]
    assert (hand.home.study("handmade") / "newest").resolve() == new.folder.resolve()
    assert named(hand.home, f"handmade/{old.id}") == named(hand.home, f"handmade/{old.id[:5]}") == old
    with old.running(WHO) as run:
        run.tell(started=30.0)
    assert named(hand.home, "handmade") == old


@pytest.mark.parametrize(
    ("title", "told"),
    [
        ("other", "other: no study file, and no study of .*: it knows handmade"),
        ("handmade/zz", "handmade/zz: 0 variants of handmade begin so: it has [0-9a-f]{8}"),
        ("", "no study file"),
    ],
)
def test_a_name_that_means_nothing_is_told(hand: Hand, title: str, told: str) -> None:
    remembered(hand)
    with pytest.raises(UnknownStudyError, match=told):
        named(hand.home, title)


def test_an_empty_home_knows_no_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownStudyError, match="nothing was run there yet"):
        named(Home(tmp_path), "layerwise")


def test_a_run_is_written_down_as_it_goes_on(hand: Hand) -> None:
    variant = variant_of(hand.home, hand.plan)
    variant.remember(hand.asked, set())
    with variant.running(WHO) as run:
        [begun] = variant.runs()
        assert (begun["status"], begun["seconds"], begun["trained"], begun["pid"]) == ("running", 0.0, [], os.getpid())
        assert (begun["user"], begun["host"], begun["commit"]) == ("ada", "there", "abc")
        assert variant.alive
        run.tell(status="failed", seconds=5.0, failures={"trial-00": "why"})
    assert not variant.alive
    assert [(one["status"], one["seconds"]) for one in variant.runs()] == [("failed", 5.0)]


def test_a_run_that_was_killed_is_interrupted_and_keeps_its_cost(hand: Hand) -> None:
    variant = variant_of(hand.home, hand.plan)
    variant.remember(hand.asked, set())
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.record.test_remembered import WHO\n"
        "from orchestrator.record.remembered import Variant\n"
        "with Variant('handmade', 'x', Path(sys.argv[1])).running(WHO) as run:\n"
        "    run.tell(seconds=7.0, trained=['k'])\n    print('here', flush=True)\n    sys.stdin.read()\n"
    )
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", code, str(variant.folder)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    assert child.stdout is not None and child.stdout.readline() == "here\n"
    assert [run["status"] for run in variant.runs()] == ["running"]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert [(run["status"], run["seconds"]) for run in variant.runs()] == [("interrupted", 7.0)]
    assert variant.cost().trained == ("k",)


def test_costs_add_up_over_runs(hand: Hand) -> None:
    variant = variant_of(hand.home, hand.plan)
    assert (variant.cost().runs, variant.cost().seconds, variant.runs()) == (0, 0.0, [])
    for seconds, trained, peak in ((60.0, ["b", "a"], 5.0), (30.0, ["a"], 9.0), (1.0, [], 7.0)):
        with variant.running(WHO) as run:
            run.tell(seconds=seconds, trained=trained, peak_rss_mb=peak)
    cost = variant.cost()
    assert (cost.runs, cost.seconds, cost.trained, cost.peak_rss_mb) == (3, 91.0, ("a", "b"), 9.0)


def test_the_last_run_that_came_to_its_end_says_which_trials_are_stopped(hand: Hand) -> None:
    variant = variant_of(hand.home, hand.plan)
    assert variant.stopped() == {}
    for stopped in ({"trial-01": 1}, {"trial-02": 2}, None):
        with variant.running(WHO) as run:
            run.tell(stopped=stopped)
    assert variant.stopped() == {"trial-02": 2}


def begin(folder: str, count: int) -> None:
    for _ in range(count):
        with Variant("s", "x", Path(folder)).running(WHO) as run:
            run.tell(seconds=1.0)


def test_runs_of_many_processes_at_a_time_are_all_remembered(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=begin, args=(str(tmp_path), 5)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    runs = Variant("s", "x", tmp_path).runs()
    assert [run["number"] for run in runs] == list(range(1, 21))
    assert Variant("s", "x", tmp_path).cost().seconds == 20.0


def test_a_full_disk_does_not_end_a_run(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_of(hand.home, hand.plan)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with variant.running(WHO) as run:
        monkeypatch.setattr("orchestrator.record.remembered.write_json", full)
        run.tell(seconds=5.0)
    assert run.known["seconds"] == 5.0


@pytest.mark.parametrize("torn", ["", "{", '{"keys": 3}', "[]"])
def test_what_is_torn_is_told_with_the_remedy(hand: Hand, torn: str) -> None:
    variant = remembered(hand)
    (variant.folder / "asked.json").write_text(torn)
    for look in (variant.asked, variant.needed):
        with pytest.raises(UnknownStudyError, match=r"cannot be read .*: run the study again, or remove"):
            look()
    assert as_written(hand.home, read_document(hand.file)) is None
    (variant.folder / "runs" / "0001.json").write_text(torn)
    assert variant.runs() == [] and variants(hand.home) == [variant]


def test_what_another_version_allowed_is_told(hand: Hand) -> None:
    variant = remembered(hand)
    asked = read_json(variant.folder / "asked.json")
    asked["values"]["recipe"]["unheard_of"] = 1
    write_json(variant.folder / "asked.json", asked)
    with pytest.raises(UnknownStudyError, match=r"another version of layerswap.*unheard_of"):
        variant.asked().plan()


def test_a_home_that_was_moved_remembers_all(hand: Hand, tmp_path: Path) -> None:
    variant = remembered(hand)
    shutil.move(hand.home.root, tmp_path / "elsewhere")
    moved = named(Home(tmp_path / "elsewhere"), "handmade")
    assert moved.id == variant.id and moved.asked().plan() == hand.plan
    assert (moved.folder.parent / "newest" / "study.yaml").is_file()
