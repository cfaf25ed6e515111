"""Which weights a rule drops, what stays, and what forgetting a study deletes: by hand, from a store of known sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.record.keeping import Keep, needed_elsewhere, prune, room_text, to_delete, to_prune
from orchestrator.record.records import make_records
from orchestrator.record.remembered import Variant, variant_of, variants
from orchestrator.study.spec import short
from tests.record.handmade import Hand
from tests.record.test_remembered import WHO, other, remembered

STUDENTS = {"two 0", "two 1", "two joint", "two mixed", "heads 0", "heads 1", "heads joint", "scratch"}


@pytest.fixture
def ran(hand: Hand) -> Variant:
    """A finished study that was run, whose students weigh a kilobyte each."""
    hand.all_done()
    for name in STUDENTS:
        (hand.store.artefacts(hand.key(name)) / "student.safetensors").write_bytes(b"w" * 1024)
        hand.write(
            hand.steps[name].train,
            hand.store.result(hand.key(name)),
            files={"student.safetensors": b"w" * 1024},
        )
    variant = variant_of(hand.home, hand.plan)
    variant.remember(hand.asked, {*hand.plan.specs, *(spec.key for spec in hand.speeds.values())})
    return remembered_run(variant)


def remembered_run(variant: Variant) -> Variant:
    with variant.running(WHO) as run:
        run.tell(started=1.0)
    return variant


def dropped(hand: Hand, keep: Keep, budget: int | None = None, elsewhere: set[str] | None = None) -> list[str]:
    """Names of the students that would go, in the order in which they would."""
    records = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    room = to_prune(hand.plan, hand.store, records, keep, budget, elsewhere or set())
    names = {hand.key(name): name for name in hand.steps}
    assert all(size == 1024 for _, size in room.stages)
    return [names[key] for key, _ in room.stages]


def test_the_best_student_stays_the_others_go_worst_first(hand: Hand, ran: Variant) -> None:
    # Of students that swap both layers `two joint` has the lowest ratio, 1.1.
    gone = dropped(hand, "best")
    assert set(gone) == STUDENTS - {"two joint"}
    assert gone[:4] == ["scratch", "heads 1", "two 1", "heads 0"]  # no row of a trial, then 1.3, 1.25, 1.2


def test_the_front_is_of_prefill_and_of_decoding(hand: Hand, ran: Variant) -> None:
    # At 32 tokens: two 0 (1.05; 1.1x, 1.2x), two joint (1.1; 1.5x, 2x), heads joint (1.12; 1.6x, 1.9x).
    assert set(dropped(hand, "front")) == STUDENTS - {"two 0", "two joint", "heads joint"}


def test_all_stay_or_none(hand: Hand, ran: Variant) -> None:
    assert dropped(hand, "all") == []
    assert set(dropped(hand, "none")) == STUDENTS


def test_a_budget_drops_more_worst_first(hand: Hand, ran: Variant) -> None:
    assert dropped(hand, "front", budget=3 * 1024) == dropped(hand, "front")
    assert set(dropped(hand, "front", budget=2 * 1024)) == STUDENTS - {"two 0", "two joint"}
    assert set(dropped(hand, "all", budget=1024)) == STUDENTS - {"two 0"}


def test_what_others_need_stays(hand: Hand, ran: Variant) -> None:
    shared = {hand.key("two 0"), hand.key("two 1")}
    assert set(dropped(hand, "none", elsewhere=shared)) == STUDENTS - {"two 0", "two 1"}


def test_numbers_stay_and_nothing_is_to_do(hand: Hand, ran: Variant) -> None:
    records = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    room = to_prune(hand.plan, hand.store, records, "best", None, set())
    assert prune(hand.store, room) == 7 * 1024
    assert make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None) == records
    again = to_prune(hand.plan, hand.store, records, "best", None, set())
    assert again.stages == () and room_text(again, True).startswith(
        "weights of 0 students, 0.0 MB freed; nothing to drop"
    )


def call(hand: Hand, *words: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, words), "--home", str(hand.home.root)])
    assert done.exit_code == code, done.output
    return done


def test_the_command_lists_first_and_drops_when_told_so(hand: Hand, ran: Variant) -> None:
    told = call(hand, "prune", "handmade", "--keep", "best").stdout.splitlines()
    assert told[-1] == "weights of 7 students, 0.0 MB would be freed by --yes; all numbers stay"
    assert not any(hand.store.dropped(hand.key(name)) for name in STUDENTS)
    told = call(hand, "prune", "handmade", "--keep", "best", "--yes").stdout.splitlines()
    assert told[0] == f"{short(hand.key('scratch'))}       0.0 MB  dropped"
    assert {name for name in STUDENTS if hand.store.dropped(hand.key(name))} == STUDENTS - {"two joint"}
    assert "finished, perplexity ratio 1.300" in call(hand, "status", "handmade").stdout
    call(hand, "archive", "handmade", "--yes")
    assert hand.store.dropped(hand.key("two joint"))


def test_a_student_without_weights_is_not_exported_and_can_be_trained_again(
    hand: Hand, ran: Variant, tmp_path: Path
) -> None:
    call(hand, "archive", "handmade", "--yes")
    key = short(hand.key("two joint"))
    told = call(hand, "export", "handmade", "--to", tmp_path / "out", code=2).stderr
    assert f"stage {key}: its weights were dropped: `layerswap prune handmade --restore {key}`" in told
    call(hand, "prune", "handmade", "--restore", key)
    assert not hand.store.finished(hand.key("two joint")) and hand.store.finished(hand.key("two mixed"))
    told = call(hand, "prune", "handmade", "--restore", "zz", code=2).stderr
    assert told.startswith("--restore zz: 0 stages whose weights were dropped begin so")


def test_a_study_is_deleted_with_what_only_it_needs(hand: Hand, ran: Variant, tmp_path: Path) -> None:
    seeded = other(hand, tmp_path, "seed=1")
    seeded.store = hand.store
    seeded.finish("two 0")
    variant = remembered(seeded, 5.0)
    room = to_delete(hand.home, variant, hand.store)
    assert {key for key, _ in room.stages} == {seeded.key("two 0"), seeded.steps["two 0"].evaluate.key}
    assert needed_elsewhere(hand.home, variant) == ran.needed()
    told = call(hand, "delete", variant.title).stdout
    assert told.startswith(f"{variant.title}, 2 stages, ") and "would be deleted by --yes" in told
    assert seeded.store.finished(seeded.key("two 0"))
    call(hand, "delete", variant.title, "--yes")
    assert variants(hand.home) == [ran]
    assert not hand.store.folder(seeded.key("two 0")).exists() and hand.store.finished(hand.key("two 0"))
    assert not (hand.home.study("handmade") / "newest").is_symlink()


@pytest.mark.parametrize("words", [("prune",), ("archive",), ("delete",)])
def test_a_study_that_runs_is_left_alone(hand: Hand, ran: Variant, words: tuple[str, ...]) -> None:
    with ran.running(WHO):
        told = call(hand, *words, "handmade", "--yes", code=2).stderr
    assert told == f"{ran.title} is running: end that run first, or wait for it\n"
    assert not any(hand.store.dropped(hand.key(name)) for name in STUDENTS)


def test_a_study_that_was_never_run_has_nothing_to_drop(hand: Hand) -> None:
    variant_of(hand.home, hand.plan).remember(hand.asked, set())
    told = call(hand, "prune", hand.file, code=2).stderr
    assert told.endswith("as it is written now: `layerswap list` tells what was\n")
